"""From a claim and the runs to a verdict, by rule alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..statistics.components import spread
from ..statistics.intervals import Interval
from ..statistics.power import smallest
from .claims import Claim, Relation
from .measures import Found, Tables

Verdict = Literal["reproduced", "contradicted", "not resolved", "not measured", "lower", "higher"]


@dataclass(frozen=True)
class Judged:
    """A claim, what was measured, and the verdict that follows.

    Attributes:
        resolution: the smallest true difference from the threshold that these blocks resolve in 4 of 5 studies like
            this one; nan without a spread.
    """

    claim: Claim
    found: Found
    verdict: Verdict
    resolution: float


def judge(claims: Iterable[Claim], tables: Tables) -> list[Judged]:
    """The verdict of every claim, in their order."""
    return [_judged(claim, claim.measure(tables)) for claim in claims]


def _judged(claim: Claim, found: Found) -> Judged:
    measured = found.interval
    if measured.n == 0:
        return Judged(claim, found, "not measured", float("nan"))
    return Judged(
        claim, found, decide(measured, claim.relation), smallest(measured.n, spread(found.blocks.values()).sd)
    )


def decide(measured: Interval, relation: Relation) -> Verdict:
    """The verdict of an interval.

    Args:
        measured: mean and 95 % interval.
        relation: what was claimed of the true value.

    Returns:
        "reproduced" only if the whole interval satisfies the claim, "contradicted" only if no point of it does.
    """
    if measured.half is None:
        return "not resolved"
    kind, threshold, _ = relation
    low, high = measured.mean - measured.half, measured.mean + measured.half
    if kind == "within":
        inside, outside = -threshold <= low and high <= threshold, low > threshold or high < -threshold
    elif kind == "above":
        inside, outside = low > threshold, high <= threshold
    elif kind == "below":
        inside, outside = high < threshold, low >= threshold
    elif low > threshold or high < threshold:
        return "higher" if low > threshold else "lower"
    else:
        inside = outside = False
    return "reproduced" if inside else "contradicted" if outside else "not resolved"
