"""Laws of the watchdog: it ends the process if and only if the oldest work is not finished in time, and names it."""

import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import pytest
from drills import rig

from conftest import HANG_SECONDS
from moe_jax.runtime import processes
from moe_jax.runtime.watchdog import Awake, Watchdog

TIMEOUT = 10.0


class Result:
    """The part of a jax.Array that the watchdog reads."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


@pytest.fixture
def watchdog(clock, monkeypatch):
    monkeypatch.setattr(processes, "end", lambda message: None)  # its own thread sees the same clock
    with closing(Watchdog(TIMEOUT, clock)) as watchdog:
        yield watchdog


def begin(watchdog, kind, number, ready):
    watchdog.watch(kind, number).result = None if ready is None else Result(ready)


def after(watchdog, clock, seconds):
    """The work that is overdue after a number of seconds, checked every second."""
    for _ in range(seconds):
        clock.time += 1.0
        name = watchdog.overdue()
    return name


@pytest.mark.parametrize("ready", [False, None])
def test_the_oldest_unfinished_step_is_named(watchdog, clock, ready):
    begin(watchdog, "step", 0, True)
    begin(watchdog, "step", 1, True)
    begin(watchdog, "step", 2, ready)  # dispatched and not computed, or stuck in the dispatch itself
    begin(watchdog, "step", 3, False)
    assert watchdog.overdue() is None  # sees that step 1 is finished
    assert after(watchdog, clock, 10) is None
    assert after(watchdog, clock, 1) == "step 2"


def test_the_process_ends_with_a_message(monkeypatch):
    event = threading.Event()

    def end(message):
        event.message = message
        event.set()

    monkeypatch.setattr(processes, "end", end)
    watchdog = Watchdog(0.2)
    begin(watchdog, "step", 0, True)
    begin(watchdog, "step", 1, False)
    assert event.wait(HANG_SECONDS)
    assert event.message.startswith("step 1 has not finished within step_timeout_seconds=0.2 (process 0 of 1)")


def test_once_closed_no_thread_and_no_result_is_left():
    """A thread that frees an array while the interpreter shuts down aborts the process."""
    before = set(threading.enumerate())
    watchdog = Watchdog(60)
    begin(watchdog, "step", 0, True)
    begin(watchdog, "step", 1, True)
    held = weakref.ref(watchdog._under_way[0].result)
    assert set(threading.enumerate()) != before
    watchdog.close()
    assert set(threading.enumerate()) == before
    assert held() is None


def test_finished_work_and_waiting_for_work_are_not_stuck(watchdog, clock):
    for n in range(3):
        begin(watchdog, "step", n, True)
    assert after(watchdog, clock, 100) is None


def test_the_first_of_a_kind_compiles_and_is_not_timed(watchdog, clock):
    begin(watchdog, "step", 0, False)
    begin(watchdog, "evaluation batch", 0, False)
    assert after(watchdog, clock, 100) is None
    begin(watchdog, "evaluation batch", 1, False)
    assert after(watchdog, clock, 11) == "evaluation batch 1"


def test_zero_watches_nothing_but_knows_what_is_done(clock):
    watchdog = Watchdog(0, clock)
    for n in range(3):
        begin(watchdog, "step", n, False)
    assert watchdog.doing == "step 2"
    assert after(watchdog, clock, 100) is None
    assert watchdog.stopped_seconds() == 0.0


def test_time_in_which_the_process_was_stopped_does_not_count(watchdog, clock):
    begin(watchdog, "step", 0, True)
    begin(watchdog, "step", 1, False)
    assert after(watchdog, clock, 7) is None
    clock.time += 1000.0  # two of them count, because one reading of the clock may be late
    assert watchdog.overdue() is None
    assert watchdog.stopped_seconds() == 998.0
    assert after(watchdog, clock, 1) is None
    assert after(watchdog, clock, 1) == "step 1"


def test_time_is_split_into_what_the_process_ran_and_what_it_was_stopped_for(clock):
    awake = Awake(0.5, clock)
    for seconds in (0.5, 0.75, 31.0, 0.5):
        clock.time += seconds
        ran, stopped = awake.look()
    assert (ran, stopped) == (2.75, 30.0)


STOPPED = """
import sys, time
from moe_jax.runtime.watchdog import Watchdog

class Ready:
    def is_ready(self): return True

watchdog = Watchdog(4)
watchdog.watch("step", 0).result = Ready()
work = watchdog.watch("step", 1)
print("under way", flush=True)
sys.stdin.readline()
time.sleep(1)  # awake again, and not finished yet
work.result = Ready()
print("finished")
"""


def test_a_process_that_was_stopped_for_longer_than_the_limit_finishes_its_step():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", STOPPED], cwd=rig.REPO, **pipes) as process:
        assert process.stdout.readline() == "under way\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)  # the limit is 4
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate("\n", timeout=HANG_SECONDS)
    assert (process.returncode, out) == (0, "finished\n"), err
