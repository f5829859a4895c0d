"""The loop around the train step: data in, hooks before and after every step, and the state saved at the end."""

import signal
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moe_jax.config import Config, resolve
from moe_jax.runtime import processes
from moe_jax.runtime.display import Display
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.log import RunLog
from moe_jax.runtime.signals import Abandoned, noted
from moe_jax.runtime.watchdog import Watchdog
from moe_jax.runtime.workdir import check_workdir, claim, record_run, versions, write_run
from moe_jax.training.hooks import Context, Hook, Now, Tokens
from moe_jax.training.opening import open_data

if TYPE_CHECKING:
    from moe_jax.data import Corpus
    from moe_jax.training.state import TrainState


class Outcome(NamedTuple):
    """How a call of `run` ended: the steps done, and the signal that stopped it early, if one did."""

    step: int
    signal: int | None
    evaluation: dict[str, float | int]


def run(
    config: Config,
    workdir: Path,
    *,
    hooks: Sequence[Hook] = (),
    name: str = "train",
    stop_at: int = 0,
    quiet: bool = False,
    watchdog: Watchdog | None = None,
    profile: int = 0,
) -> Outcome:
    """Train `config` in `workdir` until `num_steps`, resuming what is there, on all devices of all processes.

    Args:
        config: validated; the same in every process.
        workdir: made if absent, seen by every process; gets config.json, metrics.jsonl, layers.jsonl, run.json,
            checkpoints/.
        hooks: what else to do around the steps, after what every run does; `analysis.observer.observers(config)`, and
            the user's own.
        name: how the progress display calls the run.
        stop_at: stop (and save) after this many steps, as if interrupted; 0 for never.
        quiet: print nothing.
        watchdog: ends the process if a step gets stuck; made from the config if None.
        profile: how many steps to trace, from the third of this start on, into workdir/profile; 0 for none.

    Raises:
        ValueError: another config's workdir, bad data, a damaged or different checkpoint, too few steps to trace, or
            an interval in the config that no hook has.
        FloatingPointError: several steps in a row were not finite.
    """
    _refuse_interval_without_hook(config, hooks)
    with closing(watchdog or Watchdog(config.step_timeout_seconds)) as watchdog:
        ledger = Ledger(stopped_seconds=watchdog.stopped_seconds)
        corpus = open_data(config)
        processes.by_first(lambda: check_workdir(workdir, config, corpus.fingerprint))
        import jax  # from here on: it takes seconds, and a mistake is reported before

        from moe_jax.training.attempts import why_finished

        resolve(config, jax.device_count(), jax.devices()[0].platform)
        with claim(workdir):
            display = Display(name, config.num_steps, quiet or processes.index() > 0)
            if line := processes.by_first(lambda: why_finished(config, workdir)):
                display.say(line)
                return Outcome(config.num_steps, None, {})
            last = min(stop_at or config.num_steps, config.num_steps)
            return _train(config, workdir, corpus, ledger, display, watchdog, hooks, last, profile)


def _refuse_interval_without_hook(config: Config, hooks: Sequence[Hook]) -> None:
    for key in ("measure_every", "record_scores_every"):
        if getattr(config, key) and all(hook.key != key for hook in hooks):
            raise ValueError(
                f"{key}={getattr(config, key)} has no hook; add observers(config) of moe_jax.analysis.observer to "
                "hooks, or set it to 0."
            )


def _train(
    config: Config,
    workdir: Path,
    corpus: "Corpus",
    ledger: Ledger,
    display: Display,
    watchdog: Watchdog,
    hooks: Sequence[Hook],
    last: int,
    profile: int,
) -> Outcome:
    """Train in a workdir that is this run's from the state it begins with to the steps `last`; then save and close."""
    from moe_jax.mesh import make_mesh
    from moe_jax.runtime.checkpoint import Checkpointer
    from moe_jax.runtime.profiling import Profiler, steps_to_trace
    from moe_jax.training.actions import Evaluate, Log, Save, Show, Stop, Trace
    from moe_jax.training.attempts import take_over
    from moe_jax.training.start import start

    mesh = make_mesh(config.mesh)
    state, extra, identity, remarks = start(config, mesh, workdir, corpus)
    first = int(state.step)
    made_by = versions() | {"identity": identity._asdict()}
    ended, more = processes.by_first(lambda: take_over(config, workdir, ledger, first, extra.get("seconds", {})))
    about = made_by | ended
    with ExitStack() as open_until_the_end:  # each is closed, whatever another one fails with
        log = open_until_the_end.enter_context(closing(RunLog(workdir, first))) if processes.index() == 0 else None
        checkpoints = Checkpointer(workdir / "checkpoints", config.checkpoint.keep, first)
        open_until_the_end.enter_context(closing(checkpoints))
        processes.by_first(lambda: record_run(workdir, config, about))  # a checkpoint of another shape was refused
        for line in [*more, *remarks]:
            display.say(line)
        stopped = open_until_the_end.enter_context(noted())  # a second signal must not end the save that one caused
        tokens = Tokens(ledger, extra.get("tokens_seen", 0))
        context = Context(config, workdir, corpus, mesh, ledger, tokens, display, watchdog, log, stopped)
        trace = Trace(Profiler(workdir / "profile", *steps_to_trace(profile, first, last)))
        save = Save(config, checkpoints, made_by)
        evaluation = Evaluate(config, beside=hooks)
        # an evaluation may take long and fail: the line and the save of its step come before
        in_order = [trace, Log(config, mesh, evaluation), save, evaluation, *hooks, Show(), Stop()]
        try:
            with display.running(first):
                state, done = _steps(context, in_order, state, first, last)
        except FloatingPointError as error:
            if log is not None:
                write_run(workdir, about | {"diverged": str(error)})
            raise
        if number := stopped():
            display.say(f"{signal.Signals(number).name}: saving step {done}")
        save.finish(context, state, done)
        where_the_time_went = ledger.summary(done)
    if done > first and log is not None:
        write_run(workdir, about | where_the_time_went)
    return Outcome(done, number, evaluation.found)


def _steps(
    context: Context, hooks: Sequence[Hook], state: "TrainState", first: int, last: int
) -> tuple["TrainState", int]:
    """Do the steps `first` to before `last`, as far as no signal comes; gives the state and the steps done."""
    from moe_jax.training.timed import TimedStep, timed_batches

    train_step = TimedStep(context)
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
