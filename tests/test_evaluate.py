"""Laws of evaluation: the whole held-out set, once; nothing moves; numbers that can be checked by hand."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drills import rig

from conftest import tiny_config
from moe_jax import step
from moe_jax.checkpoint import state_hash
from moe_jax.data import evaluation_batches, make_corpus, open_corpus
from moe_jax.evaluate import config_of_run, evaluate, on_these_devices
from moe_jax.log import read_jsonl
from moe_jax.state import init_state
from moe_jax.step import Evaluation

CONFIG = rig.drill_config()
CORPUS = open_corpus()


@pytest.fixture(scope="module")
def state():
    return init_state(CONFIG)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A finished run of the command: a folder with `run` and `config.py`."""
    return rig.uninterrupted(tmp_path_factory, rig.drill_config())


def held_out():
    """domain -> (targets, UTF-8 bytes): every token of a stream but the first is a target; separators have 0 bytes."""
    totals = {}
    for domain in CORPUS.domains:
        stream = CORPUS.stream("validation", domain)
        targets = stream.num_tokens - 1
        totals[domain] = (targets, stream.num_tokens - stream.num_documents)  # a byte is a token
    return totals


def test_evaluation_moves_nothing(state):
    before = state_hash(state)
    evaluate(CONFIG, state, CORPUS)
    assert state_hash(state) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_evaluation_gives_the_same_numbers_twice(state):
    assert evaluate(CONFIG, state, CORPUS) == evaluate(CONFIG, state, CORPUS)


def fake_step(nats_of):
    """An evaluation step that charges each row `nats_of(batch)` and sends every token to expert 0."""

    def make(config, mesh):
        def eval_step(state, batch):
            tokens = batch.mask.sum(-1)
            loads = jnp.zeros((2, 4), jnp.int32).at[:, 0].set(2 * tokens.sum())
            return Evaluation(nats_of(batch).astype(jnp.float32), tokens, batch.domain, batch.num_bytes, loads)

        return eval_step

    return make


@pytest.mark.parametrize("batch_size", [8, 7])
def test_every_held_out_target_is_counted_exactly_once(monkeypatch, batch_size):
    # 1 nat per target: the loss is 1 if and only if every target is counted as often as it is divided by
    monkeypatch.setattr(step, "make_eval_step", fake_step(lambda batch: batch.mask.sum(-1)))
    config = rig.drill_config(data=dict(eval_sequences=0), batch_size=batch_size)
    result = evaluate(config, None, CORPUS)
    targets = sum(t for t, _ in held_out().values())
    num_bytes = sum(b for _, b in held_out().values())
    assert result["eval/loss"] == 1.0
    assert result["eval/bits_per_byte"] == pytest.approx(targets / (math.log(2) * num_bytes), rel=1e-12)
    for domain, (t, b) in held_out().items():
        assert result[f"eval/bits_per_byte/{domain}"] == pytest.approx(t / (math.log(2) * b), rel=1e-12)


def test_the_bytes_are_those_of_the_text():
    tokenizer = CORPUS.tokenizer
    for domain, (_, num_bytes) in held_out().items():
        stream = CORPUS.stream("validation", domain)
        text = stream.tokens[stream.tokens != tokenizer.separator]
        assert len(tokenizer.decode(text).encode()) == num_bytes


def test_loads_are_summed_over_the_whole_set(monkeypatch):
    # all on one of 4 experts: (max - mean) / mean = 3, and 3 dead experts in each of 2 layers
    monkeypatch.setattr(step, "make_eval_step", fake_step(lambda batch: batch.mask.sum(-1)))
    result = evaluate(CONFIG, None, CORPUS)
    assert result["eval/max_violation"] == result["eval/max_violation_worst"] == 3.0
    assert result["eval/dead_experts"] == 6


def test_a_model_that_knows_nothing_pays_log_v_for_every_token(state):
    # a head of zeros: every logit is 0, every token costs ln 264 nats = log2 264 bits
    uniform = state._replace(params=state.params | {"head": jnp.zeros_like(state.params["head"])})
    result = evaluate(CONFIG, uniform, CORPUS)
    assert result["eval/loss"] == pytest.approx(math.log(264), rel=1e-6)
    batches = list(evaluation_batches(CORPUS, batch_size=8, sequence_length=16, max_sequences_per_domain=4))
    tokens = sum(int(b.mask.sum()) for b in batches)
    num_bytes = sum(int(b.num_bytes.sum()) for b in batches)
    assert result["eval/bits_per_byte"] == pytest.approx(math.log2(264) * tokens / num_bytes, rel=1e-6)


def test_domains_average_to_the_total_by_bytes(state):
    result = evaluate(CONFIG, state, CORPUS)
    weights = dict.fromkeys(CORPUS.domains, 0)
    for batch in evaluation_batches(CORPUS, batch_size=8, sequence_length=16, max_sequences_per_domain=4):
        for domain, n in zip(batch.domain, batch.num_bytes, strict=True):
            if domain >= 0:
                weights[CORPUS.domains[domain]] += int(n)
    bits = sum(result[f"eval/bits_per_byte/{d}"] * n for d, n in weights.items())
    assert result["eval/bits_per_byte"] == pytest.approx(bits / sum(weights.values()), rel=1e-12)


def test_padding_rows_change_nothing(state):
    # 5 windows in batches of 8: the three rows of padding must not count
    corpus = make_corpus({"one": {"train": ["x" * 99], "validation": ["abcdefgh" * 10]}})
    config = rig.drill_config(data=dict(eval_sequences=0))
    result = evaluate(config, state, corpus)
    (batch,) = evaluation_batches(corpus, batch_size=8, sequence_length=16)
    assert (batch.domain >= 0).sum() == 5
    nats = step.make_eval_step(config)(state, batch).nats
    assert result["eval/loss"] == pytest.approx(float(nats[:5].sum()) / 80, rel=1e-6)
    assert np.all(np.asarray(nats[5:]) == 0)


def test_the_command_gives_the_numbers_that_the_run_logged(uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted / "run", tmp_path / "run")
    command = rig.Command("moe_jax.evaluate", tmp_path / "log", f"--workdir={workdir}", "--eval_sequences=4")
    assert command.wait() == 0, command.text
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result.pop("step") == 20
    logged = read_jsonl(workdir / "metrics.jsonl")[-1]
    assert result == {k: v for k, v in logged.items() if k.startswith("eval/")}
    assert "bits_per_byte" in command.text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json, so no run; give the workdir"):
        config_of_run(tmp_path)


def test_a_mesh_that_does_not_fit_here_becomes_the_largest_data_parallel_one_that_does():
    # 4 rows do not split over 8 devices, and 3 neither; a dropless exchange is the same whatever it was trained with
    config = on_these_devices(tiny_config(batch_size=4, mesh=dict(data=-1), model=dict(dispatch="ragged")))
    assert (config.mesh.data, config.model.dispatch) == (4, "auto")
    fits = tiny_config(mesh=dict(data=2, expert=4), model=dict(dispatch="capacity"))
    assert on_these_devices(fits) == fits
