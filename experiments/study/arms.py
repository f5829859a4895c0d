"""The arms of the main sweep in families, and their numbers by block, for the pictures and tables of the page."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..report.branched import Branched
from ..report.numbers import last
from ..statistics.intervals import Interval, interval
from .measures import BALANCE, QUALITY, Found, Number, Tables, effect, level

TABLE = "arms"
BASELINE = "bias"
CORE = ("bias", "aux_1e-2", "none", "aux_1e-1", "sequence_1e-1", "quantile")
EXPERTS = ("bias", "aux_1e-2", "none", "bias_1e-1", "quantile", "flipped")  # arms of which single experts are shown
WEIGHTS = {"aux_1e-4": "1e-4", "aux_1e-3": "1e-3", "aux_1e-2": "1e-2", "aux_1e-1": "1e-1"}
RATES = {"bias_1e-4": "1e-4", "bias_1e-3": "1e-3", "bias": "5e-3", "bias_3e-2": "3e-2", "bias_1e-1": "1e-1"}
CONTROLS = ("none", "frozen", "aux_as_bias")
# rule -> its final max violation in the simulator, at the rate of configs/ablation/rules.py
RULES = {
    "sign": 0.2452,
    "proportional": 0.2435,
    "rms": 0.2426,
    "pi": 0.2405,
    "smebu": 0.2452,
    "quantile": 0.2713,
    "multiplicative": 0.2478,
}
SCOPES = ("bias", "aux_1e-2", "sequence_1e-2", "aux_1e-1", "two_sequences_1e-1", "sequence_1e-1")


class Point(NamedTuple):
    """An arm's place between quality and balance.

    Attributes:
        dots: block -> (held-out max violation, held-out bits per byte minus the baseline's).
        runs: folders of the runs that the numbers came from.
    """

    arm: str
    dots: dict[int, tuple[float, float]]
    runs: list[Path]

    @property
    def violation(self) -> Interval:
        """Mean over blocks and 95 % interval."""
        return interval(x for x, _ in self.dots.values())

    @property
    def difference(self) -> Interval:
        """Mean over blocks and 95 % interval; of the baseline 0 in every block."""
        return interval(y for _, y in self.dots.values())


def main_sweep(tables: Tables) -> Branched | None:
    """The main sweep, if it is there and branched."""
    sweep = tables.get(TABLE)
    return sweep if isinstance(sweep, Branched) else None


def points(tables: Tables, arms: Iterable[str]) -> dict[str, Point]:
    """Arm -> its point, for the arms that have a block in common with the baseline."""
    found = {}
    for arm in arms:
        x = level(TABLE, arm, last(BALANCE))(tables)
        y = effect(TABLE, arm, BASELINE, last(QUALITY))(tables)
        dots = {seed: (x.blocks[seed], y.blocks[seed]) for seed in sorted(x.blocks.keys() & y.blocks.keys())}
        if dots:
            found[arm] = Point(arm, dots, list(dict.fromkeys([*x.runs, *y.runs])))
    return found


def levels(tables: Tables, arms: Iterable[str], number: Number) -> dict[str, Found]:
    """Arm -> the mean of a number by block, for the arms that have one."""
    found = {arm: level(TABLE, arm, number)(tables) for arm in arms}
    return {arm: one for arm, one in found.items() if one.blocks}


def effects(tables: Tables, arms: Iterable[str], number: Number) -> dict[str, Found]:
    """Arm -> its number minus the baseline's by block, for the arms that have one."""
    found = {arm: effect(TABLE, arm, BASELINE, number)(tables) for arm in arms if arm != BASELINE}
    return {arm: one for arm, one in found.items() if one.blocks}


def only(sweep: Branched, arms: Iterable[str]) -> Branched:
    """A branched sweep as if it had these arms alone, in this order; arms that it lacks are left out."""
    kept = [arm for arm in arms if arm in sweep.arms]
    parts = {
        name: replace(part, arms=kept, runs={arm: part.runs[arm] for arm in kept}) for name, part in sweep.parts.items()
    }
    return replace(sweep, arms=kept, parts=parts)
