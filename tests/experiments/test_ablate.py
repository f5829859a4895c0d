"""Laws of sweeps: planned as a whole before the first run, paired by seed, resumable, never mixed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from drills import rig
from state_hash import state_hash

from conftest import tiny_config
from experiments import hyper
from experiments.branched import plan_branched
from experiments.report import read_sweep
from experiments.runs import Run, claim, execute, override, parse_shard, plan, sweep_record
from moe_jax.config import as_dict, default, flatten, validate
from moe_jax.config.command import load
from moe_jax.data import check_corpus, open_corpus, training_batches
from moe_jax.runtime import checkpoint, manifest
from moe_jax.runtime.workdir import Identity, record_run
from moe_jax.training import loop
from moe_jax.training.state import init_state

BASE = as_dict(rig.drill_config(save_every=0))
SETTINGS = hyper.product(
    hyper.arms(bias={}, none={"balance": {}}),
    hyper.sweep("seed", range(2)),
)
SOURCE = SimpleNamespace(__file__="configs/ablation/pair.py", __doc__="Two arms.\n\nMore.")

SWEEP = """'''Two arms, two seeds: does the command work?'''
from moe_jax.config import default


def get_config(arg=""):
    return default(**{base!r})


def get_hyper(h):
    return h.product(h.arms(often={{"log_every": 1}}, seldom={{"log_every": 2}}), h.sweep("seed", range(2)))
"""


# --- settings -------------------------------------------------------------------------------------------------


def test_a_product_is_every_combination_the_first_slowest():
    settings = hyper.product(hyper.arms(a={"x": 1}, b={}), hyper.sweep("seed", [0, 1]))
    assert settings == [
        {"arm": "a", "x": 1, "seed": 0},
        {"arm": "a", "x": 1, "seed": 1},
        {"arm": "b", "seed": 0},
        {"arm": "b", "seed": 1},
    ]


def test_a_plan_has_every_arm_with_every_seed():
    runs = plan(BASE, SETTINGS)
    assert [(r.arm, r.seed) for r in runs] == [("bias", 0), ("bias", 1), ("none", 0), ("none", 1)]
    assert [r.config.seed for r in runs] == [0, 1, 0, 1]
    assert runs[0].config == rig.drill_config(save_every=0)
    assert runs[3].config.balance == ()


def test_an_override_changes_one_key_and_not_the_base():
    before = json.dumps(BASE)
    changed = override(BASE, {"balance.bias_sign.rate": 0.5})
    old, new = flatten(json.loads(before)), flatten(changed)
    assert {k for k in new if new[k] != old.get(k)} == {"balance.bias_sign.rate"}
    assert json.dumps(BASE) == before


@pytest.mark.parametrize("key", ["model.topk", "modle.top_k", "model.top_k.more", "balance.z_loss.weight", ""])
def test_an_override_of_a_key_that_is_not_there_is_refused(key):
    with pytest.raises(ValueError, match=f"sets '{key}', which is not a key of the config; check its spelling"):
        override(BASE, {key: 1})


def test_a_setting_without_an_arm_is_refused():
    with pytest.raises(ValueError, match=r"without an 'arm'; name arms with h\.arms"):
        plan(BASE, hyper.sweep("seed", [0]))


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="arm 'a' with seed 0 twice; give the arms two names"):
        plan(BASE, [{"arm": "a"}, {"arm": "a", "model.top_k": 1, "model.normalize_gates": False}])


def test_an_invalid_arm_is_refused_before_any_run_starts():
    settings = hyper.arms(good={}, bad={"model.top_k": 9})
    with pytest.raises(ValueError, match=r"model\.top_k=9 must be at most"):
        plan(BASE, settings)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "."])
def test_an_arm_whose_name_is_not_a_folder_name_is_refused(name):
    with pytest.raises(ValueError, match="arm"):
        plan(BASE, [{"arm": name}])


@pytest.mark.parametrize("name", ["sweep.json", "report.html", "figures"])
def test_an_arm_named_as_a_file_of_the_sweep_is_refused_before_any_run_starts(name):
    with pytest.raises(ValueError, match=f"arm '{name}', like a file of the sweep; choose another"):
        plan(BASE, [{"arm": name}])


# --- pairing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_every_arm_of_a_seed_starts_from_the_same_weights(seed):
    hashes = {state_hash(init_state(r.config).params) for r in plan(BASE, SETTINGS) if r.seed == seed}
    assert len(hashes) == 1


def test_two_seeds_start_from_different_weights():
    first, second = (init_state(r.config).params for r in plan(BASE, SETTINGS)[:2])
    assert state_hash(first) != state_hash(second)


def test_every_arm_of_a_seed_reads_the_same_batches():
    corpus = open_corpus()
    runs = [r for r in plan(BASE, SETTINGS) if r.seed == 1]
    batches = [training_batches(corpus, seed=r.config.seed, batch_size=8, sequence_length=16)(3) for r in runs]
    assert (batches[0].tokens == batches[1].tokens).all()


# --- the folder of a sweep ------------------------------------------------------------------------------------


def test_a_sweep_record_distinguishes_the_arms(tmp_path):
    record = sweep_record(plan(BASE, SETTINGS), BASE, SOURCE, "the command")
    assert (record["arms"], record["seeds"], record["baseline"]) == (["bias", "none"], [0, 1], "bias")
    assert record["arms_config"]["bias"] == {}
    assert all(key.startswith("balance") for key in record["arms_config"]["none"])
    assert record["description"] == "Two arms."
    claim(tmp_path, record, [])
    assert json.loads((tmp_path / "sweep.json").read_text()) == record


def claimed(folder, base=BASE, settings=SETTINGS, source=SOURCE, command="the command"):
    runs = plan(base, settings)
    return claim(folder, sweep_record(runs, base, source, command), runs)


@pytest.fixture
def begun(tmp_path):
    """A sweep whose first run is in progress, according to its files."""
    claimed(tmp_path)
    folder = tmp_path / "bias" / "seed0"
    folder.mkdir(parents=True)
    record_run(folder, plan(BASE, SETTINGS)[0].config, {"identity": Identity(check_corpus().fingerprint)._asdict()})
    return tmp_path


GROWN = {
    "a seed more": dict(
        settings=hyper.product(hyper.arms(bias={}, none={"balance": {}}), hyper.sweep("seed", range(3)))
    ),
    "an arm more": dict(settings=[*SETTINGS, {"arm": "slow", "seed": 0, "optimizer.learning_rate": 1e-4}]),
    "an arm less": dict(settings=SETTINGS[:2]),
    "keys that change no number": dict(base=BASE | {"log_every": 2, "eval_every": 5, "mesh": {"data": 2}}),
    "a file renamed": dict(source=SimpleNamespace(__file__="renamed.py", __doc__="Other words.")),
    "another shard": dict(command="the command --shard=0/2"),
}


@pytest.mark.parametrize("change", GROWN)
def test_a_sweep_may_grow_and_change_keys_that_change_no_number(begun, change):
    lines = claimed(begun, **GROWN[change])
    assert lines == ([f"arm none is in {begun} but no longer in the sweep"] if change == "an arm less" else [])


def test_a_sweep_resumes_where_a_key_is_newer_than_it(begun):
    for file in (begun / "sweep.json", begun / "bias" / "seed0" / "config.json"):
        older = json.loads(file.read_text())
        del older.get("config", older)["step_timeout_seconds"]
        file.write_text(json.dumps(older))
    assert claimed(begun) == []


def test_a_sweep_whose_runs_would_train_other_numbers_is_refused_with_the_difference(begun):
    before = (begun / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match=r"seed0 holds a run of another config.*\s+num_steps: 20 -> 30"):
        claimed(begun, base=BASE | {"num_steps": 30})
    assert (begun / "sweep.json").read_bytes() == before


def test_a_sweep_whose_data_changed_is_refused(begun):
    other = {"identity": Identity("another fingerprint")._asdict()}
    (begun / "bias" / "seed0" / "run.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"data\.path='' has other data .* than the run in .*seed0"):
        claimed(begun)


def test_a_sweep_without_a_common_arm_is_another(begun):
    with pytest.raises(ValueError, match="holds another sweep, with the arms bias, none, and none of more"):
        claimed(begun, settings=[{"arm": "more", "seed": 0}])


# --- executing ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """`loop.run` replaced by a recorder."""
    done = []

    def fake(config, folder, hooks, name):
        done.append((folder.parent.name, folder.name))
        return loop.Outcome(config.num_steps, None, {})

    monkeypatch.setattr(loop, "run", fake)
    return done


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_shards_do_every_run_once(trained, tmp_path, count):
    runs = plan(BASE, SETTINGS)
    for index in range(count):
        index, n = parse_shard(f"{index}/{count}")
        execute(runs[index::n], tmp_path)
    assert sorted(trained) == sorted((r.arm, f"seed{r.seed}") for r in runs)


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "", "1/2/3"])
def test_an_invalid_shard_is_refused(text):
    with pytest.raises(ValueError, match="must be i/n with 0 <= i < n; 0/1 does every run"):
        parse_shard(text)


def test_a_finished_run_is_not_run_again(trained, tmp_path):
    runs = plan(BASE, SETTINGS)
    evaluation = {"eval/loss": 5.0, "eval/bits_per_byte": 7.0}
    for name, last in {"bias/seed1": {"step": 19} | evaluation, "none/seed0": {"step": 9} | evaluation}.items():
        (tmp_path / name).mkdir(parents=True)  # without checkpoints, which were deleted for space
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    execute(runs, tmp_path)
    assert ("bias", "seed1") not in trained
    assert len(trained) == 3


def test_a_run_whose_final_evaluation_is_missing_is_not_finished(trained, tmp_path):
    (tmp_path / "bias" / "seed0" / "checkpoints" / "00000020").mkdir(parents=True)
    (tmp_path / "bias" / "seed0" / "checkpoints" / "00000020" / manifest.MANIFEST).write_text("{}")
    (tmp_path / "bias" / "seed0" / "metrics.jsonl").write_text('{"step": 19, "loss": 5.0}\n')
    execute(plan(BASE, SETTINGS), tmp_path)
    assert ("bias", "seed0") in trained


def test_a_signal_ends_the_sweep_after_the_run_under_way(monkeypatch, tmp_path):
    calls = []

    def fake(config, folder, hooks, name):
        calls.append(folder)
        return loop.Outcome(7, signal.SIGTERM if len(calls) == 2 else None, {})

    monkeypatch.setattr(loop, "run", fake)
    assert execute(plan(BASE, SETTINGS), tmp_path) == (signal.SIGTERM, [])
    assert len(calls) == 2


# --- a run that fails ---------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch):
    """`loop.run` replaced by a recorder that raises the errors in a dict, arm -> error."""
    done = []
    errors = {}

    def fake(config, folder, hooks, name):
        done.append((folder.parent.name, folder.name))
        if folder.parent.name in errors:
            raise errors[folder.parent.name]
        return loop.Outcome(config.num_steps, None, {})

    monkeypatch.setattr(loop, "run", fake)
    return done, errors


@pytest.mark.parametrize(
    "error", [FloatingPointError("step 2"), ValueError("bad data"), FileNotFoundError("gone"), MemoryError("too large")]
)
@pytest.mark.parametrize("shard", [slice(None), slice(0, None, 2)])
def test_a_failed_run_is_named_and_does_not_affect_the_others(failing, tmp_path, error, shard):
    done, errors = failing
    errors["bias"] = error
    runs = plan(BASE, SETTINGS)[shard]
    stopped, failed = execute(runs, tmp_path)
    assert done == [(r.arm, f"seed{r.seed}") for r in runs]
    assert stopped is None
    expected = [f"bias, seed {r.seed} ({tmp_path}/bias/seed{r.seed}): {error}" for r in runs if r.arm == "bias"]
    assert failed == expected


def test_a_full_disk_ends_the_sweep_because_it_would_end_every_run(failing, tmp_path):
    done, errors = failing
    errors["bias"] = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        execute(plan(BASE, SETTINGS), tmp_path)
    assert len(done) == 1


WILD = """from moe_jax.config import default


def get_config(arg=""):
    return default(**{base!r})


def get_hyper(h):
    arms = h.arms(wild={{"optimizer.learning_rate": 1e25}}, mid={{"optimizer.learning_rate": 3e-3}})
    return h.product(h.sweep("seed", [0]), arms)
"""


def test_a_run_that_diverges_is_noted_and_named_and_skipped_when_the_command_is_repeated(tmp_path):
    file = tmp_path / "wild.py"
    folder = tmp_path / "sweep"
    file.write_text(WILD.format(base=BASE))
    wild = folder / "wild" / "seed0"
    for attempt in ("first", "second"):
        flags = [f"--config={file}", f"--workdir={folder}"]
        command = rig.Command("experiments.ablate", tmp_path / attempt, *flags)
        assert command.wait() == 1, command.text
        assert "error: 1 of 2 runs failed:" in command.text
        (line,) = [line for line in command.text.splitlines() if line.startswith("  wild, seed 0")]
        assert str(wild) in line and "diverged: step" in line and "Delete the folder to try it again." in line
        assert "report: " in command.text
        assert ("wild seed 0 step 1/20" in command.text) == (attempt == "first")
    assert "not finite" in json.loads((wild / "run.json").read_text())["diverged"]
    assert checkpoint.committed(folder / "mid" / "seed0" / "checkpoints") == [20]
    sweep = read_sweep(folder)
    assert {arm: list(runs) for arm, runs in sweep.runs.items()} == {"wild": [], "mid": [0]}
    assert any(p.startswith("wild, seed 0: diverged (step") for p in sweep.problems)


def test_a_finished_sweep_stays_finished_without_its_checkpoints(tmp_path):
    runs = plan(BASE, [{"arm": "one", "seed": 0}])
    execute(runs, tmp_path)
    before = (tmp_path / "one" / "seed0" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "one" / "seed0" / "checkpoints")
    assert execute(runs, tmp_path) == (None, [])
    assert (tmp_path / "one" / "seed0" / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "one" / "seed0" / "checkpoints").exists()


def test_every_file_of_the_repository_that_has_arms_has_a_plan(repo, tmp_path):
    for file in sorted((repo / "configs" / "ablation").glob("*.py")):
        source = load(file)
        base, listed = as_dict(validate(source.get_config())), source.get_hyper(hyper)
        is_branched = isinstance(listed, hyper.Branches)
        plans = [p.branches for p in plan_branched(base, listed, tmp_path)] if is_branched else [plan(base, listed)]
        for runs in plans:
            assert len({r.arm for r in runs}) > 1
            assert {r.seed for r in runs if r.arm == runs[0].arm} == {r.seed for r in runs}


def test_the_command_trains_every_run_prints_a_table_and_writes_the_report(tmp_path):
    file = tmp_path / "pair.py"
    file.write_text(SWEEP.format(base=BASE))
    folder = tmp_path / "sweep"
    flags = [f"--config={file}", f"--workdir={folder}"]
    command = rig.Command("experiments.ablate", tmp_path / "log", *flags)
    assert command.wait() == 0, command.text
    assert set(command.compilations) == {1}
    for arm in ("often", "seldom"):
        for seed in (0, 1):
            assert checkpoint.committed(folder / arm / f"seed{seed}" / "checkpoints") == [20]
    one, other = (rig.final_hash(validate(BASE), folder / arm / "seed0") for arm in ("often", "seldom"))
    assert one == other  # the arms differ in nothing that trains, so pairing makes them equal, bit by bit
    assert "report: " in command.text
    assert "seldom" in command.text
    assert len(list(folder.glob("*.html"))) == 1


def test_the_default_config_can_be_overridden_key_by_key():
    base = as_dict(validate(default(model=dict(num_experts=4), balance=dict(bias_sign={}))))
    for key, value in flatten(base).items():
        if value != {}:
            assert json.dumps(override(base, {key: value})) == json.dumps(base)


def test_a_run_that_does_not_fit_the_devices_is_refused_before_any_is_started(tmp_path):
    fits, too_large = tiny_config(), tiny_config(batch_size=16, mesh=dict(data=16))
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        execute([Run("a", 0, fits), Run("b", 0, too_large)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_not_one_process_of_many(repo, tmp_path):
    command = [sys.executable, "-m", "experiments.ablate", "--config=configs/ablation/demo.py", f"--workdir={tmp_path}"]
    many = dict(JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
    result = subprocess.run(command, cwd=repo, env=os.environ | many, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "one process of many" in result.stderr
    assert "--shard=i/n" in result.stderr
