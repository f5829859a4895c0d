"""The loop around the train step: data in, numbers out, checkpoints, signals."""

import functools
import signal
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_jax.analysis.survey import store_routing
from moe_jax.config import Config, as_dict, resolve
from moe_jax.runtime import processes
from moe_jax.runtime.display import Display
from moe_jax.runtime.ledger import Ledger, of_earlier_attempts
from moe_jax.runtime.log import METRICS, RunLog, has_evaluation, newest, set_aside
from moe_jax.runtime.prefetch import prefetched
from moe_jax.runtime.signals import Abandoned, Stopped, can_be_noted, never, noted
from moe_jax.runtime.watchdog import Watchdog, Work
from moe_jax.runtime.workdir import check_workdir, claim, read_run, record_run, versions, write_run
from moe_jax.training.evaluation import evaluate
from moe_jax.training.start import _resume, _start, agree_on_data, is_unaccounted, open_data, why_finished

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Corpus
    from moe_jax.data.batches import Batch
    from moe_jax.runtime.profiling import Profiler


MAX_STUCK = 3  # so many non-finite steps in a row end the run: the next would not be finite either


class Outcome(NamedTuple):
    """How a call of `run` ended: the steps done, and the signal that stopped it early, if one did."""

    step: int
    signal: int | None
    evaluation: dict[str, float | int]


def run(
    config: Config,
    workdir: Path,
    *,
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
        name: how the progress display calls the run.
        stop_at: stop (and save) after so many steps, as if interrupted; 0 for never.
        quiet: print nothing.
        watchdog: ends the process if a step gets stuck; made from the config if None.
        profile: trace so many steps, from the third of this start on, into workdir/profile; 0 for none.

    Raises:
        ValueError: another config's workdir, bad data, a damaged or different checkpoint, or too few steps to trace.
        FloatingPointError: several steps in a row were not finite.
    """
    with closing(watchdog or Watchdog(config.step_timeout_seconds)) as watchdog:
        return _run(config, workdir, name, stop_at, quiet, watchdog, profile)


def _run(
    config: Config, workdir: Path, name: str, stop_at: int, quiet: bool, watchdog: Watchdog, profile: int
) -> Outcome:
    ledger = Ledger(stopped_seconds=watchdog.stopped_seconds)
    corpus = processes.by_all(lambda: open_data(config))
    agree_on_data(config, corpus)
    processes.by_first(lambda: check_workdir(workdir, config, corpus.fingerprint))
    import jax  # from here on: it takes seconds, and a mistake is told before

    resolve(config, jax.device_count(), jax.devices()[0].platform)
    with claim(workdir):
        if line := processes.by_first(lambda: why_finished(config, workdir)):
            Display(name, config.num_steps, quiet or processes.index() > 0).say(line)
            return Outcome(config.num_steps, None, {})
        one = _Run(config, workdir, corpus, name, quiet, watchdog, ledger)
        processes.by_first(lambda: record_run(workdir, config, one.about))  # a checkpoint of another shape was refused
        for line in one.remarks:
            one.display.say(line)
        return one.until(min(stop_at or config.num_steps, config.num_steps), profile)


class _Run:
    """The loop around the train step: data in, numbers out, checkpoints, signals."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        corpus: "Corpus",
        name: str,
        quiet: bool,
        watchdog: Watchdog,
        ledger: Ledger,
    ) -> None:
        from moe_jax.data import training_batches
        from moe_jax.mesh import make_mesh
        from moe_jax.runtime.checkpoint import Checkpointer

        self.config, self.workdir, self.corpus, self.watchdog = config, workdir, corpus, watchdog
        self.mesh, self.ledger = make_mesh(config.mesh), ledger
        start = _resume(config, workdir, self.mesh, corpus) or _start(config, workdir, self.mesh, corpus)
        self.state, extra, identity, self.remarks = start
        self.made_by = versions() | {"identity": identity._asdict()}
        self.first, self.tokens_seen = int(self.state.step), extra.get("tokens_seen", 0)
        self.checkpoints = Checkpointer(workdir / "checkpoints", config.checkpoint.keep, self.first)
        first_process = processes.index() == 0
        self.display = Display(name, config.num_steps, quiet or not first_process)
        self.about = self.made_by | processes.by_first(lambda: self._continue_ledger(extra))
        self.log = RunLog(workdir, self.first) if first_process else None
        self.batch_at = training_batches(
            corpus,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            weights=config.data.weights,
        )
        self.evaluation: dict[str, float | int] = {}
        self.stopped: Stopped = never
        self.uncounted: list[Any] = []  # valid tokens of the last steps, still on the device
        self.cost = _cost_of_token(config, self.mesh)

    def _continue_ledger(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Take over what earlier attempts spent; gives what run.json said of it, to be kept until this one ends.

        A log that no checkpoint accounts for any more is set aside.
        """
        ended, logged = read_run(self.workdir), newest(self.workdir / METRICS)
        self.ledger.carry(of_earlier_attempts(self.first, extra.get("seconds", {}), ended, logged))
        done = logged.get("step", -1) + 1
        if is_unaccounted(done, self.first, ended.get("step", 0), self.config.save_every):
            kept = set_aside(self.workdir, self.first)
            self.display.say(f"the log has {done} steps, but the newest checkpoint {self.first}: it is kept as {kept}")
        return {key: ended[key] for key in ("step", "seconds", "time", "goodput") if key in ended}

    def until(self, last: int, profile: int) -> Outcome:
        """Steps `first` to `last`, then save and close."""
        from moe_jax.runtime.profiling import Profiler, steps_to_trace

        with ExitStack() as open_until_the_end:  # each is closed, whatever another one fails with
            if self.log is not None:
                open_until_the_end.enter_context(closing(self.log))
            open_until_the_end.enter_context(closing(self.checkpoints))
            profiler = Profiler(self.workdir / "profile", *steps_to_trace(profile, self.first, last))
            with noted() as self.stopped:  # a second signal must not end the save that the first one caused
                with self.display.running(self.first):
                    try:
                        step = self._steps(self.first, last, profiler)
                    except FloatingPointError as error:
                        self._write_about({"diverged": str(error)})
                        raise
                    finally:
                        self._end_trace(profiler)
                if number := self.stopped():
                    self.display.say(f"{signal.Signals(number).name}: saving step {step}")
                self._save(step)
                self.checkpoints.wait()
                self.ledger.charge("checkpoint")
        if step > self.first:
            self._write_about(self.ledger.summary(step))
        return Outcome(step, number, self.evaluation)

    def _steps(self, first: int, last: int, profiler: "Profiler") -> int:
        """Do them, as far as no signal comes; gives the steps done."""
        from moe_jax.analysis.observer import Observer
        from moe_jax.training.compile import make_train_step
        from moe_jax.training.state import step_key

        train_step, key = make_train_step(self.config, self.mesh), step_key(self.config)
        observer = Observer(self.config, self.mesh, self.workdir)
        self._greet(first)
        if self._lacks_evaluation():
            self._evaluate(first)
        work: Work | None = None
        for step, batch in prefetched(self._load, first, last):
            self.ledger.charge(_waited_for(work))
            profiler.before(step)
            self.ledger.charge("lost")
            measured = observer.before(step, self.state, batch, key)
            self.ledger.charge("evaluation")
            if self.stopped():
                return step
            work = self.watchdog.watch("step", step)
            with profiler.named(step):
                self.state, values = train_step(self.state, batch, key)
            work.result = values["loss"]
            self._done(step, batch, values | measured, profiler)
            if self.stopped():
                return step + 1
        return max(first, last)

    def _greet(self, first: int) -> None:
        import jax

        from moe_jax import dispatch
        from moe_jax.training.optimizer import cost_of_rounding

        if not can_be_noted():
            self.display.say("not in the main thread: signals are left to the program around, and save nothing here")
        if first:
            self.display.say(f"going on from step {first}")
        m = self.config.model
        if m.num_experts and (line := dispatch.told(m.cpu_kernel, self.mesh, m.compute_dtype, m.quantization)):
            self.display.say(line)
        if line := cost_of_rounding(self.config):
            self.display.say(line)
        if unused := jax.device_count() - self.mesh.size:
            self.display.say(f"{unused} of {jax.device_count()} devices are not in the mesh and stay unused")

    def _load(self, step: int) -> "Batch":
        """The step's batch on the mesh; only this process's rows are read."""
        from moe_jax.mesh import batch_sharding

        rows = functools.partial(self.batch_at, step)
        return processes.from_rows(rows, self.config.batch_size, batch_sharding(self.mesh))

    def _done(self, step: int, batch: "Batch", values: dict[str, Any], profiler: "Profiler") -> None:
        """Count a step that was given to the devices, and do what is due after it."""
        self.uncounted.append(values["tokens"])
        if step == self.first:
            self._count(kind="compile")
            self.ledger.restart()  # the first step compiles: it says nothing about speed
        if profiler.is_last(step):
            self._count()  # waits for the steps that were traced
            self._end_trace(profiler)
            self.ledger.charge("lost")
        self._after(step, batch, values)

    def _end_trace(self, profiler: "Profiler") -> None:
        """Write the trace that is under way, if one is; a run does not fail for it."""
        if not profiler.is_tracing:
            return
        try:
            profiler.close()
            self.display.say(f"a trace of the last steps is in {self.workdir / 'profile'}")
        except OSError as error:
            self.display.say(f"the trace could not be written: {error}")

    def _after(self, step: int, batch: "Batch", values: dict[str, Any]) -> None:
        """What is due after a step, in this order: log, save, evaluate. What fails or is cut off takes nothing along.

        The save is begun before the evaluation, which may take long and may fail; what the evaluation finds is added
        to the line that was logged. Where it is missing from the log, the next start makes up for it.
        """
        c, done = self.config, step + 1
        evaluates = self._is_evaluated_after(done)
        if evaluates or done % c.log_every == 0 or step == 0:
            self._log(step, batch, values)
        if done == c.num_steps or (c.save_every and done % c.save_every == 0):
            self._save(done)
        if evaluates:
            self._evaluate(done)
        self.display.step(done)

    def _is_evaluated_after(self, done: int) -> bool:
        c = self.config
        return done == c.num_steps or bool(c.eval_every and done % c.eval_every == 0)

    def _lacks_evaluation(self) -> bool:
        """Whether the evaluation after the steps of the checkpoint is due, and was cut off or failed."""
        if self.first == 0 or not self._is_evaluated_after(self.first):
            return False
        return not processes.by_first(lambda: self.log is not None and has_evaluation(self.log.newest(), self.first))

    def _count(self, values: Any = None, kind: str = "step") -> Any:
        """Count the tokens of the last steps, and fetch `values` in the same transfer; what it waits for is `kind`."""
        import jax

        values, tokens = jax.device_get((values, self.uncounted))
        self.ledger.charge(kind)
        self.uncounted = []
        self.tokens_seen += self.ledger.count(sum(map(int, tokens)))
        return values

    def _log(self, step: int, batch: "Batch", values: dict[str, Any]) -> None:
        numbers = self._count(values)  # the one host transfer
        speed = self._speed()
        layers = {k: v for k, v in numbers.items() if np.ndim(v)}
        numbers = {k: mean_of_layers(v) if k in layers else v for k, v in numbers.items() if np.ndim(v) < 2}
        stuck = int(numbers.pop("stuck"))
        del numbers["tokens"]
        numbers |= {"tokens_seen": self.tokens_seen, **speed} | self.ledger.columns()
        if self.log is not None:
            self.log.write(step, numbers, layers)
        self.display.report(step + 1, numbers)
        if stuck >= MAX_STUCK:
            raise FloatingPointError(self._why_stuck(step, batch, stuck))
        self.ledger.charge("lost")
        self.ledger.restart()

    def _speed(self) -> dict[str, float | None]:
        """What the steps since the last logged one achieved."""
        tokens_per_second, data_wait = self.ledger.speed()
        flops = None if tokens_per_second is None else tokens_per_second * self.cost.flops
        numbers = {"tokens_per_second": tokens_per_second, "data_wait": data_wait}
        numbers["gflops_per_second"] = None if flops is None else flops / 1e9
        if self.cost.peak is not None:
            numbers["mfu"] = None if flops is None else flops / self.cost.peak
        return numbers

    def _evaluate(self, done: int) -> None:
        """Evaluate the state after `done` steps, unless a signal comes, and add the result to the line of its step."""
        where = self.config, self.state, self.corpus, self.mesh
        try:
            found = evaluate(*where, self.watchdog, stopped=self.stopped)
            store_routing(*where, self.workdir, self.watchdog, stopped=self.stopped)
        except Abandoned:
            self.display.say(f"the evaluation after step {done} is left for the next start")
            self.ledger.charge("lost")
            return
        self.ledger.charge("evaluation")
        self.evaluation = found
        if self.log is not None:
            self.log.amend(done - 1, found | self.ledger.columns())
        self.display.report(done, found)

    def _save(self, step: int) -> None:
        self._count()
        if self.log is not None:
            self.log.flush()
        seconds = dict(self.ledger.seconds)  # as they are now: it is written while they go on
        extra = {"config": as_dict(self.config), "tokens_seen": self.tokens_seen, "seconds": seconds}
        self.checkpoints.save(step, self.state, extra | self.made_by)
        self.ledger.charge("checkpoint")

    def _write_about(self, more: dict[str, Any]) -> None:
        """run.json, with how this attempt ended."""
        if self.log is not None:
            write_run(self.workdir, self.about | more)

    def _why_stuck(self, step: int, batch: "Batch", stuck: int) -> str:
        """Which tensor was not finite; nothing has moved since the first of these steps."""
        from moe_jax.training.step import first_non_finite

        before = self.state._replace(step=self.state.step - 1)
        where = first_non_finite(self.config, before, batch, self.mesh)
        return (
            f"step {step}: the loss, the gradient or what the update made of them was not finite {stuck} times in a "
            f"row (first: {where}); the parameters are those before. Lower optimizer.learning_rate="
            f"{self.config.optimizer.learning_rate} or look at the data."
        )


def mean_of_layers(values: Any) -> float | None:
    """The mean over the layers where the value exists; None where it does in none."""
    exists = values[np.isfinite(values)]
    return float(exists.mean()) if exists.size else None


class Cost(NamedTuple):
    """Model FLOPs of a token's training, and peak FLOP/s of all devices of the mesh, None where unknown."""

    flops: int
    peak: float | None


def _cost_of_token(config: Config, mesh: "Mesh") -> Cost:
    from moe_jax.model.cost import train_flops
    from moe_jax.runtime.chips import peak_flops

    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Cost(train_flops(config), None if peak is None else peak * mesh.size)


def _waited_for(work: Work | None) -> str:
    """What the time until the next batch came was spent on: the devices still do `work`, or have nothing to do."""
    if work is None:
        return "init"
    return "data" if work.finished() else "step"
