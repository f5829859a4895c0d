"""The hooks of every run: trace, log, save, evaluate, show, stop."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moe_jax.config import Config, as_dict, branch_point
from moe_jax.model.cost import train_flops
from moe_jax.runtime import processes
from moe_jax.runtime.checkpoint import Checkpointer
from moe_jax.runtime.chips import peak_flops
from moe_jax.runtime.log import has_evaluation
from moe_jax.runtime.pictures import heat_map
from moe_jax.runtime.profiling import Profiler
from moe_jax.runtime.signals import Abandoned
from moe_jax.training.evaluation import evaluate
from moe_jax.training.guard import has_failed
from moe_jax.training.hooks import Context, Hook, Now
from moe_jax.training.rollback import GoBack, not_kept
from moe_jax.training.state import TrainState
from moe_jax.training.step import first_non_finite
from moe_jax.training.stragglers import Stragglers

MAX_STUCK = 3  # this many non-finite steps in a row end the run, because nothing has moved since the first of them


class Trace(Hook):
    """Traces some steps; a trace that cannot be written does not end the run."""

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Start the trace before its first step."""
        with context.ledger("lost"):
            self._profiler.before(now.step)
        return {}

    def after(self, context: Context, now: Now) -> None:
        """Write the trace when its last step is finished."""
        if self._profiler.is_last(now.step):
            context.tokens.fetch()  # waits for the traced steps
            self.close(context)

    def close(self, context: Context) -> None:
        """Write the trace that is under way, if there is one."""
        if not self._profiler.is_tracing:
            return
        try:
            with context.ledger("lost"):
                self._profiler.close()
        except OSError as error:
            context.display.say(f"the trace could not be written: {error}")
        else:
            context.display.say(f"a trace of the last steps is in {context.workdir / 'profile'}")


class Evaluate(Hook):
    """Evaluates on held-out text, and adds the result to the log line of its step.

    An evaluation may take long, fail or be cut off by a signal; the next start repeats one that is missing.
    """

    key = "eval_every"

    def __init__(self, config: Config, beside: Sequence[Hook]) -> None:
        """Args: beside: hooks that may have numbers of their own to add."""
        self.every = config.eval_every
        self.found: dict[str, float | int] = {}  # the result of the newest evaluation
        self._num_steps = config.num_steps
        self._begins_at = branch_point(config)[1]
        self._beside = beside

    def is_due(self, done: int) -> bool:
        """At its interval, and at the end."""
        return done == self._num_steps or super().is_due(done)

    def begin(self, context: Context, state: TrainState) -> None:
        """Repeat the evaluation of the checkpoint's step, if it was cut off or failed."""
        done = int(state.step)
        if done == self._begins_at or not self.is_due(done):  # of a branch, that evaluation is the trunk's
            return
        log = context.log
        if not processes.by_first(lambda: log is not None and has_evaluation(log.newest(), done)):
            self._evaluate(context, state, done)

    def after(self, context: Context, now: Now) -> None:
        """Evaluate the state after the step."""
        self._evaluate(context, now.state, now.done)

    def _evaluate(self, context: Context, state: TrainState, done: int) -> None:
        where = context.config, state, context.corpus, context.mesh
        try:
            with context.ledger("evaluation"):
                found = evaluate(*where, context.watchdog, stopped=context.stopped)
                for hook in self._beside:
                    found |= hook.evaluate(context, state)
        except Abandoned:
            context.display.say(f"the evaluation after step {done} is left to the next start")
            return
        self.found = found
        if context.log is not None:
            context.log.amend(done - 1, found | context.ledger.columns())
        context.display.report(done, found)


class Log(Hook):
    """Logs the numbers of a step, in one host transfer, and ends a run whose steps are no longer finite.

    Due at its interval, at the run's first step, and at every step that is evaluated.
    """

    key = "log_every"

    def __init__(self, config: Config, mesh: Mesh, evaluation: Evaluate, stragglers: Stragglers) -> None:
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        self.every = config.log_every
        self._begins_at = branch_point(config)[1]
        self._evaluation = evaluation
        self._stragglers = stragglers
        self._flops_per_token = train_flops(config)
        self._peak = None if peak is None else peak * mesh.size  # FLOP/s of all devices of the mesh

    def is_due(self, done: int) -> bool:
        """At its interval, and wherever an evaluation needs a line to be added to."""
        return done == self._begins_at + 1 or super().is_due(done) or self._evaluation.is_due(done)

    def after(self, context: Context, now: Now) -> None:
        """Wait for the step, and write its line.

        Raises:
            FloatingPointError: MAX_STUCK steps in a row were not finite.
        """
        numbers = context.tokens.fetch(now.values)
        with context.ledger("lost"):
            layers = {k: v for k, v in numbers.items() if np.ndim(v)}
            numbers = {k: mean_of_layers(v) if k in layers else v for k, v in numbers.items() if np.ndim(v) < 2}
            stuck = int(numbers.pop("stuck"))
            del numbers["tokens"]
            if context.config.guard.rollback:
                numbers["rollbacks"] = len(context.rollbacks)
            numbers |= {"tokens_seen": context.tokens.seen, **self._speed(context)} | context.ledger.columns()
            columns, late = self._stragglers.compare()
            numbers |= columns
            if context.log is not None:
                context.log.write(now.step, numbers, layers)
                if layers and self._evaluation.is_due(now.done):
                    context.log.picture(now.step, "moe/load", lambda: heat_map(layers["loads"]))
            context.display.report(now.done, numbers)
            if late:
                context.display.say(late)
            if stuck >= MAX_STUCK and not context.config.guard.rollback:
                raise FloatingPointError(_why_stuck(context, now, stuck))
        context.ledger.restart()

    def _speed(self, context: Context) -> dict[str, float | None]:
        """The speed of the steps since the last logged one."""
        tokens_per_second, data_wait = context.ledger.speed()
        flops = None if tokens_per_second is None else tokens_per_second * self._flops_per_token
        numbers = {"tokens_per_second": tokens_per_second, "data_wait": data_wait}
        numbers["gflops_per_second"] = None if flops is None else flops / 1e9
        if self._peak is not None:
            numbers["mfu"] = None if flops is None else flops / self._peak
        return numbers


def mean_of_layers(values: Any) -> float | None:
    """The mean over the layers with a finite value; None if there is no such layer."""
    exists = values[np.isfinite(values)]
    return float(exists.mean()) if exists.size else None


def _why_stuck(context: Context, now: Now, stuck: int) -> str:
    """The error message, which names the first tensor that is not finite; nothing moved since the first such step."""
    before = now.state._replace(step=now.state.step - 1)
    where = first_non_finite(context.config, before, now.batch, context.mesh)
    return (
        f"step {now.step}: the loss, the gradient or a result of the update was not finite {stuck} times in a row "
        f"(first: {where}); the parameters are those before these steps. Lower optimizer.learning_rate="
        f"{context.config.optimizer.learning_rate} or look at the data."
    )


class WatchForRollback(Hook):
    """Ends a session after `guard.rollback` steps in a row that were not kept, at the next step that is logged."""

    def __init__(self, config: Config, log: Log) -> None:
        self._guard = config.guard
        self._log = log

    def is_due(self, done: int) -> bool:
        """Where a line is logged, because there the run waits for the devices anyway; never without `rollback`."""
        return self._guard.rollback > 0 and self._log.is_due(done)

    def begin(self, context: Context, state: TrainState) -> None:
        """Look at a state that was saved before its steps were logged."""
        self._look(context, state)

    def after(self, context: Context, now: Now) -> None:
        """Look at the state after a step.

        Raises:
            GoBack: `guard.rollback` steps in a row were not kept.
            FloatingPointError: the same after `guard.rollbacks` rollbacks.
        """
        self._look(context, now.state)

    def _look(self, context: Context, state: TrainState) -> None:
        stuck = int(state.stuck)
        if not has_failed(self._guard, stuck):
            return
        first = int(state.step) - stuck
        at = first + self._guard.rollback
        if (done := len(context.rollbacks)) >= self._guard.rollbacks:
            raise FloatingPointError(
                f"{not_kept(first, at)}, and guard.rollbacks={self._guard.rollbacks} allows no rollback after the "
                f"{done} so far. Lower optimizer.learning_rate, look at the data, or raise guard.rollbacks."
            )
        raise GoBack(first, at)


class Save(Hook):
    """Saves checkpoints, which are written in the background.

    All processes must save after the same step, and their clocks differ. So process 0 reads its own, at logged steps
    only, where every process waits for the devices anyway.
    """

    key = "save_every"

    def __init__(self, config: Config, checkpoints: Checkpointer, made_by: Mapping[str, Any]) -> None:
        """Args: made_by: versions and identity, stored beside the state."""
        self.every = config.save_every
        self._seconds = config.save_every_seconds
        self._log_every = config.log_every
        self._num_steps = config.num_steps
        self._saved = time.monotonic()
        self._checkpoints = checkpoints
        self._made_by = made_by

    def is_due(self, done: int) -> bool:
        """At its interval, at the end, and at logged steps, where `save_every_seconds` may be over."""
        return self._by_steps(done) or (self._seconds > 0 and done % self._log_every == 0)

    def _by_steps(self, done: int) -> bool:
        return done == self._num_steps or super().is_due(done)

    def after(self, context: Context, now: Now) -> None:
        """Save the state after the step, if the steps or the seconds since the newest save are over."""
        if self._by_steps(now.done) or processes.by_first(lambda: time.monotonic() - self._saved >= self._seconds):
            self.save(context, now.state, now.done)

    def save(self, context: Context, state: TrainState, done: int) -> None:
        """Save the state after `done` steps, unless it is saved already; the log is flushed to the workdir before.

        Amid steps that are not kept, no older checkpoint is removed, because the run may go back to it.
        """
        with context.ledger("step"):
            context.tokens.fetch()  # waits for the steps
        with context.ledger("checkpoint"):
            if context.log is not None:
                context.log.flush()
            extra = {"config": as_dict(context.config), "tokens_seen": context.tokens.seen}
            extra["seconds"] = context.ledger.seconds
            keep_all = context.config.guard.rollback > 0 and int(state.stuck) > 0
            self._checkpoints.save(done, state, extra | dict(self._made_by), keep_all)
        self._saved = time.monotonic()

    def finish(self, context: Context, state: TrainState, done: int) -> None:
        """Save the last state, after whichever step the run ends, and wait until it is written."""
        self.save(context, state, done)
        with context.ledger("checkpoint"):
            self._checkpoints.wait()


class Show(Hook):
    """Moves the progress bar."""

    def after(self, context: Context, now: Now) -> None:
        """Show one more step as done."""
        context.display.step(now.done)


class Stop(Hook):
    """Ends the loop between two steps if a signal arrived; the last hook, so that all others have acted before."""

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Stop before the step, which is not done."""
        _stop(context)
        return {}

    def after(self, context: Context, now: Now) -> None:
        """Stop after the step, without waiting for another batch."""
        _stop(context)


def _stop(context: Context) -> None:
    if number := context.stopped():
        raise Abandoned(number)
