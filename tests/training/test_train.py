"""Reliability of a training run: stops, kills and signals change no number of its curve."""

import gzip
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies
from drills import rig
from state_hash import state_hash

from moe_jax import data
from moe_jax.analysis.observer import observers
from moe_jax.data import ByteTokenizer, get_tokenizer, open_corpus, prepare, token_frequencies, training_batches
from moe_jax.mesh import make_mesh
from moe_jax.model.cost import train_flops
from moe_jax.runtime.checkpoint import committed, restore
from moe_jax.runtime.display import Display
from moe_jax.runtime.log import read_jsonl
from moe_jax.runtime.signals import ENDING
from moe_jax.runtime.workdir import versions
from moe_jax.training import compile, step
from moe_jax.training.compile import make_train_step
from moe_jax.training.loop import run
from moe_jax.training.start import start
from moe_jax.training.state import abstract_state, init_state, step_key
from moe_jax.training.tokenizer import carry_tokenizer

CONFIG = rig.drill_config()


# --- resuming -------------------------------------------------------------------------------------------------


def digest(batch):
    return hashlib.sha256(np.asarray(batch.tokens).tobytes() + np.asarray(batch.targets).tobytes()).hexdigest()


def test_every_batch_is_trained_on_exactly_once_over_crashes(tmp_path, monkeypatch):
    consumed = {}
    crashes = [3, 8, 9, 16]

    def make(config, mesh=None):
        def train_step(state, batch, key):
            n = int(state.step)
            if crashes and n == crashes[0]:
                crashes.pop(0)
                raise RuntimeError("crash")
            consumed[n] = digest(batch)
            return real(config, mesh)(state, batch, key)

        return train_step

    real = compile.make_train_step
    monkeypatch.setattr(compile, "make_train_step", make)
    while crashes:
        with pytest.raises(RuntimeError, match="crash"):
            run(CONFIG, tmp_path, quiet=True)
    run(CONFIG, tmp_path, quiet=True)
    batch_at = training_batches(open_corpus(), seed=0, batch_size=8, sequence_length=16)
    batches = [batch_at(n) for n in range(20)]
    expected = [digest(b) for b in batches]
    assert [consumed[n] for n in sorted(consumed)] == expected
    tokens = np.cumsum([int(b.mask.sum()) for b in batches])
    assert [r["tokens_seen"] for r in rig.curve(tmp_path)] == list(tokens)


def test_a_finished_run_is_left_unchanged(tmp_path):
    run(CONFIG, tmp_path, quiet=True)
    before, curve = rig.final_hash(CONFIG, tmp_path), rig.curve(tmp_path)
    outcome = run(CONFIG, tmp_path, quiet=True)
    assert outcome.step == 20
    assert (rig.final_hash(CONFIG, tmp_path), rig.curve(tmp_path)) == (before, curve)


def test_stop_at_an_earlier_step_than_is_done_trains_nothing(tmp_path):
    run(CONFIG, tmp_path, stop_at=7, quiet=True)
    assert run(CONFIG, tmp_path, stop_at=3, quiet=True).step == 7
    assert rig.steps_logged(tmp_path) == 7


def test_a_run_and_its_continuation_compile_once(tmp_path):
    compile._train_step.cache_clear()  # a train step that no other test has called
    run(CONFIG, tmp_path, stop_at=4, quiet=True)
    run(CONFIG, tmp_path, stop_at=8, quiet=True)
    assert make_train_step(CONFIG, make_mesh(CONFIG.mesh))._cache_size() == 1


def test_seeds_share_one_train_step():
    assert make_train_step(CONFIG) is make_train_step(rig.drill_config(seed=5, save_every=3, log_every=2))


def test_a_resumed_step_counts_like_the_first(tmp_path):
    # bias_sign moves each bias by 0.01 a step: after n steps no bias is beyond n x 0.01
    run(CONFIG, tmp_path, stop_at=3, quiet=True)
    run(CONFIG, tmp_path, stop_at=6, quiet=True)
    for n, record in enumerate(rig.layers(tmp_path)):
        assert np.abs(record["bias"]).max() <= (n + 1) * 0.01 + 1e-6


def test_a_run_restores_the_signal_handlers(tmp_path):
    before = [signal.getsignal(number) for number in ENDING]
    run(CONFIG, tmp_path, stop_at=1, quiet=True)
    assert [signal.getsignal(number) for number in ENDING] == before


# --- steps that are not finite --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_batch():
    return training_batches(open_corpus(), seed=0, batch_size=8, sequence_length=16)(0)


def spoiled(state, batch, value):
    row = int(batch.tokens[0, 3])
    return state._replace(params=state.params | {"embedding": state.params["embedding"].at[row].set(value)})


def exploding(state):
    """The head is 0, so the loss is log V exactly; its gradient is the last layer's output, times 1e25."""
    head = jnp.zeros_like(state.params["head"])
    scale = jnp.full_like(state.params["final_norm"]["scale"], 1e25)
    return state._replace(params=state.params | {"head": head, "final_norm": {"scale": scale}})


def what_may_not_move(state):
    return state_hash({k: getattr(state, k) for k in ("params", "optimizer", "bias", "balance")})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_loss_moves_nothing_but_the_counters(first_batch, value):
    state = spoiled(init_state(CONFIG), first_batch, value)
    before = what_may_not_move(state)
    after, values = make_train_step(CONFIG)(state, first_batch, step_key(CONFIG))
    assert not np.isfinite(values["loss"])
    assert what_may_not_move(after) == before
    assert (int(after.step), int(after.skipped), int(after.stuck)) == (1, 1, 1)


def test_a_non_finite_gradient_of_a_finite_loss_moves_nothing_but_the_counters(first_batch):
    state = exploding(init_state(CONFIG))
    before = what_may_not_move(state)
    after, values = make_train_step(CONFIG)(state, first_batch, step_key(CONFIG))
    assert float(values["loss"]) == pytest.approx(np.log(264), rel=1e-6)
    assert not np.isfinite(values["grad_norm"])
    assert what_may_not_move(after) == before
    assert (int(after.step), int(after.skipped), int(after.stuck)) == (1, 1, 1)


def test_the_step_after_a_skipped_one_is_normal(first_batch):
    clean = init_state(CONFIG)
    embedding = np.array(clean.params["embedding"])
    train_step, key = make_train_step(CONFIG), step_key(CONFIG)
    after, _ = train_step(spoiled(clean, first_batch, float("nan")), first_batch, key)
    after = after._replace(params=after.params | {"embedding": jnp.asarray(embedding)})
    after, values = train_step(after, first_batch, key)
    assert np.isfinite(values["loss"])
    assert (int(after.step), int(after.skipped), int(after.stuck)) == (2, 1, 0)
    assert np.abs(np.asarray(after.params["embedding"]) - embedding).max() > 0


def test_a_skipped_step_is_logged_as_null_and_counted(first_batch, tmp_path, monkeypatch):
    real = compile.make_train_step

    def make(config, mesh=None):
        def train_step(state, batch, key):
            if int(state.step) != 2:
                return real(config, mesh)(state, batch, key)
            embedding = jnp.copy(state.params["embedding"])
            state, values = real(config, mesh)(spoiled(state, batch, float("nan")), batch, key)
            return state._replace(params=state.params | {"embedding": embedding}), values

        return train_step

    monkeypatch.setattr(compile, "make_train_step", make)
    run(CONFIG, tmp_path, stop_at=5, quiet=True)
    records = rig.curve(tmp_path)
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1]
    assert [r["loss"] is None for r in records] == [False, False, True, False, False]
    assert records[2]["moe/bias_range"] == records[1]["moe/bias_range"]


def test_the_non_finite_tensor_is_named_even_if_only_the_norm_overflowed(first_batch):
    state = exploding(init_state(CONFIG))
    assert "gradient" in step.first_non_finite(CONFIG, state, first_batch)


# --- the workdir belongs to one run and one process -----------------------------------------------------------


HOLD = """
import sys
from pathlib import Path
from moe_jax.runtime.workdir import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_workdir_in_use_by_another_process_is_refused(tmp_path):
    arguments = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(arguments, cwd=rig.REPO, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="in use by another process; wait for it"):
            run(CONFIG, tmp_path, quiet=True)
        other.kill()  # a killed process no longer holds the lock
        other.wait()
        assert run(CONFIG, tmp_path, stop_at=1, quiet=True).step == 1


def test_a_workdir_of_another_config_is_refused_with_the_difference_and_unchanged(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    other = rig.drill_config(optimizer=dict(learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.001 -> 0\.002"):
        run(other, tmp_path, quiet=True)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_a_longer_run_is_another_config(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    with pytest.raises(ValueError, match="num_steps: 20 -> 30"):
        run(rig.drill_config(num_steps=30), tmp_path, quiet=True)


def test_the_save_interval_may_change_when_a_run_is_resumed(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    config = rig.drill_config(save_every=2, checkpoint=dict(keep=5))
    run(config, tmp_path, stop_at=6, quiet=True)
    assert committed(tmp_path / "checkpoints") == [2, 4, 6]


def test_a_checkpoint_of_another_config_is_refused_if_config_json_is_lost(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    (tmp_path / "config.json").unlink()
    other = rig.drill_config(optimizer=dict(learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"holds a checkpoint of another config.*\n.*learning_rate: 0\.001 -> 0\.002"):
        run(other, tmp_path, quiet=True)
    assert not (tmp_path / "config.json").exists()
    assert run(CONFIG, tmp_path, stop_at=3, quiet=True).step == 3


def test_a_refused_checkpoint_does_not_claim_the_workdir_for_the_wrong_config(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds another state"):
        run(rig.drill_config(model=dict(num_layers=4)), tmp_path, quiet=True)
    assert run(CONFIG, tmp_path, stop_at=3, quiet=True).step == 3


# --- starting from another run's weights ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir whose bias has moved."""
    workdir = tmp_path_factory.mktemp("trained")
    run(CONFIG, workdir, stop_at=4, quiet=True)
    return workdir


@pytest.mark.parametrize("balance", [rig.BALANCE, dict(aux_loss=dict(weight=1e-2)), dict(hash={}), {}])
def test_a_run_from_other_weights_takes_only_their_parameters_and_bias(trained, tmp_path, balance):
    config = rig.drill_config(init_from=str(trained), balance=balance)
    mesh = make_mesh(config.mesh)
    state = start(config, mesh, tmp_path, open_corpus()).state
    there = restore(trained / "checkpoints", abstract_state(CONFIG, mesh))[0]
    fresh = start(replace(config, init_from=""), mesh, tmp_path, open_corpus()).state
    for name in ("params", "bias"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(there, name))
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, fresh.optimizer)
    assert int(state.step) == 0 and any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.bias))


def test_a_run_from_other_weights_resumes_from_its_own_checkpoint(trained, tmp_path):
    config = rig.drill_config(init_from=str(trained))
    run(config, tmp_path, stop_at=2, quiet=True)
    assert run(config, tmp_path, stop_at=3, quiet=True).step == 3  # the checkpoint of init_from has no step 2
    first = read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"]
    assert first < read_jsonl(trained / "metrics.jsonl")[0]["loss"] - 0.01


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(init_from="nowhere"), "init_from='nowhere' has no finished checkpoint"),
        (dict(model=dict(num_layers=4)), "holds another state"),
        (dict(balance=dict(bias_multiplicative={})), "a bias that is added to scores"),
    ],
)
def test_weights_that_do_not_fit_are_refused(trained, tmp_path, overrides, words):
    config = rig.drill_config(**(dict(init_from=str(trained)) | overrides))
    with pytest.raises(ValueError, match=words):
        start(config, make_mesh(config.mesh), tmp_path, open_corpus())


@pytest.mark.parametrize("same", [True, False])
def test_the_tokenizer_of_the_weights_is_copied_if_the_corpus_uses_it(tmp_path, same):
    (tmp_path / "from" / "tokenizer").mkdir(parents=True)
    (tmp_path / "from" / "tokenizer" / "tokenizer.json").write_text("{}")
    trained = SimpleNamespace(name="BPE " + hashlib.sha256(b"{}").hexdigest()[:16])
    corpus = SimpleNamespace(tokenizer=trained if same else ByteTokenizer())
    config, workdir = rig.drill_config(init_from=str(tmp_path / "from")), tmp_path / "to"
    workdir.mkdir()
    said = carry_tokenizer(config, workdir, corpus)
    assert (workdir / "tokenizer" / "tokenizer.json").is_file() == same
    assert said == [] if same else "another tokenizer than 'bytes'" in said[0]


def test_weights_with_another_tokenizer_get_that_of_the_corpus(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "the cat"}\n{"text": "the hat"}\n')
    folder = vocabularies.write(tmp_path / "v", vocabularies.byte_level(), tokenizer_config=dict(eos_token="<|end|>"))
    prepare.prepare(prepare.Options(tmp_path / "text", tmp_path / "corpus", tokenizer=str(folder)))
    vocabularies.write(tmp_path / "from" / "tokenizer", vocabularies.with_fallback())
    config = rig.drill_config(init_from=str(tmp_path / "from"), data=dict(path=str(tmp_path / "corpus")))
    (tmp_path / "to").mkdir()
    (said,) = carry_tokenizer(config, tmp_path / "to", open_corpus(str(tmp_path / "corpus")))
    assert "another tokenizer than" in said
    kept, given = (get_tokenizer(str(path)) for path in (tmp_path / "to" / "tokenizer", folder))
    assert (kept.name, kept.ends) == (given.name, given.ends)
    assert kept.opens_text and not given.opens_text  # in training every document is opened


def test_weights_of_a_model_with_the_same_shapes_and_other_numbers_are_reported(trained, tmp_path):
    same = rig.drill_config(init_from=str(trained), model=dict(remat="full"))
    other = rig.drill_config(init_from=str(trained), model=dict(gate_scale=2.5))
    said = [start(c, make_mesh(c.mesh), tmp_path, open_corpus()).remarks for c in (same, other)]
    assert not any("another model" in line for line in said[0])
    assert "gate_scale: 1.0 -> 2.5" in said[1][0]


def test_a_run_of_a_clone_has_its_revision(repo):
    if not shutil.which("git") or not (repo / ".git").exists():
        pytest.skip("this is no clone")
    assert versions()["git"]


def test_a_run_does_not_need_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions()["git"] is None


def test_bad_data_leaves_no_workdir(tmp_path):
    config = rig.drill_config(data=dict(path=str(tmp_path / "nowhere")))
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model=dict(vocab_size=200)), r"model\.vocab_size=200 must be at least the 257"),
        (dict(data=dict(weights=dict(dickens=1.0))), r"data\.weights has dickens=1\.0"),
        (dict(data=dict(weights=dict(austen=1.0))), r"data\.weights does not name factbook"),
    ],
)
def test_a_config_that_does_not_fit_the_data_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run(rig.drill_config(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_batch_of_every_step_is_loaded_in_order(tmp_path, monkeypatch):
    asked = []
    real = data.training_batches

    def recording(*args, **kwargs):
        batch_at = real(*args, **kwargs)
        return lambda n, rows: (asked.append(n), batch_at(n, rows))[1]

    monkeypatch.setattr(data, "training_batches", recording)
    run(CONFIG, tmp_path, stop_at=5, quiet=True)
    run(CONFIG, tmp_path, stop_at=8, quiet=True)
    assert asked == list(range(8))


def test_a_workdir_may_be_moved_between_two_parts_of_a_run(tmp_path):
    run(CONFIG, tmp_path / "here", stop_at=5, quiet=True)
    shutil.move(tmp_path / "here", tmp_path / "there and ünïcödé")
    assert run(CONFIG, tmp_path / "there and ünïcödé", stop_at=7, quiet=True).step == 7


# --- another mesh ---------------------------------------------------------------------------------------------


MESHES = [(1, 1), (8, 1), (1, 8), (4, 2)]  # (data, expert)


def on_mesh(data, expert):
    return rig.drill_config(num_steps=10, model=dict(num_experts=8), mesh=dict(data=data, expert=expert))


@pytest.fixture(scope="module")
def two_by_four(tmp_path_factory):
    """The workdir of a run on data=2, expert=4, stopped and saved after 5 of its 10 steps."""
    folder = tmp_path_factory.mktemp("two_by_four") / "run"
    run(on_mesh(2, 4), folder, stop_at=5, quiet=True)
    return folder


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_run_saved_on_one_mesh_continues_on_every_other_and_back(two_by_four, tmp_path, sizes):
    there = make_mesh(on_mesh(2, 4).mesh)
    before, _ = restore(two_by_four / "checkpoints", abstract_state(on_mesh(2, 4), there))
    workdir = shutil.copytree(two_by_four, tmp_path / "run")
    config, mesh = on_mesh(*sizes), make_mesh(on_mesh(*sizes).mesh)
    wanted = abstract_state(config, mesh)
    after, _ = restore(workdir / "checkpoints", wanted)
    assert state_hash(after) == state_hash(before)
    assert all(a.sharding == w.sharding for a, w in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True))
    assert run(config, workdir, stop_at=7, quiet=True).step == 7
    assert run(on_mesh(2, 4), workdir, quiet=True).step == 10
    straight = shutil.copytree(two_by_four, tmp_path / "straight")
    run(on_mesh(2, 4), straight, quiet=True)
    rig.assert_close_curves(workdir, straight)


# --- measuring ------------------------------------------------------------------------------------------------


def test_measuring_changes_no_number_of_a_run_and_is_logged_at_its_interval(tmp_path):
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    config = rig.drill_config(measure_every=5, record_scores_every=10)
    run(CONFIG, plain, stop_at=10, quiet=True)
    run(config, measured, hooks=observers(config), stop_at=10, quiet=True)
    for want, have in zip(rig.curve(plain), rig.curve(measured), strict=True):
        ours = {k: v for k, v in have.items() if k in want}
        assert ours.keys() == want.keys()
        np.testing.assert_allclose([ours[k] for k in want], [want[k] for k in want], rtol=1e-5, atol=1e-6)
        assert ("interference/router_ratio" in have) == ((have["step"] + 1) % 5 == 0)
    last = rig.layers(measured)[-1]
    assert np.shape(last["interference/router_ratio"]) == (2,)
    assert (np.asarray(last["interference/router_ratio"]) > 0).all()  # the drill has an auxiliary loss
    assert [f.name for f in sorted((measured / "scores").iterdir())] == ["00000009.npz"]
    with np.load(measured / "scores" / "00000009.npz") as scores:
        assert (scores["logits"].shape, scores["logits"].dtype) == ((2, 8 * 16, 4), np.float16)
        assert (scores["mask"].shape, scores["ids"].shape) == ((8 * 16,), (8 * 16,))


def test_a_run_from_before_a_key_existed_resumes(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["measure_every"], config["model"]["num_zero_experts"]
    file.write_text(json.dumps(config))
    assert run(CONFIG, tmp_path, stop_at=3, quiet=True).step == 3


def test_interference_of_a_bias_method_is_logged_as_zero_and_null(tmp_path):
    config = rig.drill_config(measure_every=1, balance=dict(bias_sign=dict(rate=1e-2)))
    run(config, tmp_path, hooks=observers(config), stop_at=1, quiet=True)
    (record,) = rig.curve(tmp_path)
    for place in ("router", "input"):
        assert record[f"interference/{place}_ratio"] == 0.0
        assert record[f"interference/{place}_cosine"] is None


def test_hash_layers_are_balanced_for_the_tokens_of_the_corpus_and_the_table_is_in_the_checkpoint(tmp_path):
    config = rig.drill_config(balance=dict(hash={}))
    run(config, tmp_path, stop_at=1, quiet=True)
    table = np.asarray(rig.restored(config, tmp_path).balance["hash"]["table"])
    assert (table.shape, table.dtype) == ((2, 264, 2), np.int32)
    shares = token_frequencies(open_corpus(), 264)
    for layer in table:
        loads = np.bincount(layer.ravel(), np.repeat(shares, 2), minlength=4)
        assert loads.max() / loads.mean() - 1 < 0.02
        assert (layer[:, 0] != layer[:, 1]).all()
    assert (table[0] != table[1]).any()


# --- where the time goes --------------------------------------------------------------------------------------


def total(about):
    return sum(about["time"].values())


def test_run_json_and_the_log_account_for_the_time_of_all_attempts(tmp_path):
    config = rig.drill_config(eval_every=5)
    run(config, tmp_path, stop_at=6, quiet=True)
    first = json.loads((tmp_path / "run.json").read_text())
    assert first["step"] == 6
    assert first["seconds"] == pytest.approx(total(first))
    assert all(first["time"][kind] > 0 for kind in ("init", "compile", "step", "evaluation", "checkpoint"))
    assert first["goodput"] == pytest.approx(first["time"]["step"] / total(first), abs=1e-3)
    run(config, tmp_path, stop_at=8, quiet=True)
    second = json.loads((tmp_path / "run.json").read_text())
    assert all(second["time"][kind] >= spent for kind, spent in first["time"].items())
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    totals = [sum(v for k, v in line.items() if k.startswith("time/")) for line in lines]
    assert totals == sorted(totals)  # the second attempt continued the totals
    assert totals[-1] <= total(second) + 0.01  # what came after the last line, and rounding


def test_time_of_steps_that_are_repeated_after_a_crash_is_lost(tmp_path, monkeypatch):
    def make(config, mesh=None):
        def train_step(state, batch, key):
            if int(state.step) == 8:
                raise RuntimeError("crash")
            return real(config, mesh)(state, batch, key)

        return train_step

    real = compile.make_train_step
    monkeypatch.setattr(compile, "make_train_step", make)
    with pytest.raises(RuntimeError, match="crash"):
        run(CONFIG, tmp_path, quiet=True)  # saved at 5, logged steps 5, 6 and 7
    monkeypatch.setattr(compile, "make_train_step", real)
    crashed = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if r["step"] >= 5]
    again = crashed[-1]["time/step"] - crashed[0]["time/step"]  # of two of the three steps, which are repeated
    run(CONFIG, tmp_path, stop_at=6, quiet=True)
    assert json.loads((tmp_path / "run.json").read_text())["time"]["lost"] >= again > 0


def test_a_start_without_a_step_to_do_leaves_the_account_unchanged(tmp_path):
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    before = json.loads((tmp_path / "run.json").read_text())
    run(CONFIG, tmp_path, stop_at=2, quiet=True)
    assert json.loads((tmp_path / "run.json").read_text()) == before


def test_the_logged_flop_rate_is_the_token_rate_times_the_flops_of_a_token(tmp_path):
    run(CONFIG, tmp_path, stop_at=3, quiet=True)
    first, *others = read_jsonl(tmp_path / "metrics.jsonl")
    assert first["tokens_per_second"] is first["gflops_per_second"] is first["data_wait"] is None  # it compiled
    for line in others:
        assert line["gflops_per_second"] == pytest.approx(line["tokens_per_second"] * train_flops(CONFIG) / 1e9)
        assert 0 <= line["data_wait"] < 1
        assert "mfu" not in line  # the peak of a CPU is unknown


# --- a trace --------------------------------------------------------------------------------------------------


def trace_of(workdir):
    (file,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
    return json.loads(gzip.decompress(file.read_bytes()))


def test_a_trace_of_the_requested_steps_is_written_for_perfetto_and_xprof(tmp_path):
    run(CONFIG, tmp_path, stop_at=6, quiet=True, profile=2)
    steps = [e["args"] for e in trace_of(tmp_path)["traceEvents"] if e.get("name") == "train"]
    assert [int(arguments["step_num"]) for arguments in steps] == [2, 3]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert rig.steps_logged(tmp_path) == 6


def test_a_trace_longer_than_the_remaining_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--profile=3 must leave 2 steps before it, and this start has 4 to do"):
        run(CONFIG, tmp_path, stop_at=4, quiet=True, profile=3)


def test_a_trace_that_a_signal_cuts_short_is_written(tmp_path, monkeypatch):
    def interrupt(self, done):
        if done == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Display, "step", interrupt)
    assert run(CONFIG, tmp_path, quiet=True, profile=10).signal == signal.SIGTERM
    steps = [e["args"] for e in trace_of(tmp_path)["traceEvents"] if e.get("name") == "train"]
    assert [int(arguments["step_num"]) for arguments in steps] == [2, 3]
