"""Drills with real processes: a training command is killed, gets a signal, or runs out of disk, and is resumed."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from drills import rig

from conftest import HANG_SECONDS
from moe_jax.runtime.checkpoint import committed
from moe_jax.runtime.manifest import check
from moe_jax.training.loop import run

CONFIG = rig.drill_config()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The run of an undisturbed command: a folder with `run` and `config.py`."""
    return rig.uninterrupted(tmp_path_factory, CONFIG)


@pytest.mark.parametrize("stop", [10, 7])
def test_a_stopped_run_resumes_bit_by_bit(uninterrupted, tmp_path, stop):
    workdir, file = tmp_path / "run", uninterrupted / "config.py"
    first = rig.train(file, workdir, f"--stop_at={stop}")
    assert rig.steps_logged(workdir) == stop
    second = rig.train(file, workdir)
    assert first.compilations == second.compilations == [1]
    rig.assert_same_numbers(CONFIG, workdir, uninterrupted / "run")


@pytest.mark.slow
def test_kills_at_random_times_change_no_number_of_a_run(uninterrupted, tmp_path):
    rig.kill_until_done(uninterrupted / "config.py", tmp_path / "run", kills=3, draw=random.Random(0))
    rig.assert_same_numbers(CONFIG, tmp_path / "run", uninterrupted / "run")
    assert rig.folders(tmp_path / "run") == ["00000015", "00000020"]


@pytest.mark.slow
def test_kills_at_random_times_change_no_number_of_a_run_that_goes_back(tmp_path):
    config = rig.drill_config(guard=dict(threshold=6.0, window=8, rollback=3))
    file = rig.write_config(tmp_path / "config.py", config)
    rig.train(file, tmp_path / "whole", accident="spoil=12")
    rig.kill_until_done(file, tmp_path / "killed", kills=3, draw=random.Random(1), accident="spoil=12")
    rig.assert_same_numbers(config, tmp_path / "killed", tmp_path / "whole")
    assert [line["rollbacks"] for line in rig.curve(tmp_path / "killed")] == [0] * 10 + [1] * 10


def test_a_kill_between_the_rename_and_the_manifest_loses_that_save_only(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    command = rig.start_training(uninterrupted / "config.py", workdir, accident="pace=0.02,die=2")
    assert command.wait() == -signal.SIGKILL
    assert "00000010" in rig.folders(workdir)
    assert committed(workdir / "checkpoints") == [5]
    run(CONFIG, workdir, stop_at=12, quiet=True)
    assert rig.folders(workdir) == ["00000010", "00000012"]
    check(workdir / "checkpoints" / "00000010", "full")
    assert [r["step"] for r in rig.curve(workdir)] == list(range(12))


def test_sigterm_saves_the_last_finished_step_and_the_same_command_resumes(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    command = signalled(uninterrupted, workdir, signal.SIGTERM)
    assert command.wait() == 143, command.text
    done = committed(workdir / "checkpoints")[-1]
    assert 7 <= done < 20
    assert rig.steps_logged(workdir) == done
    assert "SIGTERM" in command.text
    rig.train(uninterrupted / "config.py", workdir)
    rig.assert_same_numbers(CONFIG, workdir, uninterrupted / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_act_like_sigterm_with_a_status_of_their_own(uninterrupted, tmp_path, number):
    workdir = tmp_path / "run"
    command = signalled(uninterrupted, workdir, number)
    assert command.wait() == 128 + number, command.text
    assert committed(workdir / "checkpoints")[-1] == rig.steps_logged(workdir)
    assert "Traceback" not in command.text


def test_a_signal_during_a_long_evaluation_ends_the_command(tmp_path):
    config = rig.drill_config(eval_every=4, save_every=0, data=dict(eval_sequences=0))
    workdir, file = tmp_path / "run", rig.write_config(tmp_path / "config.py", config)
    command = rig.start_training(file, workdir, accident="linger=1")  # hundreds of batches, a second each
    rig.wait_until(lambda: rig.steps_logged(workdir) >= 4, command)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 143, command.text
    assert "the evaluation after step 4 is left to the next start" in command.text
    assert committed(workdir / "checkpoints") == [4]
    assert "eval/loss" not in rig.curve(workdir)[-1]


# the first terminal that a session's leader opens becomes its controlling terminal, whose closing ends it
ON_TERMINAL = """
import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_closed_terminal_ends_a_run_with_a_save(tmp_path):
    config = rig.drill_config(num_steps=10**6, save_every=0)
    workdir, file = tmp_path / "run", rig.write_config(tmp_path / "config.py", config)
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", ON_TERMINAL, "-m", "moe_jax.train", f"--config={file}", f"--workdir={workdir}"]
    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    with subprocess.Popen(command, cwd=rig.REPO, env=os.environ | {"TERM": "xterm"}, **streams) as process:
        os.close(theirs)
        while rig.steps_logged(workdir) < 7:
            os.read(ours, 2**16)  # its output
        os.close(ours)
        assert process.wait(HANG_SECONDS) == 128 + signal.SIGHUP
    done = committed(workdir / "checkpoints")[-1]
    assert 7 <= rig.steps_logged(workdir) == done


def signalled(uninterrupted, workdir, number):
    """A training command that gets the signal after its 7th step or a little later."""
    command = rig.start_training(uninterrupted / "config.py", workdir, accident="pace=0.1")
    rig.wait_until(lambda: rig.steps_logged(workdir) >= 7, command)
    command.process.send_signal(number)
    return command


def test_a_second_signal_does_not_disturb_the_save_of_the_first(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    command = rig.start_training(uninterrupted / "config.py", workdir, accident="pace=0.1,slow=0.6")
    rig.wait_until(lambda: rig.steps_logged(workdir) >= 2, command)
    for _ in range(9):  # every 50 ms, the last ones well inside the save
        command.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert command.wait() == 143, command.text
    assert committed(workdir / "checkpoints") == [rig.steps_logged(workdir)]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE of Linux")
def test_a_full_disk_ends_the_run_with_a_message_and_the_save_before_can_be_restored(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    command = rig.start_training(uninterrupted / "config.py", workdir, accident="full=10")
    assert command.wait() not in (0, None)
    assert "File too large" in command.text
    assert committed(workdir / "checkpoints") == [5]
    assert int(rig.restored(CONFIG, workdir).step) == 5


def test_three_non_finite_steps_in_a_row_end_the_run_with_step_and_tensor(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    command = rig.start_training(uninterrupted / "config.py", workdir, accident="poison=6")
    assert command.wait() == 2, command.text
    (line,) = [line for line in command.text.splitlines() if line.startswith("error:")]
    assert "step 8" in line
    assert "3 times in a row" in line
    assert "first: loss" in line
    assert "optimizer.learning_rate" in line
    assert "Traceback" not in command.text
    assert committed(workdir / "checkpoints") == [5]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rig.restored(CONFIG, workdir)))
    assert [r["loss"] is None for r in rig.curve(workdir)] == [False] * 6 + [True] * 3


def test_a_training_command_prints_what_it_did_and_nothing_else(uninterrupted):
    lines = (uninterrupted / "run.0.log").read_text().splitlines()
    assert lines.pop(0).startswith("experts multiply in ")
    assert lines[0].startswith("train step 1/20")
    assert lines[-2].startswith("20 of 20 steps done")
    assert all(line.startswith("train step ") for line in [*lines[:-2], lines[-1]])
