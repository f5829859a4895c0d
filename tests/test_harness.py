"""Laws of the adapter for the lm-evaluation-harness: every token once, likelihoods of the model, texts as asked."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from drills import rig

from conftest import tiny_config
from moe_jax import harness
from moe_jax.data import ByteTokenizer, documents, evaluation_batches, make_corpus, open_corpus
from moe_jax.decoding import Model, complete, score
from moe_jax.harness import Reader, likelihoods, rolling, until, windows
from moe_jax.sampling import Sampling
from moe_jax.state import init_state
from moe_jax.step import make_eval_step
from moe_jax.tasks.documents import questions

BYTES = ByteTokenizer()
CONFIG = tiny_config(model=dict(init_std=0.2))
NEEDS = "needs the harness, 59 packages: pip install 'moe_jax[lm-eval]'"


@functools.cache
def read(**changes):
    state = init_state(CONFIG)
    model = Model(CONFIG, state.params, state.bias, state.balance)
    return Reader(**(dict(model=model, tokenizer=BYTES, opened=True, max_length=16, batch_size=4) | changes))


def logs_of(tokens):
    """ln p of every token after the first, by one pass over all of them."""
    return score(read().model, [tokens])[0]


# --- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 20])
def test_windows_predict_every_token_once_with_as_much_before_it_as_fits(length):
    tokens, predicted = list(range(17)), []
    for piece, new in windows(tokens, -1, length):
        predicted += piece[-new:]
        assert 1 <= new < len(piece) == min(length, piece[-1] + 1) + 1
        assert piece == [-1, *tokens][piece[0] + 1 :][: len(piece)]  # consecutive, behind the prefix
    assert predicted == tokens


def test_a_text_without_tokens_has_no_window():
    assert list(windows([], -1, 4)) == []


# --- likelihoods ------------------------------------------------------------------------------------------------


def test_the_likelihood_of_a_text_is_the_sum_over_its_windows():
    text = "forty bytes of text, in three windows.."
    tokens, expected = [256, *text.encode()], 0.0
    expected += logs_of(tokens[:17])[0].sum()  # 16 bytes behind the separator
    expected += logs_of(tokens[16:33])[0].sum()  # 16 after the last of these
    expected += logs_of(tokens[-17:])[0][-(len(text) - 32) :].sum()  # the rest, and all that fits before it
    assert rolling(read(), [text, ""]) == pytest.approx([expected, 0.0], rel=1e-5)


def test_bits_per_byte_are_those_of_evaluation_without_its_separators():
    # documents of 15 bytes: each window of 16 inputs is a document, and its last target the next one's separator
    texts = [f"document {n:2} abcd"[:15] for n in range(8)]
    corpus = make_corpus({"one": {"train": ["x"], "validation": texts}})
    (batch,) = evaluation_batches(corpus, batch_size=8, sequence_length=16)
    nats = np.asarray(make_eval_step(CONFIG)(init_state(CONFIG), batch).nats, np.float64)
    separators = [logs_of([256, *text.encode(), 256])[0][-1] for text in texts]
    separators[-1] = 0.0  # none follows
    ours = -np.array(rolling(read(), texts))
    np.testing.assert_allclose(ours, nats + separators, rtol=1e-5)
    num_bytes = int(batch.num_bytes.sum())
    assert ours.sum() / (math.log(2) * num_bytes) == pytest.approx((nats + separators).sum() / math.log(2) / 120)


def test_the_likelihood_of_a_continuation_is_that_of_its_own_tokens():
    context, continuation = [256, *b"con"], list(b"tinue")
    logs, likeliest = logs_of(context + continuation)
    best = int(complete(read().model, [context], BYTES, max_new_tokens=1, sampling=GREEDY)[0].ids[0])
    found = likelihoods(read(), [(context, continuation), (context, [best]), (context, [])])
    assert found[0] == (pytest.approx(logs[-5:].sum(), rel=1e-5), bool(likeliest[-5:].all()))
    assert found[1][1] is True and found[2] == (0.0, True)


GREEDY = Sampling(temperature=0)


def test_of_a_long_context_the_last_tokens_are_seen():
    context, continuation = [256, *b"a context of twenty and more"], list(b"end")
    seen = (context + continuation)[-17:]
    (found,) = likelihoods(read(), [(context, continuation)])
    assert found[0] == pytest.approx(logs_of(seen)[0][-3:].sum(), rel=1e-5)
    with pytest.raises(ValueError, match="a continuation has 17 tokens, more than the 16"):
        likelihoods(read(), [(context, [0] * 17)])


def test_answers_come_in_the_order_of_the_requests():
    requests = [([256], list(b"abcdef"[:n])) for n in (1, 6, 3, 2, 5, 4)]  # batches of four, by length
    together = likelihoods(read(), requests)
    alone = [likelihoods(read(), [request])[0] for request in requests]
    np.testing.assert_allclose([log for log, _ in together], [log for log, _ in alone], rtol=1e-5)


# --- texts ------------------------------------------------------------------------------------------------------


def test_texts_are_greedy_unless_asked_and_end_where_the_task_says():
    (whole,) = complete(read().model, [[256, *b"ab"]], BYTES, max_new_tokens=8, sampling=GREEDY)
    stop = whole.text[3]
    found = until(read(), [("ab", dict(until=[stop], max_gen_toks=8)), ("ab", dict(max_gen_toks=8))])
    assert found == [whole.text[: whole.text.index(stop)], whole.text]
    drawn = until(read(), [("ab", dict(max_gen_toks=8, do_sample=True, temperature=1.0))] * 2)
    assert drawn[0] != drawn[1]  # two samples


def test_of_a_long_prompt_the_last_tokens_are_continued():
    prompt = "a prompt of more than sixteen bytes"
    (expected,) = complete(read().model, [list(prompt.encode())[-10:]], BYTES, max_new_tokens=6, sampling=GREEDY)
    assert until(read(), [(prompt, dict(max_gen_toks=6, until="\0"))]) == [expected.text]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(repetition_penalty=1.1), "generation_kwargs have repetition_penalty"),
        (dict(max_gen_toks=16), "max_gen_toks=16 leaves no room"),
    ],
)
def test_what_a_task_may_not_ask_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        until(read(), [("x", options)])


# --- our tasks --------------------------------------------------------------------------------------------------


def test_held_out_documents_are_the_texts_of_the_corpus():
    texts = {"train": ["x"], "validation": ["naïve", "日本 🙂", "c"]}
    assert list(documents(make_corpus({"one": texts}), "validation", "one")) == texts["validation"]


def test_questions_have_the_own_continuation_at_each_place_as_often_and_others_from_elsewhere():
    corpus = open_corpus()
    texts = list(documents(corpus, "validation", corpus.domains[0]))
    made = list(questions(texts))
    assert len(made) > 8
    for question in made:
        right = question["choices"].pop(question["gold"])
        assert any(question["context"] + right in text for text in texts)
        assert not any(question["context"] + wrong in text for wrong in question["choices"] for text in texts)
    places = np.bincount([question["gold"] for question in made], minlength=4)
    assert places.max() - places.min() <= 2


def test_of_fewer_than_four_passages_nothing_is_asked():
    assert list(questions(["x" * 2000, "short"])) == []


def test_without_the_harness_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r"pip install 'moe_jax\[lm-eval\]'"):
        harness.adapter()


# --- the harness itself -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `python -m moe_jax.harness` finds of both tasks, without a network; and the workdir."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    folder = tmp_path_factory.mktemp("harness")
    workdir = shutil.copytree(rig.uninterrupted(tmp_path_factory, rig.drill_config()) / "run", folder / "run")
    flags = [
        f"--workdir={workdir}",
        "--tasks=held_out,continuation",
        "--limit=6",
        "--max_length=64",
        f"--output={folder / 'found.json'}",
    ]
    offline = os.environ | dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(folder / "cache"))
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax.harness", *flags], capture_output=True, text=True, env=offline
    )
    assert done.returncode == 0, done.stderr
    return workdir, json.loads((folder / "found.json").read_text())


def test_the_harness_reports_the_bits_per_byte_that_we_compute(results):
    workdir, found = results
    ours = harness.reader(workdir, max_length=64)
    texts = [t for d in open_corpus().domains for t in documents(open_corpus(), "validation", d)][:6]
    bits = -sum(rolling(ours, texts)) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["held_out"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert 0 <= found["continuation"]["acc,none"] <= 1


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils", reason=NEEDS)
    for count in (1, 3, 4, 5, 13):
        theirs = utils.get_rolling_token_windows(list(range(count)), -1, 4, 1)
        ours = windows(list(range(count)), -1, 4)
        assert [(seen + targets[-1:], len(targets)) for seen, targets in theirs] == list(ours)
