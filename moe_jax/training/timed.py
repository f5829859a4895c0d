"""The batches and the train step, timed by the ledger and watched by the watchdog."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from moe_jax import data
from moe_jax.data import Batch
from moe_jax.mesh import platform
from moe_jax.runtime import processes
from moe_jax.runtime.prefetch import prefetched
from moe_jax.runtime.profiling import named
from moe_jax.runtime.watchdog import Watched
from moe_jax.training import compile
from moe_jax.training.hooks import Context, Now
from moe_jax.training.rollback import batch_of
from moe_jax.training.state import TrainState, step_key


class TimedStep:
    """The train step; the first one compiles, and is excluded from the measured speed.

    Attributes:
        before_dispatch: seconds so far from the arrival of a batch to the dispatch of its step.
    """

    def __init__(self, context: Context) -> None:
        self.before_dispatch = 0.0
        self._arrived = time.perf_counter()
        self._context = context
        self._train_step = compile.make_train_step(context.config, context.mesh)
        self._key = step_key(context.config)
        self._later: Sequence[Batch] = ()
        self._newest: Watched | None = None
        # XLA:CPU lets 32 programs of a device run ahead. A thread that waits for its turn may be the one that a
        # collective of an earlier program needs, and after 40 seconds XLA ends the process.
        self._waits = platform(context.mesh) == "cpu" and context.mesh.size > 1

    def __call__(self, now: Now) -> tuple[TrainState, dict[str, Any]]:
        """Dispatch the step to the devices; waits for its result only if it is the first, or on several CPU devices."""
        context = self._context
        self.before_dispatch += time.perf_counter() - self._arrived
        compiles = self._newest is None
        self._newest = context.watchdog.watch("step", now.step)
        with context.ledger("compile" if compiles else "step"):
            with named(now.step):
                state, values = self._train_step(now.state, now.batch, self._key, *self._later)
            self._newest.result = values["loss"]
            context.tokens.add(values["tokens"])
            if self._waits:
                jax.block_until_ready(values["loss"])
            if compiles:
                context.tokens.fetch()
                context.ledger.restart()
        return state, values

    def expect(self, later: Sequence[Batch]) -> None:
        """To be called when the batches of the next step have arrived; `later` are those after its own."""
        self._arrived = time.perf_counter()
        self._later = later

    def kind_of_wait(self) -> str:
        """The ledger's kind for a wait that ends now: "step" if the devices still work on the newest step, or "data".

        Before the first step it is "init".
        """
        if self._newest is None:
            return "init"
        return "data" if self._newest.finished() else "step"


def timed_batches(context: Context, first: int, last: int, train_step: TimedStep) -> Iterator[tuple[int, Batch]]:
    """(step, its batch on the mesh) for the steps from `first` to before `last`; each process reads only its rows."""
    config = context.config
    batch_at = data.training_batches(
        context.corpus,
        seed=config.seed,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        weights=config.data.weights,
        packing=config.data.packing,
    )
    if config.data.packing != "stream":
        context.display.say(f"data.packing={config.data.packing}: {batch_at.padding:.1%} of the tokens are padding")
    whole = compile.abstract_batch(config, context.mesh, context.corpus.weighted)
    delay = config.anticipation.delay

    def load(step: int) -> list[Batch]:
        steps = (step, step + delay) if delay else (step,)
        numbers = (batch_of(context.rollbacks, n) for n in steps)
        return [processes.from_rows(functools.partial(batch_at, n), whole) for n in numbers]

    batches = prefetched(load, first, last)
    while True:
        with context.ledger(train_step.kind_of_wait):
            numbered = next(batches, None)
        if numbered is None:
            return
        step, (batch, *later) = numbered
        train_step.expect(later)
        yield step, batch
