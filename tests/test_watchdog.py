"""Laws of the watchdog: it bites when the oldest work is not finished in time, names it, and at nothing else."""

import threading

import pytest

from moe_jax import distributed
from moe_jax.watchdog import Watchdog

TIMEOUT = 0.2


class Result:
    """As much of a jax.Array as the watchdog looks at."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


@pytest.fixture
def bitten(monkeypatch):
    """An event, set with `message` when the watchdog ends the process."""
    event = threading.Event()

    def end(message):
        event.message = message
        event.set()

    monkeypatch.setattr(distributed, "end", end)
    return event


def begin(watchdog, kind, number, ready):
    watchdog.watch(kind, number).result = None if ready is None else Result(ready)


@pytest.mark.parametrize("ready", [False, None])
def test_the_oldest_unfinished_step_is_named(bitten, ready):
    watchdog = Watchdog(TIMEOUT)
    begin(watchdog, "step", 0, True)
    begin(watchdog, "step", 1, True)
    begin(watchdog, "step", 2, ready)  # dispatched and not computed, or stuck in the dispatch itself
    begin(watchdog, "step", 3, False)
    assert bitten.wait(20 * TIMEOUT)
    assert bitten.message.startswith("step 2 has not finished within step_timeout_seconds=0.2 (process 0 of 1)")


def test_finished_work_and_waiting_for_work_are_not_stuck(bitten):
    watchdog = Watchdog(TIMEOUT)
    for n in range(3):
        begin(watchdog, "step", n, True)
    assert not bitten.wait(4 * TIMEOUT)
    watchdog.close()


def test_the_first_of_a_kind_compiles_and_is_not_timed(bitten):
    watchdog = Watchdog(TIMEOUT)
    begin(watchdog, "step", 0, False)
    begin(watchdog, "evaluation batch", 0, False)
    assert not bitten.wait(4 * TIMEOUT)
    begin(watchdog, "evaluation batch", 1, False)
    assert bitten.wait(20 * TIMEOUT)
    assert bitten.message.startswith("evaluation batch 1 has not finished")


def test_zero_watches_nothing_but_knows_what_is_done(bitten):
    watchdog = Watchdog(0)
    for n in range(3):
        begin(watchdog, "step", n, False)
    assert watchdog.doing == "step 2"
    assert not bitten.wait(0.2)
