"""`python -m moe_jax.train --config=configs/tiny.py --workdir=DIR`: train, or go on where DIR stopped.

Resuming is the newest verified checkpoint and `batch_at(step)`; the curve does not notice. SIGTERM and SIGINT
save at the last finished step and end with status 128 + signal (143, 130); a run that was not finished goes on
when the same command is given again.

On a cluster the same command runs in every process. Each loads only the rows that its devices hold, all save
together, process 0 writes the logs, and a signal to one of them stops all at the same step, with status 143.
A lost or stuck process ends the run with status 75.
"""

import concurrent.futures
import fcntl
import functools
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import app, flags

from moe_jax import distributed
from moe_jax.command import define_config_flag, fail, parse_flags
from moe_jax.config import DROPLESS, Config, as_dict, differences, resolve, validate
from moe_jax.evaluate import evaluate, read_config, restore_run, store_routing
from moe_jax.files import is_remote, workdir_of, write_json
from moe_jax.watchdog import Watchdog

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Corpus
    from moe_jax.data.batches import Batch
    from moe_jax.state import TrainState

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

    Raises:
        ValueError: another config's workdir, bad data, or a damaged or different checkpoint.
        FloatingPointError: several steps in a row were not finite.
    """
    corpus = distributed.by_all(lambda: open_data(config))
    distributed.by_first(lambda: check_workdir(workdir, config))
    import jax  # from here on: it takes seconds, and a mistake is told before

    resolve(config, jax.device_count(), jax.devices()[0].platform)
    with claim(workdir):
        one = _Run(config, workdir, corpus, name, quiet, watchdog or Watchdog(config.step_timeout_seconds))
        distributed.by_first(lambda: record(workdir, config, one.made_by))  # a checkpoint of another shape was refused
        return one.until(min(stop_at or config.num_steps, config.num_steps))


class _Run:
    """The loop around the train step: data in, numbers out, checkpoints, signals."""

    def __init__(
        self, config: Config, workdir: Path, corpus: "Corpus", name: str, quiet: bool, watchdog: Watchdog
    ) -> None:
        from moe_jax.checkpoint import Checkpointer
        from moe_jax.data import training_batches
        from moe_jax.log import Display, RunLog
        from moe_jax.mesh import make_mesh

        self.config, self.workdir, self.corpus, self.watchdog = config, workdir, corpus, watchdog
        self.mesh = make_mesh(config.mesh)
        self.made_by = versions()
        self.state, self.tokens_seen = _restore_or_init(config, workdir, self.mesh, corpus)
        self.first = int(self.state.step)
        self.checkpoints = Checkpointer(workdir / "checkpoints", config.checkpoint.keep)
        first_process = distributed.index() == 0
        self.log = RunLog(workdir, self.first) if first_process else None
        self.display = Display(name, config.num_steps, quiet or not first_process)
        self.batch_at = training_batches(
            corpus,
            seed=config.seed,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            weights=config.data.weights,
        )
        self.evaluation: dict[str, float | int] = {}
        self.clock = Clock()
        self.uncounted: list[Any] = []  # valid tokens of the last steps, still on the device

    def until(self, last: int) -> Outcome:
        """Steps `first` to `last`, then save and close."""
        try:
            with _signals() as stopped:  # a second signal must not end the save that the first one asked for
                with self.display.running(self.first):
                    step, number = self._steps(self.first, last, stopped)
                self._save(step)
                self.checkpoints.wait()
        finally:
            self.checkpoints.close()
            self.watchdog.close()
            if self.log is not None:
                self.log.close()
        return Outcome(step, number, self.evaluation)

    def _steps(self, first: int, last: int, stopped: Callable[[int], int | None]) -> tuple[int, int | None]:
        import jax

        from moe_jax.observer import Observer
        from moe_jax.state import step_key
        from moe_jax.step import make_train_step

        train_step, key = make_train_step(self.config, self.mesh), step_key(self.config)
        observer = Observer(self.config, self.mesh, self.workdir)
        if first:
            self.display.say(f"going on from step {first}")
        if unused := jax.device_count() - self.mesh.size:
            self.display.say(f"{unused} of {jax.device_count()} devices are not in the mesh and stay unused")
        for step, batch in _prefetched(self._load, first, last):
            work = self.watchdog.watch("step", step)
            measured = observer.before(step, self.state, batch, key)
            self.state, values = train_step(self.state, batch, key)
            values |= measured
            work.result = values["loss"]
            self.uncounted.append(values["tokens"])
            if step == first:
                self._count()
                self.clock.restart()  # the first step compiles: it says nothing about speed
            self._after(step, batch, values)
            if number := stopped(step):
                self.display.say(f"{signal.Signals(number).name}: saving step {step + 1}")
                return step + 1, number
        return max(first, last), None

    def _load(self, step: int) -> "Batch":
        """The step's batch on the mesh; only this process's rows are read."""
        from moe_jax.mesh import batch_sharding

        rows = functools.partial(self.batch_at, step)
        return distributed.from_rows(rows, self.config.batch_size, batch_sharding(self.mesh))

    def _after(self, step: int, batch: "Batch", values: dict[str, Any]) -> None:
        """Log, evaluate and save where it is time to."""
        c, done = self.config, step + 1
        final = done == c.num_steps
        evaluates = final or (c.eval_every and done % c.eval_every == 0)
        if evaluates or done % c.log_every == 0 or step == 0:
            self._log(step, batch, values, bool(evaluates))
        if not final and c.save_every and done % c.save_every == 0:
            self._save(done)
        self.display.step(done)

    def _count(self, values: Any = None) -> Any:
        """Count the tokens of the last steps, and fetch `values` in the same transfer."""
        import jax

        values, tokens = jax.device_get((values, self.uncounted))
        self.uncounted = []
        self.tokens_seen += self.clock.count(sum(map(int, tokens)))
        return values

    def _log(self, step: int, batch: "Batch", values: dict[str, Any], evaluates: bool) -> None:
        numbers = self._count(values)  # the one host transfer
        speed = self.clock.tokens_per_second()
        layers = {k: v for k, v in numbers.items() if np.ndim(v)}
        numbers = {k: mean_of_layers(v) if k in layers else v for k, v in numbers.items() if np.ndim(v) < 2}
        stuck = int(numbers.pop("stuck"))
        del numbers["tokens"]
        numbers |= {"tokens_seen": self.tokens_seen, "tokens_per_second": speed}
        if evaluates:
            where = self.config, self.state, self.corpus, self.mesh
            self.evaluation = evaluate(*where, self.watchdog)
            store_routing(*where, self.workdir, self.watchdog)
            numbers |= self.evaluation
        if self.log is not None:
            self.log.write(step, numbers, layers)
        self.display.report(step + 1, numbers)
        if stuck >= MAX_STUCK:
            raise FloatingPointError(self._why_stuck(step, batch, stuck))
        self.clock.restart()

    def _save(self, step: int) -> None:
        self._count()
        if self.log is not None:
            self.log.flush()
        extra = {"config": as_dict(self.config), "tokens_seen": self.tokens_seen, **self.made_by}
        self.checkpoints.save(step, self.state, extra)

    def _why_stuck(self, step: int, batch: "Batch", stuck: int) -> str:
        """Which tensor was not finite; nothing has moved since the first of these steps."""
        from moe_jax.step import first_non_finite

        before = self.state._replace(step=self.state.step - 1)
        where = first_non_finite(self.config, before, batch, self.mesh)
        return (
            f"step {step}: loss or gradient was not finite {stuck} times in a row (first: {where}); the "
            f"parameters are those before. Lower optimizer.learning_rate={self.config.optimizer.learning_rate} "
            "or look at the data; the newest checkpoint is finite."
        )


def mean_of_layers(values: Any) -> float | None:
    """The mean over the layers where the value exists; None where it does in none."""
    exists = values[np.isfinite(values)]
    return float(exists.mean()) if exists.size else None


class Clock:
    """Tokens per second between logged steps, with compilation and evaluation left out."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0

    def count(self, tokens: int) -> int:
        """Add tokens; gives them back."""
        self._tokens += tokens
        return tokens

    def restart(self) -> None:
        """Count from now."""
        self._since, self._tokens = time.perf_counter(), 0

    def tokens_per_second(self) -> float | None:
        """None where nothing has been timed."""
        if self._since is None or self._tokens == 0:
            return None
        return self._tokens / (time.perf_counter() - self._since)


def _restore_or_init(config: Config, workdir: Path, mesh: "Mesh", corpus: "Corpus") -> tuple["TrainState", int]:
    from moe_jax.state import init_state

    found = restore_run(config, workdir, mesh)
    if found is None:
        return with_hash_tables(config, init_state(config, mesh), corpus), 0
    state, extra = found
    refuse_another_config(workdir, "checkpoint", extra["config"], config)
    return state, extra["tokens_seen"]


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


def check_workdir(workdir: Path, config: Config) -> None:
    """Raise a ValueError if the workdir is a file, or another config's run is in it (the differences are shown)."""
    file = workdir / "config.json"
    if file.is_file():
        refuse_another_config(workdir, "run", read_config(file), config)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file and must be a folder; name another.")


@contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Hold the workdir, made if absent, for this run; process 0 does, for all.

    Raises:
        ValueError: another command holds it, or some processes of this run see another folder under its name.
    """
    with ExitStack() as held:
        distributed.by_first(lambda: held.enter_context(_locked(workdir)))
        if distributed.count() > 1:
            token = distributed.by_first(lambda: _leave_token(workdir))
            distributed.by_all(lambda: _find_token(workdir, token))
        yield


@contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_remote(workdir):  # a bucket has no locks: one command at a time is the user's to see to
        yield
        return
    with open(workdir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--workdir={workdir} is in use by another process; wait for it, or use another workdir."
            ) from None
        yield


def _leave_token(workdir: Path) -> str:
    token = secrets.token_hex(8)
    (workdir / ".token").write_text(token)
    return token


def _find_token(workdir: Path, token: str, patience_seconds: float = 10.0) -> None:
    """Raise a ValueError unless process 0's token is seen in the workdir; network file systems take a while."""
    end = time.monotonic() + patience_seconds
    while not (workdir / ".token").is_file() or (workdir / ".token").read_text() != token:
        if time.monotonic() > end:
            raise ValueError(
                f"--workdir={workdir} is not the folder that process 0 sees; name one on a file system that all "
                "hosts share."
            )
        time.sleep(0.1)


def record(workdir: Path, config: Config, made_by: dict[str, Any]) -> None:
    """Write config.json, which claims the workdir for this config, and run.json."""
    write_json(workdir / "config.json", as_dict(config))
    write_json(workdir / "run.json", made_by | {"machine": f"{platform.machine()} {platform.system()}"})


def refuse_another_config(workdir: Path, what: str, there: dict[str, Any], config: Config) -> None:
    """Raise a ValueError with the differences, unless `there` (read from JSON) is `config`."""
    # a key that is younger than the run has its default; as_dict of a file read back has lists for tuples
    there, here = (json.loads(json.dumps(as_dict(validate(c)))) for c in (there, config))
    if changed := differences(_what_makes_a_run(there), _what_makes_a_run(here)):
        raise ValueError(
            f"--workdir={workdir} holds a {what} of another config; use another workdir, or the same config. "
            "The differences (there -> here):\n  " + "\n  ".join(changed)
        )


def _what_makes_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that change no number of the training, or by rounding only: free when a run goes on."""
    free = {"mesh", "compiler_options", "checkpoint", "log_every", "eval_every", "save_every"}
    free |= {"heartbeat_seconds", "step_timeout_seconds", "measure_every", "record_scores_every"}
    model = {k: v for k, v in config.get("model", {}).items() if k not in ("remat", "unroll_layers")}
    if model.get("dispatch") in DROPLESS:
        model["dispatch"] = "auto"
    return {k: v for k, v in config.items() if k not in free} | {"model": model}


def versions() -> dict[str, Any]:
    """What made a run: library versions, and the git revision of this package if it lies in a clone."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    revision = None
    if shutil.which("git"):  # an installed package runs where there is no git, too
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "versions": {"python": platform.python_version()} | {p: metadata.version(p) for p in packages},
        "git": revision,
    }


def _prefetched(batch_at: Callable[[int], "Batch"], first: int, last: int) -> Iterator[tuple[int, "Batch"]]:
    """(step, batch) for every step; the next batch is made while the device works on this one."""
    with concurrent.futures.ThreadPoolExecutor(1, "data") as pool:
        ahead = pool.submit(batch_at, first) if first < last else None
        for step in range(first, last):
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(batch_at, step + 1) if step + 1 < last else None
            yield step, batch


@contextmanager
def _signals() -> Iterator[Callable[[int], int | None]]:
    """Note SIGTERM and SIGINT instead of dying of them; yields `stopped(step)`, the signal to stop for or None.

    With several processes they must stop at the same step. JAX's preemption service agrees on one: it catches
    SIGTERM (that handler stays), and a SIGINT is passed on to it.
    """
    caught: list[int] = []
    many = distributed.count() > 1

    def note(number: int, _: Any) -> None:
        caught.append(number)

    def pass_on(number: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handlers: dict[int, Any] = {signal.SIGINT: pass_on} if many else {signal.SIGTERM: note, signal.SIGINT: note}
    before = {kind: signal.signal(kind, handler) for kind, handler in handlers.items()}
    try:
        yield _agreed_stop if many else lambda _: caught[0] if caught else None
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _agreed_stop(step: int) -> int | None:
    from jax.experimental import multihost_utils

    return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None


def main(_: list[str]) -> None:
    """Check the config and the data before jax is loaded, then run."""
    flag = flags.FLAGS
    try:
        if not flag.workdir:
            raise ValueError(
                "--workdir= is empty and would be the current folder; name one, or write --workdir=. for it."
            )
        if flag.stop_at < 0:
            raise ValueError(f"--stop_at={flag.stop_at} must be at least 0; 0 trains to num_steps.")
        config, workdir = validate(flag.config), workdir_of(flag.workdir)
        from moe_jax.data import check_corpus

        check_corpus(config.data.path)
        watchdog = Watchdog(config.step_timeout_seconds)
        with distributed.joined(config.heartbeat_seconds, lambda: watchdog.doing):
            outcome = run(config, workdir, stop_at=flag.stop_at, watchdog=watchdog)
            if outcome.signal:
                raise SystemExit(128 + outcome.signal)
            if distributed.index() == 0:
                print(f"{outcome.step} of {config.num_steps} steps done in {flag.workdir}", flush=True)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))


if __name__ == "__main__":
    define_config_flag("A config file of ours or yours.")
    flags.DEFINE_string("workdir", None, "Where the run lives; made if absent.")
    flags.DEFINE_integer("stop_at", 0, "Stop and save after so many steps; the same command without it goes on.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
