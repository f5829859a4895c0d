"""Numbers and relations as readers see them: ratios in place of logarithms, and digits that the interval allows."""

import math
from typing import NamedTuple

from ..statistics.intervals import Interval
from .claims import LOSS, Relation
from .measures import Found
from .verdicts import Judged

LOG = "log of the "  # units of numbers that are shown as their exponential
SIGNED = (LOSS, "bits per copy")  # units of differences
MOST_DIGITS = 6
ROUNDING = 1e-12  # a spread below this is of float arithmetic


class Quantity(NamedTuple):
    """A unit, and whether its numbers are logarithms, which are shown as ratios."""

    name: str
    is_log: bool
    is_signed: bool


def quantity(unit: str) -> Quantity:
    """What a claim's unit says of its numbers."""
    return Quantity(unit.removeprefix(LOG), unit.startswith(LOG), unit in SIGNED)


def measured(value: Interval, unit: str) -> str:
    """Mean and 95 % interval, without the unit: `+0.0021 ± 0.0008`, or for ratios `0.42 (0.35 to 0.50)`."""
    if value.n == 0:
        return "-"
    _, is_log, is_signed = quantity(unit)
    if is_log:
        mean, half = value.mean, value.half
        ends = "no interval" if half is None else f"{_ratio(mean - half)} to {_ratio(mean + half)}"
        return f"{_ratio(mean)} ({ends})"
    if value.half is not None and value.half < ROUNDING:
        return f"{value.mean:{'+' if is_signed else ''}.3g} ± 0"
    digits = _digits(value)
    text = f"{value.mean:{'+' if is_signed else ''},.{digits}f}"
    return text + (" (no interval)" if value.half is None else f" ± {value.half:,.{digits}f}")


def difference(size: float, unit: str) -> str:
    """The size of a difference: `0.0012`, or for ratios `a factor of 1.08`; `-` if it is not known."""
    if not math.isfinite(size):
        return "-"
    if size < ROUNDING:
        return "any"
    return f"a factor of {_ratio(size)}" if quantity(unit).is_log else f"{size:.2g}"


def claimed(relation: Relation) -> str:
    """What a claim says of its number: `above 0`, `between -0.001 and 0.001`."""
    kind, threshold, unit = relation
    if quantity(unit).is_log:
        low, high = f"{math.exp(-threshold):.3g}", f"{math.exp(threshold):.3g}"
    else:
        low, high = f"{-threshold:.3g}", f"{threshold:.3g}"
    if kind == "within":
        return "0" if threshold == 0 else f"between {low} and {high}"
    return f"either side of {high}" if kind == "either" else f"{kind} {high}"


def blocks(found: Found) -> str:
    """The number of blocks: `4 blocks`, or `3 of 4 blocks` of an unfinished table."""
    n = found.interval.n
    of = f"{n} of {found.planned}" if n < found.planned else str(n)
    return f"{of} block{'s' * (of != '1')}"


def ours(judged: Judged) -> str:
    """What was measured for a claim, its unit and blocks; without blocks, which runs are missing."""
    if judged.verdict == "not measured":
        return f"missing: {judged.found.missing or 'a finite number'}"
    unit = judged.claim.relation.unit
    return f"{measured(judged.found.interval, unit)}\n{quantity(unit).name}; {blocks(judged.found)}"


def published(judged: Judged) -> str:
    """Who published a claim, and the published numbers below it."""
    source, numbers = judged.claim.published
    return f"{source}\n{numbers}" if numbers else source


def _digits(value: Interval) -> int:
    """Decimals that show two digits of the half-width; three of the mean if there is none."""
    size = value.half or abs(value.mean) / 10
    return min(max(1 - math.floor(math.log10(size)), 0), MOST_DIGITS) if size > 0 else 0


def _ratio(logarithm: float) -> str:
    """Three significant digits."""
    value = math.exp(logarithm)
    return f"{value:#.3g}".removesuffix(".") if 0.001 <= value < 1000 else f"{value:.3g}"
