"""Laws of sweeps that several processes share by claims: every run once, trunks first, no waiting for the dead."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from drills import rig

from conftest import HANG_SECONDS
from experiments import claimed, hyper
from experiments.claims import Claims
from experiments.planned import plan_sweep
from moe_jax.config import as_dict
from moe_jax.runtime import manifest
from moe_jax.training import loop

BASE = as_dict(rig.drill_config(save_every=0))
AT = 12
METHODS = hyper.arms(bias={}, none={"balance": {}})
SEEDS = hyper.sweep("seed", range(2))
BRANCHED = hyper.branches(hyper.product(METHODS, SEEDS), hyper.product(METHODS, SEEDS), at=AT)
SOURCE = SimpleNamespace(__file__="configs/ablation/pair.py", __doc__="Arms.")


def sweep_in(folder, listed=BRANCHED):
    return plan_sweep(SOURCE, BASE, listed, folder)


@pytest.fixture
def training(monkeypatch):
    """`loop.run` replaced by one that leaves what a finished run does, and records it; errors: folder -> exception."""
    done, errors = [], {}

    def finish(config, folder):
        saved = folder / "checkpoints" / f"{config.num_steps:08d}"
        saved.mkdir(parents=True)
        (saved / manifest.MANIFEST).write_text("{}")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": config.num_steps - 1, "eval/loss": 5.0}) + "\n")

    def fake(config, folder, hooks, name):
        place = "/".join(folder.parts[-4:] if "branches" in folder.parts else folder.parts[-2:])
        if place in errors:
            raise errors[place]
        done.append(folder)
        finish(config, folder)
        return loop.Outcome(config.num_steps, None, {})

    monkeypatch.setattr(loop, "run", fake)
    monkeypatch.setattr(claimed, "LOOK_SECONDS", 0.001)
    return SimpleNamespace(done=done, errors=errors, finish=finish)


@pytest.mark.parametrize("listed", [hyper.product(METHODS, SEEDS), BRANCHED])
def test_processes_that_share_a_sweep_train_every_run_once_and_trunks_before_their_branches(training, tmp_path, listed):
    results = []
    processes = [
        threading.Thread(target=lambda: results.append(sweep_in(tmp_path, listed).train_free("", HANG_SECONDS)))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert results == [(None, [])] * 3
    expected = [job.folder for job in sweep_in(tmp_path, listed).jobs().values()]
    assert sorted(training.done) == sorted(expected)
    for folder in training.done:
        if "branches" in folder.parts:
            method, seed = folder.relative_to(tmp_path / "branches").parts[:2]
            assert training.done.index(tmp_path / "trunks" / method / seed) < training.done.index(folder)


def test_a_run_that_another_process_finished_before_its_claim_was_free_is_not_trained_again(
    training, tmp_path, monkeypatch
):
    sweep = sweep_in(tmp_path, hyper.product(METHODS, SEEDS))
    taken = Claims.taken

    def late(claims, name):
        training.finish(sweep.jobs()[name].run.config, tmp_path / name)
        return taken(claims, name)

    monkeypatch.setattr(Claims, "taken", late)
    assert sweep.train_free("", HANG_SECONDS) == (None, [])
    assert training.done == []


def test_a_failed_run_is_named_and_left_to_the_others(training, tmp_path):
    training.errors["bias/seed0"] = ValueError("bad data")
    plain = hyper.product(METHODS, SEEDS)
    assert sweep_in(tmp_path, plain).train_free("", HANG_SECONDS) == (
        None,
        [f"bias, seed 0 ({tmp_path}/bias/seed0): bad data"],
    )
    assert len(training.done) == 3
    training.errors.clear()
    assert sweep_in(tmp_path, plain).train_free("", HANG_SECONDS) == (None, [])
    assert len(training.done) == 4


def test_a_failed_trunk_fails_its_branches_and_the_others_are_trained(training, tmp_path):
    training.errors["bias/seed1"] = ValueError("bad data")  # in trunks/
    stopped, failed = sweep_in(tmp_path).train_free("", HANG_SECONDS)
    assert stopped is None
    assert len(failed) == 1 + 4 and all("its trunk failed" in sentence for sentence in failed[1:])
    assert len(training.done) == 3 + 12


def test_a_signal_ends_the_process_and_frees_its_run(monkeypatch, training, tmp_path):
    monkeypatch.setattr(loop, "run", lambda config, *_, **__: loop.Outcome(3, signal.SIGTERM, {}))
    assert sweep_in(tmp_path).train_free("", HANG_SECONDS) == (signal.SIGTERM, [])
    assert Claims(tmp_path / "claims", HANG_SECONDS).owner("trunks/bias/seed0") == ""


def test_a_run_named_alone_is_not_waited_for(training, tmp_path):
    sweep = sweep_in(tmp_path)
    (sentence,) = sweep.train_free("branches/bias/seed0/none/seed1", HANG_SECONDS)[1]
    assert "its trunk is not finished yet" in sentence
    with Claims(tmp_path / "claims", HANG_SECONDS).taken("trunks/bias/seed0"):
        (sentence,) = sweep.train_free("trunks/bias/seed0", HANG_SECONDS)[1]
    assert re.search(r"trunk bias, seed 0 \(.*\): .* is training it\.", sentence)
    assert training.done == []
    assert sweep.train_free("trunks/bias/seed0", HANG_SECONDS) == (None, [])
    assert training.done == [tmp_path / "trunks" / "bias" / "seed0"]


def test_a_run_that_is_not_in_the_sweep_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--only=bias/seed9 is no run of the sweep; choose one that --list prints"):
        sweep_in(tmp_path).train_free("bias/seed9", HANG_SECONDS)


# --- the command ------------------------------------------------------------------------------------------------

SWEEP = """'''Two methods, branched.'''
from moe_jax.config import default


def get_config(arg=""):
    return default(**{base!r})


def get_hyper(h):
    arms = h.arms(bias={{}}, none={{"balance": {{}}}})
    return h.branches(arms, arms, at=3)
"""


def config_in(folder: Path) -> Path:
    file = folder / "two arms.py"
    file.write_text(SWEEP.format(base=as_dict(rig.drill_config(save_every=0, num_steps=4, eval_every=0))))
    return file


def test_list_prints_a_command_for_every_run_and_such_a_command_trains_it(tmp_path):
    arguments = [f"--config={config_in(tmp_path)}", "--config.balance.bias_sign.rate=0.5", "--workdir", "the sweep"]
    environ = os.environ | {"PYTHONPATH": str(rig.REPO), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    listing = [sys.executable, "-m", "experiments.ablate", *arguments, "--list"]
    shown = subprocess.run(listing, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True).stdout
    commands = shown.splitlines()
    names = [shlex.split(command)[-1] for command in commands]
    assert names == [
        "--only=trunks/bias/seed0",
        "--only=trunks/none/seed0",
        "--only=branches/bias/seed0/bias/seed0",
        "--only=branches/none/seed0/bias/seed0",
        "--only=branches/bias/seed0/none/seed0",
        "--only=branches/none/seed0/none/seed0",
    ]
    assert not (tmp_path / "the sweep").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(commands[1], shell=True, cwd=elsewhere, env=environ, check=True)
    run = tmp_path / "the sweep" / "trunks" / "none" / "seed0"
    assert [line["step"] for line in rig.curve(run)] == [0, 1, 2]
    assert json.loads((run / "config.json").read_text())["balance"] == {}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--claim", "--shard=0/2"], "--claim and --shard exclude each other; give one of them."),
        (["--claim", "--claim_seconds=0"], "--claim_seconds=0.0 must be above 0"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, flags, sentence):
    command = [sys.executable, "-m", "experiments.ablate", "--config=configs/ablation/demo.py", f"--workdir={tmp_path}"]
    result = subprocess.run([*command, *flags], cwd=rig.REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert sentence in result.stderr


@pytest.mark.slow
def test_when_one_of_two_claimers_is_killed_the_other_finishes_the_sweep(tmp_path):
    flags = [f"--config={config_in(tmp_path)}", f"--workdir={tmp_path / 'sweep'}", "--claim", "--claim_seconds=30"]
    one = rig.Command("experiments.ablate", tmp_path / "one.log", *flags, accident="pace=1000")
    try:
        rig.wait_until(lambda: rig.steps_logged(tmp_path / "sweep" / "trunks" / "bias" / "seed0") > 0, one)
        two = rig.Command("experiments.ablate", tmp_path / "two.log", *flags)
        rig.wait_until(lambda: "waiting for other processes" in two.text, two)
        one.kill()
        assert two.wait() == 0, two.text
    finally:
        one.kill()
    assert "[1/6] trunk bias, seed 0" in two.text
    claims = tmp_path / "sweep" / "claims"
    numbers = {str(file.parent.relative_to(claims)): file.name for file in sorted(claims.rglob("*.json"))}
    assert numbers.pop("trunks/bias/seed0") == "2.json"
    assert set(numbers.values()) == {"1.json"} and len(numbers) == 5
    for name in ("trunks/bias/seed0", *numbers):
        assert rig.curve(tmp_path / "sweep" / name)[-1]["step"] == (2 if name.startswith("trunks") else 3)
