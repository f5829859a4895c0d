"""Laws of the ledger: every second is charged once, over all attempts, and the time of repeated work is lost."""

import contextlib

from conftest import Clock
from moe_jax.runtime.ledger import KINDS, Ledger, of_earlier_attempts


def spend(ledger, clock, *parts):
    for kind, seconds in parts:
        with ledger(kind):
            clock.time += seconds


def test_the_kinds_add_up_to_the_wall_time(clock):
    ledger = Ledger(clock)
    spend(ledger, clock, ("init", 2.0), ("compile", 8.0), ("data", 0.25), ("step", 1.0), ("evaluation", 0.5))
    spend(ledger, clock, ("checkpoint", 0.125), ("lost", 0.0), ("step", 3.0))
    assert sum(ledger.seconds.values()) == clock.time - 100.0 == 14.875
    assert ledger.seconds["step"] == 4.0
    assert ledger.goodput == 4.0 / 14.875


def test_a_block_has_its_own_time_and_not_that_of_the_blocks_in_it(clock):
    ledger = Ledger(clock)
    clock.time += 2.0  # before the first block
    with ledger("step"):
        clock.time += 8.0
        with ledger("evaluation"):
            clock.time += 4.0
            with ledger("lost"):
                clock.time += 1.0
        clock.time += 16.0
    assert ledger.seconds == dict.fromkeys(KINDS, 0.0) | {"init": 2.0, "step": 24.0, "evaluation": 4.0, "lost": 1.0}


def test_the_seconds_are_those_up_to_now_in_the_middle_of_a_block(clock):
    ledger = Ledger(clock)
    with ledger("step"):
        clock.time += 8.0
        assert ledger.seconds["step"] == ledger.columns()["time/step"] == 8.0
        clock.time += 2.0
    assert ledger.seconds["step"] == 10.0


def test_the_kind_of_a_block_may_be_determined_at_its_end(clock):
    ledger = Ledger(clock)
    works = True
    with ledger(lambda: "step" if works else "data"):
        clock.time += 3.0
        works = False
    assert (ledger.seconds["data"], ledger.seconds["step"]) == (3.0, 0.0)


def test_a_block_cut_off_by_an_error_is_lost_and_the_block_around_it_is_charged_as_before(clock):
    ledger = Ledger(clock)
    with ledger("step"):
        with contextlib.suppress(MemoryError), ledger("evaluation"):
            clock.time += 5.0
            raise MemoryError
        clock.time += 1.0
    assert (ledger.seconds["evaluation"], ledger.seconds["lost"], ledger.seconds["step"]) == (0.0, 5.0, 1.0)


def test_speed_counts_only_steps_and_waits_for_their_data(clock):
    ledger = Ledger(clock)
    spend(ledger, clock, ("init", 5.0), ("compile", 10.0))
    ledger.count(1000)  # of the step that compiled
    ledger.restart()
    spend(ledger, clock, ("data", 1.0), ("step", 3.0), ("evaluation", 50.0), ("checkpoint", 50.0))
    assert ledger.count(800) == 800
    assert ledger.speed() == (200.0, 0.25)  # 800 tokens in 4 s, 1 of them without a batch


def test_the_steps_since_a_checkpoint_are_charged_to_a_rollback_and_nothing_else(clock):
    ledger = Ledger(clock)
    spend(ledger, clock, ("step", 4.0), ("data", 1.0))
    saved = ledger.seconds
    spend(ledger, clock, ("compile", 2.0), ("step", 8.0), ("data", 0.5), ("evaluation", 3.0), ("checkpoint", 0.25))
    ledger.roll_back(saved)
    seconds = ledger.seconds
    assert seconds["rolled_back"] == 11.5
    assert (seconds["step"], seconds["data"], seconds["evaluation"]) == (4.0, 1.0, 0.0)
    assert (seconds["compile"], seconds["checkpoint"]) == (2.0, 0.25)


def test_without_a_timed_step_there_is_no_speed_and_no_goodput(clock):
    ledger = Ledger(clock)
    assert ledger.speed() == (None, None)
    assert ledger.goodput is None
    ledger.count(10)
    spend(ledger, clock, ("compile", 1.0))
    assert ledger.speed() == (None, None)


def test_the_log_and_run_json_have_the_same_seconds(clock):
    ledger = Ledger(clock)
    spend(ledger, clock, ("init", 1.5), ("step", 4.5))
    columns, summary = ledger.columns(), ledger.summary(7)
    assert {key.removeprefix("time/"): value for key, value in columns.items() if "/" in key} == summary["time"]
    assert columns["goodput"] == summary["goodput"] == 0.75
    assert (summary["step"], summary["seconds"]) == (7, 6.0)


SAVED = {"init": 2.0, "step": 10.0}  # at the checkpoint of step 50


def logged(**seconds):
    return {f"time/{kind}": spent for kind, spent in seconds.items()}


def test_a_first_attempt_has_nothing_before_it():
    assert of_earlier_attempts(0, {}, {}, {}) == dict.fromkeys(KINDS, 0.0)


def test_time_of_repeated_steps_is_lost():
    # killed after 4 s of steps since its checkpoint, which are in the log
    before = of_earlier_attempts(50, SAVED, {}, logged(init=2.0, step=14.0))
    assert before == dict.fromkeys(KINDS, 0.0) | SAVED | {"lost": 4.0}


def test_the_whole_time_of_an_attempt_without_a_checkpoint_is_lost():
    assert of_earlier_attempts(0, {}, {}, logged(init=2.0, step=14.0))["lost"] == 16.0


def test_no_time_is_lost_of_an_attempt_that_ended_normally():
    # run.json also has the second of the last save, which cannot be in that checkpoint
    ended = {"step": 50, "time": SAVED | {"checkpoint": 1.0}}
    assert of_earlier_attempts(50, SAVED, ended, logged(**SAVED)) == dict.fromkeys(KINDS, 0.0) | ended["time"]


def test_a_crash_after_an_attempt_that_ended_normally_loses_only_its_own_time():
    # ended at step 50 after 13 s; the next attempt was killed at 20 s, without a checkpoint of its own
    ended = {"step": 50, "time": SAVED | {"checkpoint": 1.0}}
    assert of_earlier_attempts(50, SAVED, ended, logged(**SAVED, checkpoint=1.0, compile=7.0))["lost"] == 7.0


def test_losses_add_up_over_attempts():
    # the checkpoint of the second attempt includes the time that the first one lost
    saved = SAVED | {"lost": 4.0}
    assert of_earlier_attempts(60, saved, {"step": 20, "time": {"step": 5.0}}, logged(step=17.0))["lost"] == 5.0


def test_carried_seconds_count_in_the_total_and_not_in_the_speed(clock):
    ledger = Ledger(clock)
    ledger.carry({"step": 30.0, "lost": 10.0})
    ledger.restart()
    spend(ledger, clock, ("step", 10.0))
    ledger.count(50)
    assert ledger.speed() == (5.0, 0.0)
    assert ledger.goodput == 0.8  # 40 of 50


def test_time_in_which_the_process_was_stopped_is_lost(clock):
    stopped = Clock()
    ledger = Ledger(clock, stopped)
    spend(ledger, clock, ("compile", 5.0))
    stopped.time += 40.0  # of the 42 s until the step was done
    spend(ledger, clock, ("step", 42.0), ("step", 3.0))
    assert (ledger.seconds["step"], ledger.seconds["lost"]) == (5.0, 40.0)
    assert sum(ledger.seconds.values()) == clock.time - 100.0
