"""Drills with two real processes of one run, with two devices each, that communicate over Gloo."""

import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys

import pytest
from drills import rig

from conftest import HANG_SECONDS
from moe_jax.config import MeshConfig
from moe_jax.runtime import cache
from moe_jax.runtime.checkpoint import committed
from moe_jax.runtime.manifest import check, read_manifest

CONFIG = rig.drill_config(
    num_steps=8,
    save_every=4,
    mesh=dict(data=2, expert=2),
    heartbeat_seconds=5,
    model=dict(num_layers=2),
)

LATE_SECONDS = 3


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """A folder with `config.py`, and in `run` the workdir of one process with four devices."""
    return rig.made_once(
        tmp_path_factory,
        "one_process",
        lambda folder: rig.train_together(rig.write_config(folder / "config.py", CONFIG), folder / "run", devices=(4,)),
    )


def error_of(command):
    (line,) = [line for line in command.text.splitlines() if line.startswith("error: ")]
    return line


def test_two_processes_train_as_one_and_killing_one_ends_the_other_and_a_restart_continues(one_process, tmp_path):
    workdir, file = tmp_path / "run", one_process / "config.py"
    with rig.Processes(file, workdir, devices=(2, 2)) as processes:
        rig.wait_until(lambda: rig.steps_logged(workdir) >= 5, processes[0])
        processes[1].kill()
        assert processes[0].wait() == 75, processes.text
    assert re.match(r"error: process 0 of 2, at step \d: another process of the run has died", error_of(processes[0]))
    assert "The same command on all hosts resumes from the newest checkpoint." in error_of(processes[0])
    assert committed(workdir / "checkpoints") == [4]
    check(workdir / "checkpoints" / "00000004", "full")
    rig.train_together(file, workdir, devices=(2, 2))
    assert committed(workdir / "checkpoints") == [4, 8]
    check(workdir / "checkpoints" / "00000008", "full")
    rig.assert_close_curves(workdir, one_process / "run")
    assert not [name for name in rig.folders(workdir) if len(name) != 8]


def test_two_processes_branch_from_the_run_of_one(one_process, tmp_path):
    trunk = shutil.copytree(one_process / "run", tmp_path / "trunk")
    there = trunk / "checkpoints" / "00000004"
    extra = read_manifest(there)["extra"]
    extra["config"]["balance"]["bias_sign"]["rate"] = 0.5  # so that the branch has a balance of its own
    rig.rewrite_manifest(there, extra=extra)
    config = dataclasses.replace(CONFIG, branch_from=f"{trunk}@4")
    workdir, file = tmp_path / "run", rig.write_config(tmp_path / "config.py", config)
    processes = rig.train_together(file, workdir, "--stop_at=5", devices=(2, 2))
    assert "unlike its trunk (there -> here): balance.bias_sign.rate: 0.5 -> 0.01" in processes[0].text
    (ours,), theirs = rig.curve(workdir), rig.curve(one_process / "run")[4]
    assert (ours["step"], ours["tokens_seen"]) == (4, theirs["tokens_seen"])
    assert abs(ours["total_loss"] - theirs["total_loss"]) <= 1e-5 * theirs["total_loss"]


@pytest.mark.slow
def test_two_processes_go_back_alike(tmp_path):
    guard = dict(threshold=6.0, window=8, rollback=3)
    config = rig.drill_config(num_steps=16, save_every=5, mesh=dict(data=2, expert=2), guard=guard)
    workdir, file = tmp_path / "run", rig.write_config(tmp_path / "config.py", config)
    with rig.Processes(file, workdir, devices=(2, 2), accident="spoil=12") as processes:
        assert processes.wait() == [0, 0], processes.text
    (rollback,) = json.loads((workdir / "run.json").read_text())["rollbacks"]
    assert tuple(rollback.values()) == (12, 15, 10, 5)
    assert [line["rollbacks"] for line in rig.curve(workdir)] == [0] * 10 + [1] * 6
    assert committed(workdir / "checkpoints")[-1] == 16


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory):
    """A run of two hosts that share no home folder, started twice; process 1 is then late, and its clock stands still.

    Returns its folder, and the commands of both starts.
    """
    folder = tmp_path_factory.mktemp("two_starts")
    model = dict(num_layers=1, first_dense=0)
    config = rig.drill_config(balance={}, mesh=dict(data=2), model=model, save_every_seconds=float(LATE_SECONDS))
    file, workdir = rig.write_config(folder / "config.py", config), folder / "run"
    hosts = [{"HOME": str(folder / f"home{number}"), "XDG_CACHE_HOME": ""} for number in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for name in (cache.FOLDER, *cache.EVERYTHING):
            patch.delenv(name, raising=False)
        patch.setenv("JAX_LOG_COMPILES", "1")  # has JAX say which programs it finds ...
        patch.setenv("JAX_EXPLAIN_CACHE_MISSES", "1")  # ... and which it does not
        patch.setenv("CXX", "false")  # no C++ kernels, which a new home would have to build
        first = rig.train_together(file, workdir, "--stop_at=1", devices=(1, 1), environs=hosts)
        hosts[1]["DRILL"] = f"late={LATE_SECONDS},clock=0"
        second = rig.train_together(file, workdir, "--stop_at=3", devices=(1, 1), environs=hosts)
    return folder, first, second


def test_the_second_start_of_every_process_finds_every_program_in_the_workdir(two_starts):
    folder, first, second = two_starts
    for command in first.all:
        assert "PERSISTENT COMPILATION CACHE MISS for 'jit_train_step'" in command.text
    for command in second.all:
        assert "Persistent compilation cache hit for 'jit_train_step'" in command.text
        assert "PERSISTENT COMPILATION CACHE MISS" not in command.text
    assert f"compiled programs are kept in {folder / 'run' / 'xla'}" in second[0].text
    assert not any(folder.glob("home*"))


def test_the_log_shows_that_one_process_delays_the_others(two_starts):
    folder, _, _ = two_starts
    before, late, _ = rig.read_jsonl(folder / "run" / "metrics.jsonl")
    assert before["hosts/dispatch"] < LATE_SECONDS <= late["hosts/dispatch"]
    assert late["hosts/dispatch_median"] < LATE_SECONDS
    assert late["hosts/slowest"] == platform.node()


def test_process_0_decides_when_the_seconds_until_a_save_are_over(two_starts):
    folder, _, _ = two_starts
    # at step 2, LATE_SECONDS after the second start; 3 is the last step. On process 1's clock none are over
    assert committed(folder / "run" / "checkpoints") == [2, 3]


@pytest.mark.slow
def test_two_processes_that_share_every_row_train_as_one_and_a_killed_run_resumes_in_other_pieces(tmp_path):
    model = dataclasses.replace(CONFIG.model, num_heads=4, mtp_depth=1)

    def written(name, **sizes):
        config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(**sizes))
        return rig.write_config(tmp_path / f"{name}.py", config)

    rig.train_together(written("one", data=1), tmp_path / "one", devices=(1,))
    workdir = tmp_path / "run"
    with rig.Processes(written("four", data=1, sequence=4), workdir, devices=(2, 2)) as processes:
        rig.wait_until(lambda: rig.steps_logged(workdir) >= 5, processes[0])
        processes[1].kill()
        assert processes[0].wait() == 75, processes.text
    rig.train_together(written("two", data=1, sequence=2, tensor=1), workdir, "--stop_at=6", devices=(2,))
    rig.train_together(written("rest", data=2, sequence=1), workdir, devices=(2,))
    rig.assert_close_curves(workdir, tmp_path / "one")


@pytest.mark.slow
def test_killing_the_process_that_coordinates_ends_the_other(one_process, tmp_path):
    workdir = tmp_path / "run"
    with rig.Processes(one_process / "config.py", workdir, devices=(2, 2)) as processes:
        rig.wait_until(lambda: rig.steps_logged(workdir) >= 2, processes[0])
        processes[0].kill()
        assert processes[1].wait() == 75, processes.text
    assert "another process of the run has died" in error_of(processes[1])


@pytest.mark.slow
def test_a_signal_to_one_process_ends_both_in_the_same_evaluation_which_the_next_start_repeats(tmp_path):
    config = dataclasses.replace(CONFIG, eval_every=4, data=dataclasses.replace(CONFIG.data, eval_sequences=64))
    workdir, file = tmp_path / "run", rig.write_config(tmp_path / "config.py", config)
    with rig.Processes(file, workdir, devices=(2, 2), accident="linger=0.5") as processes:
        rig.wait_until(lambda: rig.steps_logged(workdir) >= 4, processes[0])
        processes[1].process.send_signal(signal.SIGUSR1)
        assert processes.wait() == [143, 143], processes.text
    assert committed(workdir / "checkpoints") == [4]
    assert "eval/loss" not in rig.curve(workdir)[-1]
    rig.train_together(file, workdir, devices=(2, 2))
    assert [r["step"] for r in rig.curve(workdir) if "eval/loss" in r] == [3, 7]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_the_evaluate_command_in_all(one_process, tmp_path):
    file, workdir = one_process / "config.py", shutil.copytree(one_process / "run", tmp_path / "run")
    with rig.Processes(file, workdir, devices=(2, 2), accident="linger=0.5", name="moe_jax.evaluate") as processes:
        rig.wait_until(lambda: "evaluates a batch" in processes[1].text, processes[1])
        processes[1].process.send_signal(signal.SIGTERM)
        assert processes.wait() == [143, 143], processes.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(one_process, tmp_path, number):
    workdir, file = tmp_path / "run", one_process / "config.py"
    with rig.Processes(file, workdir, devices=(2, 2), accident="pace=0.3") as processes:
        rig.wait_until(lambda: rig.steps_logged(workdir) >= 2, processes[0])
        processes[1].process.send_signal(number)
        assert processes.wait() == [143, 143], processes.text
    done = committed(workdir / "checkpoints")[-1]
    assert 2 <= done < 8
    assert rig.steps_logged(workdir) == done
    assert "SIGTERM: saving step" in processes[0].text
    rig.train_together(file, workdir, devices=(2, 2))
    rig.assert_close_curves(workdir, one_process / "run")


@pytest.mark.slow
def test_a_stuck_process_ends_the_run_within_the_limit_and_the_step_is_named(tmp_path):
    config = dataclasses.replace(CONFIG, heartbeat_seconds=300, step_timeout_seconds=8)
    workdir, file = tmp_path / "run", rig.write_config(tmp_path / "config.py", config)
    with rig.Processes(file, workdir, devices=(2, 2), accident="pace=0.3") as processes:
        rig.wait_until(lambda: rig.steps_logged(workdir) >= 2, processes[0])
        processes[1].process.send_signal(signal.SIGSTOP)
        assert processes[0].wait() == 75, processes.text
        done = rig.steps_logged(workdir)
        assert re.match(rf"error: step {done} has not finished within step_timeout_seconds=8", error_of(processes[0]))
        assert "in _steps" in processes[0].text  # where the process was
        processes[1].process.send_signal(signal.SIGCONT)
        assert processes[1].wait() not in (0, None)
    assert rig.train_together(file, workdir, devices=(2, 2))


@pytest.mark.slow
def test_the_number_of_processes_may_change_when_a_run_is_resumed(one_process, tmp_path):
    workdir, file = tmp_path / "run", one_process / "config.py"
    for devices, stop in (((4,), 3), ((2, 2), 6), ((4,), 8)):
        rig.train_together(file, workdir, f"--stop_at={stop}", devices=devices)
    rig.assert_close_curves(workdir, one_process / "run")


@pytest.mark.slow
def test_one_host_of_two_goes_on_with_the_same_batches_in_two_micro_batches(tmp_path):
    balance, model = dict(bias_sign=dict(rate=1e-2)), dict(num_layers=2)
    config = rig.drill_config(num_steps=6, save_every=0, balance=balance, mesh=dict(replica=2), model=model)
    file, workdir = rig.write_config(tmp_path / "config.py", config), tmp_path / "run"
    alone = ["--config.mesh.replica=1", "--config.micro_batches=2"]
    rig.train_together(file, workdir, "--stop_at=3", devices=(1, 1))
    rig.train_together(file, workdir, *alone, devices=(1,))
    rig.train_together(file, tmp_path / "reference", "--config.mesh.replica=1", devices=(1,))
    rig.assert_close_curves(workdir, tmp_path / "reference")


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_every_process_with_the_same_error(one_process, tmp_path):
    workdir, file = tmp_path / "run", one_process / "config.py"
    rig.train_together(file, workdir, "--stop_at=2", devices=(2, 2))
    damaged = rig.data_files(workdir / "checkpoints" / "00000002")[-1]
    rig.flip_bit(damaged, 8)
    with rig.Processes(file, workdir, devices=(2, 2)) as processes:
        assert processes.wait() == [2, 2], processes.text
    for command in processes.all:
        assert damaged.name in error_of(command)


@pytest.mark.slow
def test_a_workdir_that_the_processes_do_not_share_is_refused(one_process, tmp_path):
    with rig.Processes(one_process / "config.py", tmp_path / "run", devices=(2, 2), shared=False) as processes:
        assert processes.wait() == [2, 2], processes.text
    assert "is not the folder that process 0 sees" in error_of(processes[0])


WAITING = """
import os, signal, time
from moe_jax.runtime import processes
with processes.joined(3, lambda: "step 7"):
    if processes.gather_json(processes.index()) == [0, 1] and processes.index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10**6)
"""


@pytest.mark.slow
def test_a_process_outside_a_collective_prints_its_own_message_when_the_heartbeat_stops():
    environ = rig.cluster_of(2) | {"PYTHONUNBUFFERED": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING],
            cwd=rig.REPO,
            env=os.environ | environ | {"JAX_PROCESS_ID": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        last = both[0].communicate(timeout=HANG_SECONDS)[1].splitlines()[-1]
    finally:
        for process in both:
            process.kill()
            process.wait()
            process.stderr.close()
    assert both[0].returncode == 75
    assert last.startswith("error: process 0 of 2, at step 7: another process of the run has died")
