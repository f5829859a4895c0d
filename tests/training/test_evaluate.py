"""Laws of evaluation: the whole held-out set once, an unchanged state, and numbers that can be checked by hand."""

import json
import math
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drills import rig
from state_hash import state_hash

from conftest import tiny_config
from moe_jax.analysis.results import report_saturation
from moe_jax.analysis.specialisation import store_ids
from moe_jax.analysis.survey import store_routing
from moe_jax.balance import measures
from moe_jax.data import evaluation_batches, make_corpus, open_corpus
from moe_jax.evaluate import config_of_run, run
from moe_jax.mesh import make_mesh
from moe_jax.runtime.log import read_jsonl
from moe_jax.training import compile
from moe_jax.training.compile import Evaluation
from moe_jax.training.evaluation import Totals, evaluate
from moe_jax.training.loop import run as train
from moe_jax.training.restore import on_these_devices
from moe_jax.training.state import init_state

CONFIG = rig.drill_config()
CORPUS = open_corpus()
SIZES = dict(batch_size=8, sequence_length=16, max_sequences_per_domain=4)


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

    def make(config, mesh, balancer=None):
        def eval_step(state, batch):
            tokens = batch.mask.sum(-1)
            row_loads = jnp.zeros((len(tokens), 2, 4), jnp.int32).at[:, :, 0].set(2 * tokens[:, None])
            return Evaluation(
                nats_of(batch).astype(jnp.float32), tokens, tokens, batch.domain, batch.num_bytes, row_loads
            )

        return eval_step

    return make


@pytest.mark.parametrize("batch_size", [8, 7])
def test_every_held_out_target_is_counted_exactly_once(monkeypatch, batch_size):
    # 1 nat per target: the loss is 1 if and only if every target is counted as often as it is divided by
    monkeypatch.setattr(compile, "make_eval_step", fake_step(lambda batch: batch.mask.sum(-1)))
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
    monkeypatch.setattr(compile, "make_eval_step", fake_step(lambda batch: batch.mask.sum(-1)))
    result = evaluate(CONFIG, None, CORPUS)
    assert result["eval/max_violation"] == result["eval/max_violation_worst"] == 3.0
    assert result["eval/dead_experts"] == 6


def spread_step(config, mesh, balancer=None):
    """An evaluation step in which sequences of even domains use expert 0 alone, of odd ones expert 1, top 1."""

    def eval_step(state, batch):
        tokens = batch.mask.sum(-1)
        expert = jax.nn.one_hot(batch.domain % 2, 4, dtype=jnp.int32)  # none for padding, whose tokens are 0 anyway
        row_loads = (tokens[:, None] * expert)[:, None].repeat(2, 1)
        decisions = tokens.sum() * jnp.ones(2, jnp.int32)
        nats = tokens.astype(jnp.float32)
        return Evaluation(nats, tokens, tokens, batch.domain, batch.num_bytes, row_loads, decisions // 4, decisions)

    return eval_step


def test_loads_are_counted_by_domain_and_by_sequence(monkeypatch):
    # four windows of each of four domains: half of all on expert 0, half on 1, so (T/2 - T/4) / (T/4) = 1 in all,
    # 3 within any domain or sequence; the expert identifies one of two halves: 1 bit
    monkeypatch.setattr(compile, "make_eval_step", spread_step)
    result = evaluate(CONFIG, None, CORPUS)
    assert result["eval/max_violation"] == 1.0
    assert result["eval/sequence_max_violation"] == 3.0
    assert result["eval/sequence_min_violation"] == -1.0 and result["eval/sequence_mean_violation"] == 1.5
    assert [result[f"eval/max_violation/{d}"] for d in CORPUS.domains] == [3.0] * 4
    assert result["eval/domain_information"] == pytest.approx(1.0, abs=1e-6)
    assert result["eval/dead_experts"] == 4 and result["eval/starved_experts"] == 0.5
    assert result["eval/bias_changed"] == 0.75


def test_the_floors_are_those_of_the_whole_set_and_of_a_sequence(monkeypatch):
    # 16 sequences of 16 tokens, one copy each
    monkeypatch.setattr(compile, "make_eval_step", spread_step)
    result = evaluate(CONFIG, None, CORPUS)
    assert result["eval/violation_floor"] == pytest.approx(float(measures.violation_floor(256, 1, 4)), rel=1e-6)
    of_a_domain = float(measures.violation_floor(64, 1, 4))  # four of the sequences
    assert result[f"eval/violation_floor/{CORPUS.domains[0]}"] == pytest.approx(of_a_domain, rel=1e-6)
    assert result["eval/sequence_violation_floor"] == pytest.approx(float(measures.violation_floor(16, 1, 4)), rel=1e-6)


def biased(state, bias):
    """The state with these biases in every layer."""
    return state._replace(bias=jax.tree.map(lambda b: jnp.broadcast_to(jnp.asarray(bias), b.shape), state.bias))


def test_a_bias_that_is_the_same_for_all_changes_no_decision(state):
    assert evaluate(CONFIG, biased(state, 0.0), CORPUS)["eval/bias_changed"] == 0.0
    assert evaluate(CONFIG, biased(state, 3.0), CORPUS)["eval/bias_changed"] == 0.0


def test_decisions_changed_by_the_bias_are_those_that_the_scores_alone_do_not_make(state):
    # with 9 on experts 0 and 1 all tokens choose them: every choice of another expert by the first layer is changed
    eval_step, batch = compile.make_eval_step(CONFIG), next(iter(evaluation_batches(CORPUS, **SIZES)))
    forced, free = (eval_step(biased(state, bias), batch) for bias in ([9.0, 9.0, 0.0, 0.0], [0.0] * 4))
    assert forced.loads[:, 2:].sum() == 0 < free.loads[0, 2:].sum()
    assert forced.chosen[0] - forced.kept[0] == free.loads[0, 2:].sum()


def test_a_model_without_a_bias_has_no_decisions_changed_by_it(state):
    config = rig.drill_config(balance=dict(aux_loss=dict(weight=1e-2)))
    assert "eval/bias_changed" not in evaluate(config, init_state(config), CORPUS)


def test_a_model_with_uniform_predictions_has_a_loss_of_log_v(state):
    # a head of zeros: every logit is 0, every token costs ln 264 nats = log2 264 bits
    uniform = state._replace(params=state.params | {"head": jnp.zeros_like(state.params["head"])})
    result = evaluate(CONFIG, uniform, CORPUS)
    assert result["eval/loss"] == pytest.approx(math.log(264), rel=1e-6)
    batches = list(evaluation_batches(CORPUS, **SIZES))
    tokens = sum(int(b.mask.sum()) for b in batches)
    num_bytes = sum(int(b.num_bytes.sum()) for b in batches)
    assert result["eval/bits_per_byte"] == pytest.approx(math.log2(264) * tokens / num_bytes, rel=1e-6)


def test_targets_that_are_not_trained_on_count_no_nats_and_no_bytes_but_are_routed(state):
    # 12[345]12[345]...: three of five bytes count, whatever they weigh; a head of zeros costs log2 264 bits each
    corpus = make_corpus({"one": {"train": ["x" * 99], "validation": ["12345" * 16]}})
    stream = corpus.stream("validation", "one")
    weights = np.float16([1, *[0, 0, 0.5, 3, 1] * 16])
    masked = replace(corpus, streams=dict(corpus.streams) | {("validation", "one"): replace(stream, weights=weights)})
    config = rig.drill_config(data=dict(eval_sequences=0))
    uniform = state._replace(params=state.params | {"head": jnp.zeros_like(state.params["head"])})
    plain, found = (evaluate(config, uniform, data) for data in (corpus, masked))
    assert found["eval/loss"] == pytest.approx(math.log(264), rel=1e-6)
    assert found["eval/bits_per_byte"] == pytest.approx(math.log2(264), rel=1e-6)
    nats = [name for name in plain if "loss" in name or "bits" in name]
    assert {**found, **dict.fromkeys(nats)} == {**plain, **dict.fromkeys(nats)}

    nothing = replace(stream, weights=np.zeros_like(weights))
    silent = replace(corpus, streams=dict(corpus.streams) | {("validation", "one"): nothing})
    assert evaluate(config, uniform, silent)["eval/loss"] == 0


def test_domains_average_to_the_total_by_bytes(state):
    result = evaluate(CONFIG, state, CORPUS)
    weights = dict.fromkeys(CORPUS.domains, 0)
    for batch in evaluation_batches(CORPUS, **SIZES):
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
    nats = compile.make_eval_step(config)(state, batch).nats
    assert result["eval/loss"] == pytest.approx(float(nats[:5].sum()) / 80, rel=1e-6)
    assert np.all(np.asarray(nats[5:]) == 0)


def test_the_command_prints_the_numbers_that_the_run_logged(uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted / "run", tmp_path / "run")
    command = rig.Command("moe_jax.evaluate", tmp_path / "log", f"--workdir={workdir}", "--eval_sequences=4")
    assert command.wait() == 0, command.text
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result.pop("step") == 20
    logged = read_jsonl(workdir / "metrics.jsonl")[-1]
    assert result == {k: v for k, v in logged.items() if k.startswith("eval/")}
    assert "bits_per_byte" in command.text


@pytest.fixture(scope="module")
def dissected(uninterrupted, tmp_path_factory):
    """A copy of the run, evaluated with everything; its routing was stored at init and at the end."""
    workdir = shutil.copytree(uninterrupted / "run", tmp_path_factory.mktemp("dissected") / "run")
    measured = rig.drill_config(measure_every=1)
    mesh = make_mesh(measured.mesh)
    for state in (init_state(measured, mesh), rig.restored(CONFIG, workdir)):
        store_routing(measured, state, CORPUS, mesh, workdir)
    run(CONFIG, workdir, specialisation=True, ablation=True)
    return workdir


def read(workdir, name):
    return json.loads((workdir / f"{name}.json").read_text())


def test_specialisation_is_written_for_every_layer_expert_and_domain(dissected):
    written = read(dissected, "specialisation")
    assert np.shape(written["relative_load"]) == (2, 4, len(CORPUS.domains))
    assert np.shape(written["coactivation"]) == (2, 4, 4)
    information = read(dissected, "evaluation")["eval/domain_information"]
    assert np.mean(written["domain_information"]) == pytest.approx(information, rel=1e-6)
    assert (dissected / "specialisation.png").read_bytes().startswith(b"\x89PNG")


def test_an_ablation_reports_the_loss_of_every_variant(dissected):
    written, whole = read(dissected, "ablation"), read(dissected, "evaluation")
    assert written.pop("as it is") == {key: whole[f"eval/{key}"] for key in ("loss", "bits_per_byte")}
    expected = ["without shared", "without shared, one routed more", "without the best 1", "without the best 2"]
    assert list(written) == expected
    # each variant is another model
    assert len({values["loss"] for values in written.values()} | {whole["eval/loss"]}) == 5


def test_routing_is_that_of_the_first_held_out_batch(dissected):
    stored = np.load(dissected / "routing" / "20.npy")
    state = rig.restored(CONFIG, dissected)
    loads = compile.make_eval_step(CONFIG)(state, evaluation_batches(CORPUS, **SIZES)[0]).loads
    assert stored.shape == (2, 8 * 16, 2)
    np.testing.assert_array_equal([np.bincount(layer.ravel(), minlength=4) for layer in stored], loads)


def test_saturation_is_reported_for_every_stored_step(dissected):
    written = read(dissected, "saturation")
    assert written["steps"] == [0, 20]
    then, now = (np.load(dissected / "routing" / f"{n}.npy") for n in (0, 20))
    shared = [[len(set(a) & set(b)) for a, b in zip(*layer, strict=True)] for layer in zip(then, now, strict=True)]
    np.testing.assert_allclose(written["saturation"], [np.mean(shared, axis=1) / 2, [1.0, 1.0]], rtol=1e-6)


def test_routing_is_not_stored_unless_the_run_measures(state, tmp_path):
    store_routing(CONFIG, state, CORPUS, make_mesh(CONFIG.mesh), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stored_its_routing_once_prints_what_is_missing(tmp_path, capsys):
    store_ids(tmp_path, 5, np.zeros((1, 2, 2), int), "same")
    report_saturation(CONFIG, tmp_path)
    assert "no router saturation: " in capsys.readouterr().out
    assert not (tmp_path / "saturation.json").exists()


@pytest.fixture(scope="module")
def run_of_somebody(tmp_path_factory):
    """A run of one step."""
    return rig.made_once(tmp_path_factory, "somebody", lambda folder: train(CONFIG, folder, stop_at=1, quiet=True))


def test_an_evaluation_that_cannot_be_kept_is_printed(run_of_somebody, tmp_path, capsys):
    workdir = shutil.copytree(run_of_somebody, tmp_path / "run")
    (workdir / "evaluation.json").mkdir()  # not even root can write a file there
    run(CONFIG, workdir)
    printed = capsys.readouterr().out
    assert "bits_per_byte" in printed
    assert f"{workdir / 'evaluation.json'} was not written" in printed
    assert not list(workdir.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(run_of_somebody, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    monkeypatch.setattr("moe_jax.training.restore.restore_model", lambda *_: None)
    with pytest.raises(ValueError, match="no finished checkpoint"):
        run(CONFIG, run_of_somebody)
    assert f"{run_of_somebody} cannot be written: results are printed, but not kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--specialisation writes into .* which cannot be written; copy the run"):
        run(CONFIG, run_of_somebody, specialisation=True)


# --- dropped copies -------------------------------------------------------------------------------------------


def test_evaluation_reports_the_share_of_copies_that_capacity_drops(state):
    # with a capacity of a tenth of the balanced load some tokens are dropped, and none without a limit
    rates = {}
    for factor in (0.1, 4.0):
        config = rig.drill_config(model=dict(dispatch="capacity", capacity_factor=factor))
        rates[factor] = evaluate(config, state, CORPUS)["eval/drop_rate"]
    assert 0.5 < rates[0.1] < 1.0
    assert rates[4.0] == 0.0
    assert "eval/drop_rate" not in evaluate(CONFIG, state, CORPUS)


def test_the_drop_rate_is_of_the_copies_of_every_layer(monkeypatch):
    # of 8 copies in each of two layers 1 and 3 are dropped, in each of two batches: (2/16 + 6/16) / 2 = 1/4
    totals = Totals(1, 4)
    for _ in range(2):
        loads = np.full((1, 2, 4), 2)
        tokens = np.full(1, 4)
        own = np.ones(1), tokens, tokens, np.zeros(1, int), np.ones(1, int), loads
        one = Evaluation(*own, dropped=np.array([1, 3]))
        totals.add(one)
    assert totals.balance(["a"])["eval/drop_rate"] == 0.25


def test_a_method_that_drops_reports_the_share_in_evaluation_too(state):
    config = rig.drill_config(balance=dict(device_capacity={}), model=dict(num_groups=2, top_groups=2))
    found = evaluate(config, init_state(config), CORPUS)
    assert 0.0 <= found["eval/drop_rate"] < 1.0


@pytest.mark.parametrize("flag", ["specialisation", "ablation"])
def test_flags_about_experts_are_refused_for_a_dense_model(flag, tmp_path):
    dense = rig.drill_config(model=dict(num_experts=0), balance={})
    with pytest.raises(ValueError, match=r"model\.num_experts=0 has none; leave --\w+ out"):
        run(dense, tmp_path, **{flag: True})


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json, so no run; give the workdir"):
        config_of_run(tmp_path)


def test_a_mesh_that_does_not_fit_becomes_the_largest_data_parallel_one_that_does():
    # 4 rows split over neither 8 nor 3 devices; every dropless dispatch computes the same as that of training
    config = on_these_devices(tiny_config(batch_size=4, mesh=dict(data=-1), model=dict(dispatch="ragged")))
    assert (config.mesh.data, config.model.dispatch) == (4, "auto")
    fits = tiny_config(mesh=dict(data=2, expert=4), model=dict(dispatch="capacity"))
    assert on_these_devices(fits) == fits
