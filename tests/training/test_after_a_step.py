"""Laws of the loop: actions after a step have a fixed order, and one that fails or is cut off loses nothing else."""

import json
import shutil
import signal
import threading
from contextlib import contextmanager

import numpy as np
import optax
import pytest
from drills import rig

from moe_jax.analysis import interference, specialisation
from moe_jax.analysis.observer import Measure, observers
from moe_jax.analysis.survey import store_routing, survey
from moe_jax.data import open_corpus
from moe_jax.mesh import make_mesh
from moe_jax.runtime.checkpoint import Checkpointer, committed
from moe_jax.runtime.display import Display
from moe_jax.runtime.log import RunLog
from moe_jax.runtime.profiling import Profiler
from moe_jax.runtime.signals import Abandoned, noted
from moe_jax.training import actions, compile, evaluation, session
from moe_jax.training.attempts import is_unaccounted
from moe_jax.training.evaluation import Totals, held_out
from moe_jax.training.hooks import Hook
from moe_jax.training.loop import run
from moe_jax.training.state import init_state

SHORT = rig.drill_config(num_steps=4, save_every=2, eval_every=2)
LONG_EVALUATION = rig.drill_config(num_steps=4, save_every=0, eval_every=2, data=dict(eval_sequences=32))
ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def evaluated(workdir):
    """The steps whose lines have an evaluation."""
    return [line["step"] for line in rig.curve(workdir) if "eval/loss" in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function that returns the curve of an undisturbed run."""
    curves = {}

    def curve(config):
        if config not in curves:
            folder = tmp_path_factory.mktemp("undisturbed")
            run(config, folder, quiet=True)
            curves[config] = rig.curve(folder)
        return curves[config]

    return curve


# --- the order ------------------------------------------------------------------------------------------------


class Events(list):
    """Events of a run, each with the number of steps done, in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        self._monkeypatch = monkeypatch

    def spy(self, where, name, word, done):
        """Add `word` whenever a function is called."""
        real = getattr(where, name)

        def spied(*args, **kwargs):
            self.append(f"{word} {done(*args)}")
            return real(*args, **kwargs)

        self._monkeypatch.setattr(where, name, spied)

    def spy_on_steps(self):
        """Add the train step."""
        real = compile.make_train_step

        def make(config, mesh=None):
            def train_step(state, batch, key):
                self.append(f"step {int(state.step) + 1}")
                return real(config, mesh)(state, batch, key)

            return train_step

        self._monkeypatch.setattr(compile, "make_train_step", make)

    def spy_on_signals(self):
        """Add every check for a signal; processes must check equally often and in the same places."""

        @contextmanager
        def noted():
            yield lambda: self.append("stop?")

        self._monkeypatch.setattr(session, "noted", noted)

    def spy_on_files(self):
        """Add log lines, saves, evaluations."""
        self.spy(RunLog, "write", "log", lambda log, step, *_: step + 1)
        self.spy(Checkpointer, "save", "save", lambda checkpoints, step, *_: step)
        self.spy(actions, "evaluate", "evaluate", lambda config, state, *_: int(state.step))
        self.spy(RunLog, "amend", "amend", lambda log, step, _: step + 1)


@pytest.fixture
def events(monkeypatch):
    """The events of a run, in order; a test selects what is recorded."""
    return Events(monkeypatch)


def test_after_a_step_come_its_line_then_its_save_then_its_evaluation_which_is_added_to_the_line(tmp_path, events):
    events.spy_on_files()
    run(SHORT, tmp_path, quiet=True)
    due = ["log 1", "log 2", "save 2", "evaluate 2", "amend 2", "log 3", "log 4", "save 4", "evaluate 4", "amend 4"]
    # saved once more at the end, as in a run that is stopped anywhere; that checkpoint exists already
    assert events == [*due, "save 4"]


def test_signals_are_checked_before_and_after_every_step_and_between_held_out_batches(tmp_path, events):
    config = rig.drill_config(num_steps=2, save_every=2, measure_every=2, data=dict(eval_sequences=1))
    events.spy_on_files()
    events.spy_on_steps()
    events.spy_on_signals()
    events.spy(interference, "make_measure_step", "measure", lambda *_: 2)
    events.spy(specialisation, "store_ids", "routing", lambda workdir, step, *_: step)
    events.spy(Display, "step", "show", lambda display, done: done)
    run(config, tmp_path, hooks=observers(config), quiet=True)
    first = ["stop?", "step 1", "log 1", "show 1", "stop?"]
    second = ["measure 2", "stop?", "step 2", "log 2", "save 2"]
    evaluation = ["evaluate 2", "stop?", "stop?", "routing 2", "amend 2"]  # each reads one batch
    assert events == [*first, *second, *evaluation, "show 2", "stop?", "stop?", "save 2"]


def test_a_trace_begins_before_the_measures_of_its_first_step_and_ends_before_the_line_of_its_last(tmp_path, events):
    config = rig.drill_config(num_steps=4, save_every=0, measure_every=1)
    events.spy(Profiler, "_start", "trace", lambda profiler: "begins")
    events.spy(Profiler, "close", "trace", lambda profiler: "ends")
    events.spy(interference, "make_measure_step", "measure", lambda *_: "")
    events.spy(RunLog, "write", "log", lambda log, step, *_: step + 1)
    run(config, tmp_path, hooks=observers(config), quiet=True, profile=1)
    assert events[4:9] == ["trace begins", "measure ", "trace ends", "log 3", "measure "]


def test_a_line_has_its_evaluation_and_every_step_one_line(tmp_path):
    run(SHORT, tmp_path, quiet=True)
    assert [line["step"] for line in rig.curve(tmp_path)] == [0, 1, 2, 3]
    assert evaluated(tmp_path) == [1, 3]


# --- custom hooks ---------------------------------------------------------------------------------------------


class Spy(Hook):
    """A hook that records its calls, and has numbers to add."""

    every = 2

    def __init__(self, events):
        self.events = events

    def begin(self, context, state):
        self.events.append(f"begin {int(state.step)}")

    def before(self, context, now):
        self.events.append(f"before {now.done}")
        return {"mine/norm": optax.tree.norm(now.state.params)}

    def after(self, context, now):
        assert int(now.state.step) == now.done and np.isfinite(now.values["loss"])
        self.events.append(f"after {now.done}")

    def evaluate(self, context, state):
        self.events.append(f"evaluate mine {int(state.step)}")
        return {"eval/mine": 7.0}

    def close(self, context):
        self.events.append("close")


def test_a_hook_is_called_at_its_interval_after_the_built_in_ones_and_its_numbers_are_logged(
    tmp_path, events, undisturbed
):
    events.spy_on_files()
    events.spy_on_steps()
    run(SHORT, tmp_path, hooks=[Spy(events)], stop_at=2, quiet=True)
    first = ["begin 0", "step 1", "log 1"]
    second = ["before 2", "step 2", "log 2", "save 2", "evaluate 2", "evaluate mine 2", "amend 2", "after 2"]
    assert events == [*first, *second, "close", "save 2"]
    lines = rig.curve(tmp_path)
    assert ["mine/norm" in line for line in lines] == [False, True]
    assert [line.pop("eval/mine", 0.0) for line in lines] == [0.0, 7.0]
    assert [{k: v for k, v in line.items() if k != "mine/norm"} for line in lines] == undisturbed(SHORT)[:2]


def test_a_hook_that_fails_loses_no_line_save_or_evaluation_and_every_hook_is_closed(tmp_path, events):
    class Fails(Hook):
        def after(self, context, now):
            if now.done == 2:
                raise MemoryError("too large")

    with pytest.raises(MemoryError):
        run(SHORT, tmp_path, hooks=[Fails(), Spy(events)], quiet=True)
    assert committed(tmp_path / "checkpoints") == [2]
    assert evaluated(tmp_path) == [1]
    assert events == ["begin 0", "before 2", "evaluate mine 2", "close"]


def test_steps_on_several_cpu_devices_do_not_run_ahead_of_each_other(tmp_path):
    """XLA:CPU ends the process if 32 of them do, because their threads wait for each other."""
    ready = []

    class Looks(Hook):
        every = 1

        def after(self, context, now):
            ready.append(now.values["loss"].is_ready())

    run(rig.drill_config(num_steps=6, log_every=100, mesh=dict(data=4)), tmp_path, hooks=[Looks()], quiet=True)
    assert ready == [True] * 6


@pytest.mark.parametrize("key", ["measure_every", "record_scores_every"])
def test_an_interval_of_the_config_that_no_hook_has_is_refused(tmp_path, key):
    config = rig.drill_config(**{key: 2})
    with pytest.raises(ValueError, match=rf"{key}=2 has no hook; add observers\(config\)"):
        run(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    assert [hook.key for hook in observers(config)] == [key]


# --- an evaluation that fails ---------------------------------------------------------------------------------


def test_an_evaluation_that_raises_loses_no_save_and_is_repeated_by_the_next_start(tmp_path, monkeypatch, undisturbed):
    def too_large(*_, **__):
        raise MemoryError("too large")

    real = actions.evaluate
    monkeypatch.setattr(actions, "evaluate", too_large)
    for _ in range(2):  # the next start fails in the evaluation that it repeats
        with pytest.raises(MemoryError):
            run(SHORT, tmp_path, quiet=True)
        assert committed(tmp_path / "checkpoints") == [2]
    monkeypatch.setattr(actions, "evaluate", real)
    run(SHORT, tmp_path, quiet=True)
    assert rig.curve(tmp_path) == undisturbed(SHORT)


def test_a_missing_final_evaluation_is_repeated_once_by_the_same_command(tmp_path, monkeypatch, undisturbed):
    def fail_at_the_end(config, state, *rest, **options):
        if int(state.step) == 4:
            raise MemoryError("too large")
        return real(config, state, *rest, **options)

    real = actions.evaluate
    monkeypatch.setattr(actions, "evaluate", fail_at_the_end)
    with pytest.raises(MemoryError):
        run(SHORT, tmp_path, quiet=True)
    assert committed(tmp_path / "checkpoints") == [2, 4]
    assert evaluated(tmp_path) == [1]
    monkeypatch.setattr(actions, "evaluate", real)
    outcome = run(SHORT, tmp_path, quiet=True)
    assert (outcome.step, outcome.evaluation["eval/loss"]) == (4, rig.curve(tmp_path)[-1]["eval/loss"])
    assert rig.curve(tmp_path) == undisturbed(SHORT)
    monkeypatch.setattr(actions, "evaluate", fail_at_the_end)
    assert run(SHORT, tmp_path, quiet=True).step == 4  # nothing is missing any more


def test_a_trace_that_cannot_be_written_is_reported_and_loses_no_save(tmp_path, monkeypatch, capsys):
    def close(self):
        if self._local is not None:
            self._local = None
            raise OSError("No space left on device")

    monkeypatch.setattr(Profiler, "close", close)
    monkeypatch.setattr(Profiler, "_start", lambda self: setattr(self, "_local", self._folder))
    assert run(SHORT, tmp_path, profile=1).step == 4
    assert committed(tmp_path / "checkpoints") == [2, 4]
    assert "the trace could not be written: No space left on device" in capsys.readouterr().out


def test_a_checkpoint_that_fails_in_the_background_does_not_keep_the_log_open(tmp_path, monkeypatch):
    def close(self):
        raise OSError("No space left on device")

    closed = []
    real = RunLog.close
    monkeypatch.setattr(RunLog, "close", lambda self: (real(self), closed.append(self)))
    monkeypatch.setattr(Checkpointer, "close", close)
    with pytest.raises(OSError, match="No space left"):
        run(SHORT, tmp_path, stop_at=1, quiet=True)
    assert len(closed) == 1


# --- a signal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_during_an_evaluation_saves_and_ends_before_the_next_batch(tmp_path, monkeypatch, undisturbed, number):
    batches = []

    def add(self, sums):
        batches.append(sums)
        if len(batches) == 3:
            signal.raise_signal(number)
        return real(self, sums)

    real = Totals.add
    monkeypatch.setattr(Totals, "add", add)
    outcome = run(LONG_EVALUATION, tmp_path, quiet=True)
    assert (outcome.step, outcome.signal, len(batches)) == (2, number, 3)
    assert committed(tmp_path / "checkpoints") == [2]
    assert (rig.steps_logged(tmp_path), evaluated(tmp_path)) == (2, [])
    run(LONG_EVALUATION, tmp_path, quiet=True)
    assert rig.curve(tmp_path) == undisturbed(LONG_EVALUATION)


def test_a_signal_while_a_missing_evaluation_is_repeated_ends_it(tmp_path, monkeypatch):
    def add(self, sums):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Totals, "add", add)
    for _ in range(2):
        assert run(LONG_EVALUATION, tmp_path, quiet=True)[:2] == (2, signal.SIGTERM)
    assert evaluated(tmp_path) == []


def test_a_signal_before_the_routing_is_stored_leaves_both_for_the_next_start(tmp_path, monkeypatch):
    config = rig.drill_config(num_steps=2, save_every=0, measure_every=2)
    real = actions.evaluate

    def then_a_signal(*args, **options):
        found = real(*args, **options)
        signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(actions, "evaluate", then_a_signal)
    assert run(config, tmp_path, hooks=observers(config), quiet=True)[:2] == (2, signal.SIGTERM)
    assert evaluated(tmp_path) == [] and not (tmp_path / "routing").exists()
    monkeypatch.setattr(actions, "evaluate", real)
    assert run(config, tmp_path, hooks=observers(config), quiet=True)[:2] == (2, None)
    assert evaluated(tmp_path) == [1] and (tmp_path / "routing" / "2.npy").is_file()


def test_a_signal_while_a_step_is_measured_comes_before_the_step(tmp_path, monkeypatch):
    def before(self, context, now):
        if now.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    monkeypatch.setattr(Measure, "before", before)
    assert run(SHORT, tmp_path, hooks=[Measure(1)], quiet=True)[:2] == (2, signal.SIGTERM)
    assert committed(tmp_path / "checkpoints") == [2]


def test_every_reader_of_the_held_out_set_stops_between_two_batches():
    config, corpus = LONG_EVALUATION, open_corpus()
    mesh = make_mesh(config.mesh)
    state, answers = init_state(config), [None, signal.SIGTERM]
    batches = held_out(config, corpus, mesh, lambda: answers.pop(0))
    next(batches)
    with pytest.raises(Abandoned, match="left unfinished because of SIGTERM"):
        next(batches)
    with pytest.raises(Abandoned):
        survey(config, state, corpus, mesh, lambda: signal.SIGTERM)
    with pytest.raises(Abandoned):
        evaluation.evaluate(config, state, corpus, mesh, stopped=lambda: signal.SIGTERM)
    measured = rig.drill_config(measure_every=1)
    with pytest.raises(Abandoned):
        store_routing(measured, state, corpus, mesh, None, stopped=lambda: signal.SIGTERM)


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a command
    try:
        with noted() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert stopped() is None
            signal.raise_signal(signal.SIGUSR1)
            assert stopped() == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_a_run_works_without_signals_and_reports_it_once(tmp_path, capsys):
    # ray-project/ray#18920: a trainer in a worker's thread
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(SHORT, tmp_path)))
    thread.start()
    thread.join()
    assert [outcome.step for outcome in outcomes] == [4]
    assert capsys.readouterr().out.count("not in the main thread") == 1


# --- a log without its checkpoints ----------------------------------------------------------------------------


def lines(file):
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_a_finished_run_stays_finished_when_its_checkpoints_are_gone(tmp_path, capsys):
    run(SHORT, tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "layers.jsonl", "run.json")}
    capsys.readouterr()
    assert run(SHORT, tmp_path, stop_at=2).step == 4
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "so the run is finished" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


def test_a_log_whose_checkpoints_are_gone_is_renamed_and_this_is_reported(tmp_path, capsys):
    config = rig.drill_config(save_every=10)
    for number in (1, 2):
        run(config, tmp_path, stop_at=3, quiet=True)
        shutil.rmtree(tmp_path / "checkpoints")
        before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "layers.jsonl")}
        capsys.readouterr()
        run(config, tmp_path, stop_at=2)
        assert f"the log is kept as {tmp_path / 'metrics.jsonl'}.{number}" in capsys.readouterr().out
        assert {name: (tmp_path / f"{name}.{number}").read_bytes() for name in before} == before
        assert lines(tmp_path / "metrics.jsonl") == lines(tmp_path / "layers.jsonl") == [0, 1]


def test_lines_before_the_checkpoint_stay_in_the_log_when_it_is_renamed(tmp_path):
    run(SHORT, tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    run(SHORT, tmp_path, stop_at=3, quiet=True)
    assert lines(tmp_path / "metrics.jsonl.1") == [0, 1, 2, 3]
    assert lines(tmp_path / "metrics.jsonl") == [0, 1, 2]


@pytest.mark.parametrize(
    ("logged", "first", "ended", "save_every", "expected"),
    [
        (0, 0, 0, 5, False),  # a new run
        (5, 5, 5, 5, False),  # ended normally
        (9, 5, 0, 5, False),  # killed before the save at 10
        (9, 7, 7, 5, False),  # stopped at 7, then killed before the save at 10
        (10, 5, 0, 5, False),  # killed during that save
        (12, 5, 0, 5, True),  # the save at 10 was started, and is gone
        (4, 0, 4, 5, True),  # had ended at 4, with a save
        (3, 0, 0, 0, True),  # nothing saves before the end
        (20, 20, 20, 0, False),
    ],
)
def test_lines_after_the_checkpoint_are_expected_up_to_the_next_save(logged, first, ended, save_every, expected):
    assert is_unaccounted(logged, first, ended, save_every) == expected


@pytest.mark.parametrize(("ended", "save_every", "expected"), [(0, 0, False), (12, 0, True), (0, 5, True)])
def test_saves_by_time_may_be_any_number_of_steps_apart(ended, save_every, expected):
    assert is_unaccounted(12, 5, ended, save_every, save_every_seconds=60.0) == expected


# --- saves by time --------------------------------------------------------------------------------------------


class Tick(Hook):
    """A step takes ten seconds."""

    def __init__(self, clock):
        self.clock = clock

    def before(self, context, now):
        self.clock.time += 10
        return {}


@pytest.mark.parametrize(
    ("save_every", "expected"),
    [
        (0, [4, 8]),  # 40 s after the start; 20 s after that, at step 6, it is too early
        (6, [4, 6, 8]),  # whichever comes first
    ],
)
def test_a_save_is_due_at_the_first_logged_step_that_many_seconds_after_the_newest(
    tmp_path, monkeypatch, clock, save_every, expected
):
    monkeypatch.setattr(actions.time, "monotonic", clock)
    timed = dict(num_steps=8, log_every=2, save_every=save_every, save_every_seconds=25.0, checkpoint=dict(keep=9))
    run(rig.drill_config(**timed), tmp_path, hooks=[Tick(clock)], quiet=True)
    assert committed(tmp_path / "checkpoints") == expected


def test_a_run_resumed_from_a_save_by_time_has_the_same_numbers(tmp_path, monkeypatch, clock, undisturbed):
    monkeypatch.setattr(actions.time, "monotonic", clock)
    config = rig.drill_config(num_steps=4, save_every=0, save_every_seconds=25.0)
    run(config, tmp_path, hooks=[Tick(clock)], quiet=True)
    assert committed(tmp_path / "checkpoints") == [3, 4]
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    (tmp_path / "run.json").unlink()  # as after a kill
    run(config, tmp_path, quiet=True)
    assert rig.curve(tmp_path) == undisturbed(config)
    assert not list(tmp_path.glob("metrics.jsonl.*"))
