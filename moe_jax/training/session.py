"""One session of a run, from the state it begins with to its last save: the loop around the train step."""

import functools
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, NamedTuple

import jax

from moe_jax.config import resolve
from moe_jax.mesh import make_mesh
from moe_jax.runtime import processes
from moe_jax.runtime.checkpoint import Checkpointer
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.log import RunLog
from moe_jax.runtime.profiling import Profiler, steps_to_trace
from moe_jax.runtime.signals import Abandoned, noted
from moe_jax.runtime.sinks import open_trackers
from moe_jax.runtime.workdir import claim, record_run, versions, write_run
from moe_jax.training.actions import Evaluate, Log, Save, Show, Stop, Trace, WatchForRollback
from moe_jax.training.attempts import take_over, why_finished
from moe_jax.training.hooks import Context, Hook, Now, TokenCount
from moe_jax.training.rollback import GoBack, go_back, recorded
from moe_jax.training.setup import Outcome, Setup
from moe_jax.training.start import start
from moe_jax.training.state import TrainState
from moe_jax.training.stragglers import Stragglers
from moe_jax.training.timed import TimedStep, timed_batches


def train(setup: Setup, hooks: Sequence[Hook], last: int, profile: int) -> Outcome:
    """Claim the workdir and train up to `last` steps, unless the run in it is finished; go back where that is due.

    Args:
        setup: the checked config, its data and its workdir.
        hooks: what to do after the hooks of every run.
        last: the steps done at the end.
        profile: number of steps to trace; 0 for none.
    """
    config, workdir = setup.config, setup.workdir
    resolve(config, jax.device_count(), jax.devices()[0].platform)
    with claim(workdir):
        if line := processes.by_first(lambda: why_finished(config, workdir)):
            setup.display.say(line)
            return Outcome(config.num_steps, None, {})
        while True:
            try:
                return _train(setup, hooks, last, profile)
            except GoBack as steps:
                gone_back = functools.partial(go_back, config, workdir, setup.ledger, steps)
                setup.display.say(processes.by_first(gone_back))
            setup = setup._replace(ledger=Ledger(stopped_seconds=setup.watchdog.stopped_seconds))
            profile = 0  # a trace is of the first steps of a start


class Session(NamedTuple):
    """What a session has before its first step, besides the context of its hooks.

    state: that it begins with, after `first` steps. made_by: versions, identity and rollbacks, stored in every
    checkpoint.
    about: the content of run.json until the session ends.
    """

    state: TrainState
    first: int
    checkpoints: Checkpointer
    made_by: dict[str, Any]
    about: dict[str, Any]


@contextmanager
def _opened(setup: Setup) -> Iterator[tuple[Context, Session]]:
    """Restore or initialise the state, open the log and the checkpoints, and note signals, while the block runs."""
    config, workdir, corpus, ledger, display, watchdog = setup
    mesh = make_mesh(config.mesh)
    state, extra, identity, remarks, rollbacks = start(config, mesh, workdir, corpus)
    first = int(state.step)
    made_by = versions() | {"identity": identity._asdict()} | recorded(rollbacks)
    seconds = extra.get("seconds", {})
    ended, more = processes.by_first(lambda: take_over(config, workdir, ledger, first, seconds, len(rollbacks)))
    about = made_by | ended
    with ExitStack() as stack:  # each is closed, whatever error another one raises
        log = None
        if processes.index() == 0:
            log = stack.enter_context(closing(RunLog(workdir, first, open_trackers(config, workdir, about))))
        checkpoints = Checkpointer(workdir / "checkpoints", config.checkpoint.keep, first)
        stack.enter_context(closing(checkpoints))
        # only now, because `start` may have refused a checkpoint of another shape
        processes.by_first(lambda: record_run(workdir, config, about))
        for line in [*more, *remarks]:
            display.say(line)
        stopped = stack.enter_context(noted())  # a second signal must not end the save that the first one caused
        tokens = TokenCount(ledger, extra.get("tokens_seen", 0))
        context = Context(config, workdir, corpus, mesh, ledger, tokens, display, watchdog, log, stopped, rollbacks)
        yield context, Session(state, first, checkpoints, made_by, about)


def _train(setup: Setup, hooks: Sequence[Hook], last: int, profile: int) -> Outcome:
    """Train in the claimed workdir up to `last` steps, then save and close.

    Raises:
        GoBack: the run is to go back; nothing is being saved or logged any more.
    """
    config, workdir = setup.config, setup.workdir
    with _opened(setup) as (context, session):
        first = session.first
        trace = Trace(Profiler(workdir / "profile", *steps_to_trace(profile, first, last)))
        save = Save(config, session.checkpoints, session.made_by)
        evaluation = Evaluate(config, beside=hooks)
        train_step = TimedStep(context)
        log = Log(config, context.mesh, evaluation, Stragglers(context.ledger, lambda: train_step.before_dispatch))
        # an evaluation may take long and fail: the line and the save of its step come before
        in_order = [trace, log, WatchForRollback(config, log), save, evaluation, *hooks, Show(), Stop()]
        try:
            with context.display.running(first):
                state, done = _steps(context, train_step, in_order, session.state, first, last)
        except FloatingPointError as error:
            if context.log is not None:
                write_run(workdir, session.about | {"diverged": str(error)})
            raise
        if number := context.stopped():
            context.display.say(f"{signal.Signals(number).name}: saving step {done}")
        save.finish(context, state, done)
        where_the_time_went = context.ledger.summary(done)
    if done > first and context.log is not None:
        write_run(workdir, session.about | where_the_time_went)
    return Outcome(done, number, evaluation.found)


def _steps(
    context: Context, train_step: TimedStep, hooks: Sequence[Hook], state: TrainState, first: int, last: int
) -> tuple[TrainState, int]:
    """Run the steps from `first` to before `last`, or until a signal arrives; returns the state and the steps done."""
    done = first
    with ExitStack() as at_the_end:
        for hook in hooks:
            at_the_end.callback(hook.close, context)
            hook.begin(context, state)
        with suppress(Abandoned), context.ledger("step"):
            for step, batch in timed_batches(context, first, last, train_step):
                now = Now(step, state, batch, {})
                due = [hook for hook in hooks if hook.is_due(now.done)]
                for hook in due:
                    now.values.update(hook.before(context, now))
                state, values = train_step(now)
                done = now.done
                now = Now(step, state, batch, values | now.values)
                for hook in due:
                    hook.after(context, now)
    return state, done
