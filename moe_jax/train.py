"""`python -m moe_jax.train --config=configs/tiny.py --workdir=DIR`: train, or go on where DIR stopped.

Resuming is the newest verified checkpoint and `batch_at(step)`; the curve does not notice. SIGTERM, SIGINT, SIGHUP
and SIGUSR1 save at the last finished step and end with status 128 + signal (143, 130, 129, 138), out of an evaluation
too; a run that was not finished resumes when the same command is repeated, and makes up for that evaluation.

On a cluster the same command runs in every process. Each loads only the rows that its devices hold, all save
together, process 0 writes the logs, and a signal to one of them stops all at the same step, with status 143.
A lost or stuck process ends the run with status 75.
"""

import functools
import signal
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import app, flags

from moe_jax.config import Config, as_dict, differences, keys_that_change, resolve, validate
from moe_jax.config.command import define_config_flag, fail, parse_flags
from moe_jax.evaluate import evaluate, has_another_tokenizer, restore_run, store_routing
from moe_jax.runtime import processes
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import copy_tree, is_remote, new_folder, workdir_of
from moe_jax.runtime.ledger import Ledger, of_earlier_attempts
from moe_jax.runtime.log import METRICS, Display, RunLog, has_evaluation, newest, set_aside
from moe_jax.runtime.prefetch import prefetched
from moe_jax.runtime.signals import Abandoned, Stopped, can_be_noted, never, noted
from moe_jax.runtime.watchdog import Watchdog, Work
from moe_jax.runtime.workdir import (
    TOKENIZER,
    Identity,
    check_workdir,
    claim,
    config_of_run,
    identity_of,
    read_run,
    record,
    refuse_another_run,
    versions,
    write_run,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Corpus
    from moe_jax.data.batches import Batch
    from moe_jax.runtime.profiling import Profiler
    from moe_jax.training.state import TrainState

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
        processes.by_first(lambda: record(workdir, config, one.about))  # a checkpoint of another shape was refused
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
        from moe_jax.training.state import step_key
        from moe_jax.training.step import make_train_step

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

        from moe_jax.dispatch import apply
        from moe_jax.training.state import cost_of_rounding

        if not can_be_noted():
            self.display.say("not in the main thread: signals are left to the program around, and save nothing here")
        if first:
            self.display.say(f"going on from step {first}")
        m = self.config.model
        if m.num_experts and (line := apply.told(m.cpu_kernel, self.mesh, m.compute_dtype, m.quantization)):
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


def is_unaccounted(logged: int, first: int, ended: int, save_every: int) -> bool:
    """Whether a log has steps that a checkpoint must have held once, and which the newest one there is does not.

    A crash leaves lines after the newest checkpoint too, at most up to the next save.

    Args:
        logged: the steps done by its newest line.
        first: those of the newest checkpoint.
        ended: those that the last attempt that ended well had saved.
        save_every: of the config; 0 saves at the end only.
    """
    next_save = first // save_every * save_every + save_every if save_every else first
    return logged > first and (ended > first or logged > next_save)


def is_finished(config: Config, workdir: Path) -> bool:
    """Whether the log ends with the evaluation after the last step."""
    return has_evaluation(newest(workdir / METRICS), config.num_steps)


def why_finished(config: Config, workdir: Path) -> str:
    """A sentence if the run is finished and its checkpoints are gone; empty for every other."""
    from moe_jax.runtime import checkpoint

    if not is_finished(config, workdir) or checkpoint.committed(workdir / "checkpoints"):
        return ""
    return (
        f"the log of {workdir} ends with the evaluation after its last step, so the run is finished, though no "
        "checkpoint is there any more; to train it again, use another workdir or move metrics.jsonl away"
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
    from moe_jax.model.cost import peak_flops, train_flops

    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Cost(train_flops(config), None if peak is None else peak * mesh.size)


def _waited_for(work: Work | None) -> str:
    """What the time until the next batch came was spent on: the devices still do `work`, or have nothing to do."""
    if work is None:
        return "init"
    return "data" if work.finished() else "step"


class Start(NamedTuple):
    """What a run begins with: its state, what was saved beside it, its identity, and lines for the reader."""

    state: "TrainState"
    extra: dict[str, Any]
    identity: Identity
    remarks: list[str]


def _resume(config: Config, workdir: Path, mesh: "Mesh", corpus: "Corpus") -> Start | None:
    """The newest checkpoint of the workdir; None if there is none. Needs nothing of `init_from`."""
    found = restore_run(config, workdir, mesh)
    if found is None:
        return None
    state, extra = found
    there = identity_of(extra)

    def check() -> list[str]:
        refuse_another_run(workdir, "checkpoint", extra["config"], there, config, corpus.fingerprint)
        return refuse_other_weights(workdir, there, validate(extra["config"]), config)

    remarks = processes.by_first(check)
    return Start(state, extra, there or Identity(corpus.fingerprint), remarks)


def refuse_other_weights(workdir: Path, identity: Identity | None, there: Config, config: Config) -> list[str]:
    """Check `init_from` against the start of the run that is resumed; a line where that can be checked no more.

    A run needs nothing of the weights once it has a checkpoint, so they may be gone, moved or left out.

    Raises:
        ValueError: `init_from` names other weights than those that the run started from.
    """
    if not config.init_from:
        return []
    if identity is None:  # older than identities: the weights are those that its config names
        same = config.init_from == there.init_from
    elif identity.weights is None:
        same = False
    else:
        now = _fingerprint_at(workdir_of(config.init_from, "init_from") / "checkpoints", identity.weights["step"])
        if now is None:
            return [f"init_from={config.init_from!r} no longer has the weights that this run started from; not needed"]
        same = now == identity.weights["fingerprint"]
    if not same:
        raise ValueError(
            f"init_from={config.init_from!r} has other weights than the run in --workdir={workdir} started from; use "
            "another workdir to start from them, or init_from='' to resume."
        )
    return []


def _fingerprint_at(checkpoints: Path, step: int) -> str | None:
    """The fingerprint of the finished checkpoint of a step; None where it is gone or damaged."""
    from moe_jax.runtime.checkpoint import fingerprint

    try:
        return fingerprint(checkpoints / f"{step:08d}")
    except ValueError:
        return None


def _start(config: Config, workdir: Path, mesh: "Mesh", corpus: "Corpus") -> Start:
    """A new run: parameters drawn, or those of `init_from` with what came along."""
    from moe_jax.training.state import init_state

    state, weights = weights_of(config, mesh) if config.init_from else (init_state(config, mesh), None)
    state = with_hash_tables(config, state, corpus)
    remarks = processes.by_first(lambda: [*changes_of_model(config), *carry_tokenizer(config, workdir, corpus)])
    return Start(state, {}, Identity(corpus.fingerprint, weights), remarks)


def weights_of(config: Config, mesh: "Mesh") -> tuple["TrainState", dict[str, Any]]:
    """A start from the newest checkpoint of `config.init_from`: its parameters and bias, and nothing else of it.

    A bias that is zero everywhere says nothing; where balancing starts from is this run's to say.

    Returns:
        the state before step 0; "step" and "fingerprint" of that checkpoint, by which the run will know it.

    Raises:
        ValueError: no such checkpoint, a damaged one, of another model, or with a bias that this run cannot use.
    """
    import jax

    from moe_jax.runtime import checkpoint
    from moe_jax.training.state import abstract_state, state_around

    target, options = abstract_state(config, mesh), config.checkpoint
    folder = workdir_of(config.init_from, "init_from") / "checkpoints"
    found = checkpoint.restore_weights(
        folder,
        {"params": target.params, "bias": target.bias},
        verify=options.verify,
        fallback=options.fallback,
        cast=True,
    )
    if found is None:
        raise ValueError(f"init_from={config.init_from!r} has no finished checkpoint; name the workdir of one.")
    weights, extra = found
    told = any(np.asarray(leaf).any() for leaf in jax.device_get(jax.tree.leaves(weights["bias"])))
    if told:
        _refuse_bias_of_another_kind(config, validate(extra["config"]))
    step = extra["step"]
    known = {"step": step, "fingerprint": processes.by_first(lambda: checkpoint.fingerprint(folder / f"{step:08d}"))}
    return state_around(config, weights["params"], weights["bias"] if told else None, mesh), known


def changes_of_model(config: Config) -> list[str]:
    """A line if the model of `init_from` was another than these weights now become, though of the same shapes."""
    if not config.init_from:
        return []
    there, here = (as_dict(c)["model"] for c in (config_of_run(workdir_of(config.init_from, "init_from")), config))
    another = keys_that_change("model")
    changed = [line for line in differences(there, here) if f"model.{line.partition(':')[0]}" in another]
    return [f"the weights were trained in another model: {'; '.join(changed)}"] if changed else []


def carry_tokenizer(config: Config, workdir: Path, corpus: "Corpus") -> list[str]:
    """Keep the tokenizer, for text and for export: that of `init_from`, or the corpus's; a line if they differ."""
    from moe_jax.data import ByteTokenizer, keep_tokenizer

    target, source = workdir / TOKENIZER, workdir_of(config.init_from, "init_from") if config.init_from else workdir
    if target.exists():
        return []
    differs = has_another_tokenizer(source, corpus)
    from_source = (source / TOKENIZER).is_dir() and not differs
    if from_source or not isinstance(corpus.tokenizer, ByteTokenizer):
        with nullcontext(target) if is_remote(target) else new_folder(target) as partial:
            if from_source:
                copy_tree(source / TOKENIZER, partial)
            else:
                keep_tokenizer(config.data.path, corpus.tokenizer, partial)
    name = corpus.tokenizer.name
    return [f"the weights came with another tokenizer than {name!r}, the corpus's, which counts now"] * differs


def _refuse_bias_of_another_kind(config: Config, there: Config) -> None:
    """Biases that are added to scores and biases that multiply them are not the same numbers."""
    from moe_jax import balance

    kinds = [
        "is added to scores" if balance.make(c.balance, c.model).combine is None else "multiplies scores"
        for c in (there, config)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"init_from={config.init_from!r} has a bias that {kinds[0]}, but in this run's balance it {kinds[1]}; "
            "choose a balance of the same kind."
        )


def with_hash_tables(config: Config, state: "TrainState", corpus: "Corpus") -> "TrainState":
    """The state with the tables of `hash` balanced for the corpus's token frequencies.

    Every layer has the same groups of tokens, and its experts in an order of its own.
    """
    import jax

    from moe_jax.balance.selectors import balanced_table
    from moe_jax.data import token_frequencies

    labels = [e.label for e in config.balance if e.method == "hash"]
    if not labels:
        return state
    m = config.model
    frequencies = token_frequencies(corpus, m.vocab_size, config.data.weights)
    table = balanced_table(frequencies, m.num_experts, m.top_k, config.seed)

    def filled(path: Any, leaf: Any) -> Any:
        if path[-1] != jax.tree_util.DictKey("table"):
            return leaf
        orders = (np.random.default_rng((config.seed, layer)).permutation(m.num_experts) for layer in range(len(leaf)))
        return jax.device_put(np.stack([order[table] for order in orders]).astype(np.int32), leaf.sharding)

    own = {label: jax.tree_util.tree_map_with_path(filled, state.balance[label]) for label in labels}
    return state._replace(balance=state.balance | own)


def open_data(config: Config) -> "Corpus":
    """The corpus of the config, checked against it.

    Raises:
        ValueError, FileNotFoundError: missing or damaged files, a vocabulary too small, wrong data.weights.
    """
    from moe_jax.data import open_corpus
    from moe_jax.data.batches import check_weights

    corpus = open_corpus(config.data.path, config.data.verify)
    needed = corpus.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must be at least the {needed} tokens of the "
            f"{corpus.tokenizer.name!r} tokenizer of data.path={config.data.path!r}; set it to {needed} or more."
        )
    if config.data.weights:
        check_weights(corpus.domains, config.data.weights)  # before the workdir is claimed
    return corpus


def agree_on_data(config: Config, corpus: "Corpus") -> None:
    """Raise a ValueError in every process unless `data.path` leads all of them to the same data."""
    first = processes.by_first(lambda: corpus.fingerprint)

    def check() -> None:
        if corpus.fingerprint != first:
            raise ValueError(
                f"data.path={config.data.path!r} leads process {processes.index()} to other data (fingerprint "
                f"{corpus.fingerprint[:16]}) than process 0 ({first[:16]}); give all hosts the same prepared folder."
            )

    processes.by_all(check)


def main(_: list[str]) -> None:
    """Check the config and the data before jax is loaded, then run."""
    flag = flags.FLAGS
    keep_compiled()
    try:
        if not flag.workdir:
            raise ValueError(
                "--workdir= is empty and would be the current folder; name one, or write --workdir=. for it."
            )
        if flag.profile < 0:
            raise ValueError(f"--profile={flag.profile} must be at least 0; it is how many steps to trace.")
        if flag.stop_at < 0:
            raise ValueError(f"--stop_at={flag.stop_at} must be at least 0; 0 trains to num_steps.")
        config, workdir = validate(flag.config), workdir_of(flag.workdir)
        from moe_jax.data import check_corpus

        check_corpus(config.data.path)
        workdir_of(config.init_from, "init_from")
        watchdog = Watchdog(config.step_timeout_seconds)
        with processes.joined(config.heartbeat_seconds, lambda: watchdog.doing):
            outcome = run(config, workdir, stop_at=flag.stop_at, watchdog=watchdog, profile=flag.profile)
            if outcome.signal:
                raise SystemExit(128 + outcome.signal)
            if processes.index() == 0:
                print(f"{outcome.step} of {config.num_steps} steps done in {flag.workdir}", flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_config_flag("A config file of ours or yours.")
    flags.DEFINE_string("workdir", None, "Where the run lives; made if absent.")
    flags.DEFINE_integer("stop_at", 0, "Stop and save after so many steps; the same command without it goes on.")
    flags.DEFINE_integer("profile", 0, "Trace so many steps, once they are compiled, into WORKDIR/profile.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
