"""What a run is set up with before it has a state, and how it ended."""

from pathlib import Path
from typing import NamedTuple

from moe_jax.config import Config
from moe_jax.data import Corpus
from moe_jax.runtime.display import Display
from moe_jax.runtime.ledger import Ledger
from moe_jax.runtime.watchdog import Watchdog


class Setup(NamedTuple):
    """What a run has once its config, workdir and data are checked, before jax is loaded."""

    config: Config
    workdir: Path
    corpus: Corpus
    ledger: Ledger
    display: Display
    watchdog: Watchdog


class Outcome(NamedTuple):
    """How a call of `run` ended: the steps done, the signal that stopped it early, if any, and the last evaluation."""

    step: int
    signal: int | None
    evaluation: dict[str, float | int]
