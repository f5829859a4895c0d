"""The numbers of a branched sweep as text: the main table, the crossed table, the list of runs, and a line in words."""

from statistics import fmean
from typing import NamedTuple

from ..statistics import blocks
from ..statistics.blocks import Blocks, Values
from ..statistics.intervals import Interval
from .branched import Branched
from .columns import BALANCE, QUALITY, Column, Table, show

MEANINGS = {
    "effect": "arm minus baseline, between branches of one trunk and data seed, averaged over trunk methods with equal "
    "weights",
    "trunk's favour": "the effect on the arm's own trunks minus that on the others; negative: a method does better "
    "where it was before",
    "switching cost": "the arm on other methods' trunks minus the arm on its own, same trunk seed and data seed; "
    "positive: it costs to begin with another method",
}
CROSSED_NOTE = (
    "Mean ± half-width of the 95 % t-interval over trunk seeds, which are the blocks. "
    + ". ".join(f"{name[0].upper()}{name[1:]}: {meaning}" for name, meaning in MEANINGS.items())
    + ". * The interval excludes 0."
)


class Answers(NamedTuple):
    """What a branched sweep says of one arm and one column; without blocks where it says nothing."""

    effect: Blocks
    favour: Blocks
    switching_cost: Blocks


def answers(values: Values, arm: str, baseline: str) -> Answers:
    """The three quantities of an arm; the baseline has a switching cost only."""
    nothing = Blocks({}, [])
    cost = blocks.switching_cost(values, arm)
    if arm == baseline:
        return Answers(nothing, nothing, cost)
    return Answers(blocks.effect(values, arm, baseline), blocks.favour(values, arm, baseline), cost)


def branched_table(sweep: Branched, column: Column = QUALITY) -> Table:
    """A row for each arm: its runs and blocks, its mean, and the three quantities of a column."""
    values = sweep.values(column)
    headers = ["arm", "runs", "blocks", column.title, *MEANINGS]
    rows = []
    for arm in sweep.arms:
        own = [value for branch, value in values.items() if branch.arm == arm]
        found = answers(values, arm, sweep.baseline)
        mean = f"{fmean(own):,.{column.digits}f}" if own else "-"
        used = max(len(one.blocks) for one in found)
        cells = [show(one.interval, column.digits, signed=True) for one in found]
        rows.append([arm, str(len(own)), str(used), mean, *cells])
    return Table(headers, rows)


def left_out(sweep: Branched, column: Column = QUALITY) -> list[str]:
    """A sentence for every trunk seed that an effect leaves out, because a trunk method has no pair there."""
    values = sweep.values(column)
    found = []
    for arm in sweep.arms:
        if arm != sweep.baseline:
            for seed in blocks.effect(values, arm, sweep.baseline).left_out:
                found.append(
                    f"{arm}: trunk seed {seed} is left out of the effect, because a trunk method has no pair there."
                )
    return found


def on_trunk(sweep: Branched, values: Values, trunk: str, arm: str) -> tuple[str, Interval, dict[int, float]]:
    """A cell of the crossed table: the mean of a column, and arm minus baseline on the trunks of one method.

    Returns:
        (mean over runs as text, interval of the difference over trunk seeds, trunk seed -> difference).
    """
    own = [value for branch, value in values.items() if (branch.trunk, branch.arm) == (trunk, arm)]
    mean = f"{fmean(own):,.{QUALITY.digits}f}" if own else "-"
    found = blocks.effect_on(values, arm, sweep.baseline, trunk) if arm != sweep.baseline else Blocks({}, [])
    return mean, found.interval, found.blocks


def sentences(sweep: Branched) -> dict[str, str]:
    """The answer: "Quality", "Balance" and "Certainty", none of which claims more than its interval."""
    counts: dict[str, int] = {}
    found = {}
    for subject, column, unit in (("Quality", QUALITY, "bits per byte"), ("Balance", BALANCE, "max violation")):
        values = sweep.values(column)
        parts = []
        for arm in sweep.arms:
            if arm != sweep.baseline:
                effect = blocks.effect(values, arm, sweep.baseline).interval
                counts[arm] = max(effect.n, counts.get(arm, 0))
                parts.append(f"{arm} {_verdict(effect, sweep.baseline, column.digits)}")
        if values:
            found[subject] = f"Held-out {unit}, where lower is better: " + ("; ".join(parts) or "one arm") + "."
    number = " or ".join(str(n) for n in sorted(set(counts.values()))) or "no"
    found["Certainty"] = (
        f"Differences are arm minus {sweep.baseline}, between branches that begin with the same state after {sweep.at} "
        f"steps and read the same batches; blocks are trunk seeds ({number}), and ± is the half-width of their 95 % "
        "t-interval. It holds for the part of training after the branching, and for trunks of these methods in equal "
        "shares."
    )
    return found


def _verdict(effect: Interval, baseline: str, digits: int) -> str:
    if effect.n == 0:
        return f"has no trunk seed in common with {baseline}"
    text = show(effect, digits, signed=True).removesuffix(" *")
    if effect.half is None:
        return f"has a single block, so no interval ({text})"
    if not effect.excludes_zero:
        return f"is not distinguishable from {baseline} ({text})"
    return f"is {'lower' if effect.mean < 0 else 'higher'} than {baseline} ({text})"


def runs_table(sweep: Branched) -> Table:
    """Every finished branch: what names it, its two main numbers, and the folder that they come from."""
    rows = []
    for branch, run in sweep.runs.items():
        numbers = [f"{column.of(run):.{column.digits + 2}f}" for column in (QUALITY, BALANCE)]
        names = [branch.trunk, str(branch.trunk_seed), branch.arm, str(branch.seed)]
        rows.append([*names, *numbers, str(run.directory.relative_to(sweep.directory))])
    return Table(["trunk", "trunk seed", "arm", "data seed", QUALITY.title, BALANCE.title, "folder"], rows)
