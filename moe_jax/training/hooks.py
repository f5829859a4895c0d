"""Hooks: what may be done around the train step every N steps, and what a hook is passed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.config import Config
from moe_jax.data import Batch, Corpus
from moe_jax.runtime.display import Display
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.log import RunLog
from moe_jax.runtime.signals import Stopped
from moe_jax.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.training.rollback import Rollback
    from moe_jax.training.state import TrainState


class TokenCount:
    """Counts the valid tokens of a run; counts of the newest steps stay on the devices until the next `fetch`."""

    def __init__(self, ledger: Ledger, seen: int) -> None:
        self.seen = seen
        self._ledger = ledger
        self._on_devices: list[Any] = []

    def add(self, tokens: Any) -> None:
        """Add the tokens of a step, int32[] on the devices; does not wait for them."""
        self._on_devices.append(tokens)

    def fetch(self, values: Any = None) -> Any:
        """Fetch `values` and the token counts to the host in one transfer, which waits for every step so far."""
        import jax

        values, counts = jax.device_get((values, self._on_devices))
        self._on_devices = []
        self.seen += self._ledger.count(sum(map(int, counts)))
        return values


class Context(NamedTuple):
    """What stays the same around every step of a run.

    corpus, mesh: the data, and the devices. ledger: `with ledger("evaluation"):` charges time that is not a step's.
    tokens: `tokens.fetch(values)` copies numbers to the host. display: `display.say(line)` prints a line. log:
    metrics.jsonl in process 0, None in the others. stopped: `stopped()` returns the signal that ends the run, or None;
    every process must call it equally often and in the same places. rollbacks: of the run so far (`guard.rollback`).
    """

    config: Config
    workdir: Path
    corpus: Corpus
    mesh: "Mesh"
    ledger: Ledger
    tokens: TokenCount
    display: Display
    watchdog: Watchdog
    log: RunLog | None
    stopped: Stopped
    rollbacks: "tuple[Rollback, ...]" = ()


class Now(NamedTuple):
    """A step that is due, or was dispatched to the devices.

    step: 0-based. state: before the step the state that will be donated to it, so keep none of its arrays; after it the
    new state. values: arrays by name, on the devices: before the step those that the hooks' `before` returned so far,
    after it also the step's own, such as "loss" and "loads".
    """

    step: int
    state: "TrainState"
    batch: Batch
    values: dict[str, Any]

    @property
    def done(self) -> int:
        """The number of steps done, including this one."""
        return self.step + 1


class Hook:
    """An action around the steps of a run; a subclass overrides the methods that it needs.

    It may be slow, wait for the devices or fail, but it changes neither the state nor the batch. Every process calls
    it, in the same order.
    """

    every: int = 1  # act at every N-th step; 0 for never
    key: str = ""  # the config key of the interval, if there is one

    def is_due(self, done: int) -> bool:
        """Whether to act at the step after which `done` steps are done."""
        return self.every > 0 and done % self.every == 0

    def begin(self, context: Context, state: "TrainState") -> None:
        """Called before the first step of this start, and after a rollback; `state.step` steps are done already."""

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """Called before a step; returns arrays to log with its numbers: float32[], or float32[L, ...] by layer."""
        return {}

    def after(self, context: Context, now: Now) -> None:
        """Called after a step was dispatched; the devices may not have finished it."""

    def evaluate(self, context: Context, state: "TrainState") -> Mapping[str, float]:
        """Called at every evaluation; returns numbers to add to it. If it is cut off, the next start repeats it."""
        return {}

    def close(self, context: Context) -> None:
        """Called after the last step, and after an error."""
