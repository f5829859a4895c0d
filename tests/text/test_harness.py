"""Laws of the adapter for the lm-evaluation-harness: every token once, likelihoods of the model, texts as asked."""

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import vocabularies
from absl import flags
from drills import rig

from conftest import tiny_config
from moe_jax import harness
from moe_jax.data import ByteTokenizer, documents, evaluation_batches, get_tokenizer, make_corpus, open_corpus
from moe_jax.data.prepare import Options, prepare
from moe_jax.text import answers, lm_eval
from moe_jax.text.answers import Reader, check, likelihoods, pair, rolling, until, windows
from moe_jax.text.decoding import complete, score
from moe_jax.text.model import Model
from moe_jax.text.sampling import Sampling
from moe_jax.text.tasks.documents import continuation, questions
from moe_jax.training.compile import make_eval_step
from moe_jax.training.state import init_state

BYTES = ByteTokenizer()
CONFIG = tiny_config(model=dict(init_std=0.2))
NEEDS = "needs the harness, 59 packages: pip install 'moe_jax[lm-eval]'"


@functools.cache
def read(vocab_size=CONFIG.model.vocab_size, **changes):
    def model():
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=vocab_size))
        state = init_state(config)
        return Model(config, state.params, state.bias, state.balance)

    return Reader(**(dict(restore=model, tokenizer=BYTES, opened=True, max_length=16, batch_size=4) | changes))


KINDS = {
    "byte_level": vocabularies.byte_level,
    "with_fallback": vocabularies.with_fallback,
    "with_metaspace": vocabularies.with_metaspace,
    "unigram": vocabularies.unigram,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """kind -> tokenizer: bytes, and vocabularies that have learnt the words of the embedded held-out documents."""
    texts = [text for domain in open_corpus().domains for text in documents(open_corpus(), "validation", domain)]
    found = {"bytes": BYTES}
    for kind, make in KINDS.items():
        inner = make() if kind == "unigram" else make(texts, 2000)
        end = "<|end|>" if kind == "byte_level" else "</s>"
        folder = vocabularies.write(
            tmp_path_factory.mktemp(kind), inner, config=dict(eos_token_id=inner.token_to_id(end))
        )
        found[kind] = get_tokenizer(str(folder))
    return found


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
    found = likelihoods(read(), [(context, continuation), (context, [best])])
    assert found[0] == (pytest.approx(logs[-5:].sum(), rel=1e-5), bool(likeliest[-5:].all()))
    assert found[1][1] is True


GREEDY = Sampling(temperature=0)
SEAMS = [
    ("It is a tr", "uth"),
    ("wor", "ld"),
    ("Ans", "wer"),
    ("it ", "is"),
    (" ", "the"),
    ("", "the"),
    ("日", "本"),
    ("a", " b c"),
]


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(("context", "continuation"), SEAMS)
def test_a_continuation_that_merges_with_its_context_is_scored_whole(tokenizers, kind, opened, context, continuation):
    # EleutherAI/lm-evaluation-harness#4055: cut behind as many ids as the context has, nothing of it may be left
    tokenizer = tokenizers[kind]
    seen, new = pair(read(tokenizer=tokenizer, opened=opened), context, continuation)
    whole = tokenizer.encode(context + continuation).tolist()
    assert seen + new in ([tokenizer.separator, *whole], whole)  # as the model would read both together
    assert tokenizer.to_bytes(new).endswith(continuation.encode())
    before = tokenizer.to_bytes(seen)
    assert context.encode().startswith(
        before[tokenizer.lead(seen) :]
    )  # what is seen is the context's, not the answer's


def test_a_seam_that_a_token_spans_costs_as_much_as_that_token(tokenizers):
    ours = read(512 * 8, tokenizer=tokenizers["byte_level"])
    assert [len(ours.tokenizer.encode(text)) for text in ("the wor", "the world")] == [2, 2]  # a token " world"
    (found,) = likelihoods(ours, [pair(ours, "the wor", "ld")])
    logs, likeliest = score(ours.model, [[ours.tokenizer.separator, *ours.tokenizer.encode("the world").tolist()]])[0]
    assert found == (pytest.approx(logs[-1], rel=1e-5), bool(likeliest[-1])) and found[0] < 0


def request(kind, *arguments, task="a task", document=3):
    """A request as the harness makes it."""
    return SimpleNamespace(request_type=kind, args=arguments, task_name=task, doc_id=document)


def test_a_continuation_without_a_token_of_its_own_is_refused_by_the_names_of_task_and_document(tokenizers):
    for ours in (read(), read(tokenizer=tokenizers["with_metaspace"])):
        for context in ("x", "", "x "):
            with pytest.raises(ValueError, match=r"a task \(document 3\): the continuation '' adds no token"):
                check(ours, [request("loglikelihood", "a", "b"), request("loglikelihood", context, "")])


def test_of_a_long_context_the_last_tokens_are_seen():
    context, continuation = [256, *b"a context of twenty and more"], list(b"end")
    seen = (context + continuation)[-17:]
    (found,) = likelihoods(read(), [(context, continuation)])
    assert found[0] == pytest.approx(logs_of(seen)[0][-3:].sum(), rel=1e-5)
    with pytest.raises(ValueError, match="a continuation has 17 tokens, more than the 16"):
        pair(read(), "a", "b" * 17)


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


def test_without_a_prompt_the_text_begins_behind_the_separator():
    (expected,) = complete(read().model, [[256]], BYTES, max_new_tokens=6, sampling=GREEDY)
    assert until(read(opened=False), [("", dict(max_gen_toks=6))]) == [expected.text]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(repetition_penalty=1.1), "generation_kwargs have repetition_penalty"),
        (dict(max_gen_toks=16), "max_gen_toks=16 leaves no room for a prompt"),
        (dict(max_gen_toks=0), "max_gen_toks=0 leaves no room for a text"),
        (dict(do_sample=True, top_p=1.5), "generation_kwargs: top_p=1.5 must be above 0 and at most 1"),
        (dict(top_k="many"), "generation_kwargs: invalid literal .* 'many'"),
    ],
)
def test_what_a_task_may_not_ask_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        until(read(), [("x", options)])


def test_all_tasks_that_cannot_be_answered_are_named_at_once_and_no_model_is_needed_for_it():
    requests = [
        request("loglikelihood_rolling", "text", task="fine"),
        request("loglikelihood", "a", "b", task="fine, too"),
        request("generate_until", "a", dict(until="x"), task="and this"),
        request("generate_until", "a", dict(num_beams=1), task="beams"),
        request("generate_until", "a", dict(max_gen_toks=32768), task="long"),
        request("loglikelihood", "a", "b" * 17, task="longer"),
    ]
    nobody = read(restore=lambda: pytest.fail("a model was restored"))
    check(nobody, requests[:3])
    with pytest.raises(ValueError, match="beams") as raised:
        check(nobody, requests)
    assert "beams (document 3): the task's generation_kwargs have num_beams" in str(raised.value)
    assert "long (document 3): max_gen_toks=32768 leaves no room for a prompt" in str(raised.value)
    assert str(raised.value).endswith("; leave out beams, long, longer, or correct what is named.")


# --- our tasks --------------------------------------------------------------------------------------------------


def test_held_out_documents_are_the_texts_of_the_corpus():
    texts = {"train": ["x"], "validation": ["naïve", "日本 🙂", "c"]}
    assert list(documents(make_corpus({"one": texts}), "validation", "one")) == texts["validation"]


def questions_of(corpus, domain):
    return list(questions(documents(corpus, "validation", domain)))


def test_questions_have_the_own_continuation_at_each_place_as_often_and_others_from_elsewhere():
    corpus = open_corpus()
    texts = list(documents(corpus, "validation", corpus.domains[0]))
    made = questions_of(corpus, corpus.domains[0])
    assert len(made) > 8
    for question in made:
        right, others = question["choices"][question["gold"]], set(question["choices"])
        assert any(question["context"] + right in text for text in texts)
        assert not any(question["context"] + wrong in text for wrong in others - {right} for text in texts)
    assert len(set(np.bincount([question["gold"] for question in made], minlength=4))) == 1


def test_passages_and_their_choices_are_whole_words():
    corpus = open_corpus()
    texts = [text for domain in corpus.domains for text in documents(corpus, "validation", domain)]
    for question in [question for domain in corpus.domains for question in questions_of(corpus, domain)]:
        context, right = question["context"], question["choices"][question["gold"]]
        text = next(text for text in texts if context + right in text)
        start = text.index(context + right)
        end = start + len(context + right)
        assert start == 0 or (text[start - 1] == " " and not context[0].isspace())
        assert right[0] == " " and not right[1].isspace() and not context[-1].isspace()
        assert text[end] == " " and not right[-1].isspace()
        assert len(context) >= 80 and len(right) >= 40


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
@pytest.mark.parametrize("mean", [False, True])
def test_a_model_that_knows_nothing_is_right_in_a_quarter_of_the_continuations(tokenizers, kind, mean):
    # each token costs a uniform model as much, so the choice of fewest tokens (a character) wins; ties count in parts
    corpus, hits, count = open_corpus(), 0.0, 0
    ours = read(tokenizer=tokenizers[kind])
    ours = dataclasses.replace(ours, max_length=1000)
    for question in [question for domain in corpus.domains for question in questions_of(corpus, domain)]:
        choices = question["choices"]
        costs = np.array([len(pair(ours, question["context"], one)[1]) / (len(one) if mean else 1) for one in choices])
        best = np.flatnonzero(costs == costs.min())
        hits, count = hits + (question["gold"] in best) / len(best), count + 1
    assert count > 200 and hits == pytest.approx(count / 4)


def test_of_fewer_than_four_passages_nothing_is_asked(tmp_path):
    words = "some words " * 40
    assert list(questions([words, words[:100]])) == []
    assert len(list(questions([f"{n} {words}" for n in range(9)]))) == 0  # equal choices
    assert len(list(questions([" ".join(str(n * 90 + k) for k in range(90)) for n in range(9)]))) == 8


def test_a_corpus_without_enough_passages_is_refused_by_name(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.txt").write_text("日本語" * 100)
    prepare(Options(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"continuation needs 4 passages .* data.path='{tmp_path}/out' has fewer"):
        continuation(str(tmp_path / "out"))


def test_without_the_harness_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r"pip install 'moe_jax\[lm-eval\]'"):
        lm_eval.adapter.__wrapped__()


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
    ours = answers.open_reader(workdir, max_length=64)
    texts = [t for d in open_corpus().domains for t in documents(open_corpus(), "validation", d)][:6]
    bits = -sum(rolling(ours, texts)) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["held_out"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert 0 <= found["continuation"]["acc,none"] <= 1


TASK = """task: {name}
custom_dataset: !function rows.{rows}
output_type: {kind}
test_split: test
doc_to_text: question
doc_to_target: {target}
{more}
metric_list: [{{metric: {metric}}}]
"""
ROWS = """from datasets import Dataset


def rows(**_):
    return dict(test=Dataset.from_list([dict(question="the ca", answer="t", choices=["t", "r"], gold=0)]))


def then_empty(**_):
    later = dict(question="the ca", answer="t", choices=["t", ""], gold=0)
    return dict(test=Dataset.from_list([rows()["test"][0], later]))


def empty(**_):
    return dict(test=then_empty()["test"].select([1]))
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with tasks: `fine`, and others of which each asks for what cannot be."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.py").write_text(ROWS)
    likelihood = dict(kind="loglikelihood", target="answer", metric="acc", more="")
    text = dict(kind="generate_until", target="answer", metric="exact_match")
    choice = dict(
        kind="multiple_choice", target="gold", metric="acc", more='doc_to_choice: choices\ntarget_delimiter: ""'
    )
    for name, options in {
        "fine": likelihood,
        "beams": text | dict(more="generation_kwargs: {until: [x], num_beams: 1}"),
        "long": text | dict(more="generation_kwargs: {until: [x], max_gen_toks: 32768}"),
        "empty": choice | dict(rows="empty"),
        "then_empty": choice | dict(rows="then_empty"),
    }.items():
        options = dict(rows="rows") | options
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, **options))
    return folder


def flags_of(**values):
    found = flags.FlagValues()
    harness.define_flags(found)
    found(["harness", *(f"--{name}={value}" for name, value in values.items())])
    return found


def test_a_task_that_cannot_be_answered_is_refused_before_anything_is_computed(results, tasks, tmp_path):
    workdir = shutil.copytree(results[0], tmp_path / "run")
    for file in rig.data_files(workdir / "checkpoints"):
        rig.flip_bit(file, 0)  # so a model that was restored would be another error
    with pytest.raises(ValueError, match="beams") as raised:
        harness.run(flags_of(workdir=workdir, tasks="fine,beams,long,then_empty", include_path=tasks))
    problem = str(raised.value)
    assert "beams (document 0): the task's generation_kwargs have num_beams" in problem
    assert "long (document 0): max_gen_toks=32768" in problem
    assert "then_empty (document 1): the continuation '' adds no token" in problem
    assert problem.endswith("leave out beams, long, then_empty, or correct what is named.")
    with pytest.raises(ValueError, match="the task empty has no document, or one with an empty choice"):
        harness.run(flags_of(workdir=workdir, tasks="fine,empty", include_path=tasks))


def test_results_are_written_before_they_are_printed(results, tasks, tmp_path):
    command = [sys.executable, "-m", "moe_jax.harness", f"--workdir={results[0]}", f"--include_path={tasks}"]
    output = ["--tasks=fine", f"--output={tmp_path / 'found.json'}"]
    with open("/dev/full", "w") as full:
        environment = os.environ | dict(PYTHONUNBUFFERED="1")
        done = subprocess.run([*command, *output], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert "fine" in json.loads((tmp_path / "found.json").read_text())


@pytest.mark.parametrize("name", ["limit", "num_fewshot", "bootstrap", "max_length"])
def test_a_negative_number_is_refused_before_the_model_is_restored(results, name):
    with pytest.raises(ValueError, match=f"--{name}=-1 must be at least 0"):
        harness.run(flags_of(workdir=results[0], **{name: -1}))


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils", reason=NEEDS)
    for count in (1, 3, 4, 5, 13):
        theirs = utils.get_rolling_token_windows(list(range(count)), -1, 4, 1)
        ours = windows(list(range(count)), -1, 4)
        assert [(seen + targets[-1:], len(targets)) for seen, targets in theirs] == list(ours)
