"""What may be done around a train step, every N of them: what a hook is, and what it sees."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.config import Config
from moe_jax.runtime.display import Display
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.log import RunLog
from moe_jax.runtime.signals import Stopped
from moe_jax.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from moe_jax.data import Batch, Corpus
    from moe_jax.training.state import TrainState


class TokenCount:
    """The valid tokens of a run so far; those of its newest steps stay on the devices until the next `fetch`."""

    def __init__(self, ledger: Ledger, seen: int) -> None:
        self.seen = seen
        self._ledger = ledger
        self._on_devices: list[Any] = []

    def add(self, tokens: Any) -> None:
        """Those of a step, int32[]; never waits."""
        self._on_devices.append(tokens)

    def fetch(self, values: Any = None) -> Any:
        """`values` on the host, counting the tokens in the same transfer, which waits for every step so far."""
        import jax

        values, counts = jax.device_get((values, self._on_devices))
        self._on_devices = []
        self.seen += self._ledger.count(sum(map(int, counts)))
        return values


class Context(NamedTuple):
    """What stays the same around every step of a run.

    corpus, mesh: the data, and the devices. ledger: `with ledger("evaluation"):` charges time that is not a step's.
    tokens: `tokens.fetch(values)` brings numbers to the host. display: `display.say(line)`. log: metrics.jsonl, in
    process 0; None in the others. stopped: the signal that the run is to end for; every process must call it equally
    often and in the same places.
    """

    config: Config
    workdir: Path
    corpus: "Corpus"
    mesh: "Mesh"
    ledger: Ledger
    tokens: TokenCount
    display: Display
    watchdog: Watchdog
    log: RunLog | None
    stopped: Stopped


class Now(NamedTuple):
    """A step that is due, or was given to the devices.

    step: 0-based. state: before the step it is what the step will use up, so keep none of its arrays; after it, the new
    one. values: arrays by name, on the devices: before the step those that `before` of hooks gave so far, after it also
    its own, as "loss" and "loads".
    """

    step: int
    state: "TrainState"
    batch: "Batch"
    values: dict[str, Any]

    @property
    def done(self) -> int:
        """The steps done with this one."""
        return self.step + 1


class Hook:
    """Something done around the steps of a run; a subclass overrides what it needs.

    It may be slow, wait for the devices or fail, but it changes neither the state nor the batch. Every process calls
    it, in the same order.
    """

    every: int = 1  # act at every N-th step; 0 at none
    key: str = ""  # of the config, if that says how often

    def is_due(self, done: int) -> bool:
        """Whether to act at the step after which `done` are done."""
        return self.every > 0 and done % self.every == 0

    def begin(self, context: Context, state: "TrainState") -> None:
        """Before the first step of a start, in which `state.step` steps are done already."""

    def before(self, context: Context, now: Now) -> Mapping[str, Any]:
        """At a step that is due next; gives arrays to log with its numbers: float32[], or by layer float32[L, ...]."""
        return {}

    def after(self, context: Context, now: Now) -> None:
        """At a step that was given to the devices, which may still work on it."""

    def evaluate(self, context: Context, state: "TrainState") -> Mapping[str, float]:
        """At every evaluation; gives numbers to add to it. One that is cut off here is repeated at the next start."""
        return {}

    def close(self, context: Context) -> None:
        """After the last step, and after an error."""
