"""Effects in a branched sweep, with trunk seeds as blocks.

y[m, s, a, d] is a number of the branch under arm a, with data seed d, from the trunk of method m and trunk seed s.
Branches of one trunk begin with the same state, and those of one data seed read the same batches, so differences are
taken between branches of equal (m, s, d), D = y[a] - y[baseline], and what a trunk and its data share cancels.

What does not cancel is that one trunk may suit an arm better than another does. The branches of one trunk share this,
so they are not independent: every quantity is first averaged to one number per trunk seed, its block, and the interval
is the t-interval of the blocks. Trunk methods have equal weights in a block. A block in which a trunk method has no
pair is left out: an average of the others would move by the method that is missing.

The blocks are independent only if their data seeds differ. If all trunk seeds have the same data seeds, the intervals
hold for other trunk seeds, but only for these orders of the data (`shared_seeds`).
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from .intervals import Interval, interval


class Branch(NamedTuple):
    """What names a branch: the method and the seed of its trunk, its arm, and its data seed."""

    trunk: str
    trunk_seed: int
    arm: str
    seed: int


Values = Mapping[Branch, float]  # finite numbers, one per finished branch
Cells = dict[tuple[str, int], list[float]]  # (trunk method, trunk seed) -> one number per data seed


class Blocks(NamedTuple):
    """A quantity of a branched sweep.

    Attributes:
        blocks: trunk seed -> the quantity in that block, in the unit of the values.
        left_out: trunk seeds that have some of the branches, but not of every trunk method.
    """

    blocks: dict[int, float]
    left_out: list[int]

    @property
    def interval(self) -> Interval:
        """Mean over the blocks and 95 % t-interval; n is the number of blocks."""
        return interval(self.blocks.values())


def effect(values: Values, arm: str, baseline: str) -> Blocks:
    """What the arm changes: the mean of D over all trunk methods, equally weighted, and data seeds.

    Args:
        values: finite numbers of the finished branches, any unit.
        arm: an arm.
        baseline: the arm that is subtracted.

    Returns:
        Negative where the arm has the smaller numbers.
    """
    return _contrast(pairs(values, arm, baseline), dict.fromkeys(trunks_of(values), 1.0), normalize=True)


def effect_on(values: Values, arm: str, baseline: str, trunk: str) -> Blocks:
    """The mean of D over data seeds on the trunks of one method."""
    return _contrast(pairs(values, arm, baseline), {trunk: 1.0}, normalize=True)


def favour(values: Values, arm: str, baseline: str) -> Blocks:
    """The interaction of arm and trunk: D on the trunks of the arm's own method, minus the mean of D on the others.

    A method's own trunk is the one of its name.

    Returns:
        Negative where the arm does better, against the baseline, on its own trunks than on others; no blocks if no
        trunk has the arm's name, or there is no other trunk method.
    """
    own = trunks_of(values)
    others = [trunk for trunk in own if trunk != arm]
    if arm not in own or not others or arm == baseline:
        return Blocks({}, [])
    return _contrast(pairs(values, arm, baseline), {arm: 1.0} | dict.fromkeys(others, -1.0 / len(others)))


def switching_cost(values: Values, arm: str) -> Blocks:
    """What it costs to begin with another method: y[m, s, a, d] on the other trunks, minus y[a, s, a, d] on the own.

    The branch that stays is the arm from the trunk of its own method; the branch that switches is the same arm from the
    trunk of another method, with the same trunk seed and data seed, averaged over the other methods. No baseline is
    involved, and nothing that the trunks share but their first weights and data cancels: this compares whole runs,
    of which one changes its method at the step of branching.

    Returns:
        Positive where the arm ends with larger numbers after a switch; no blocks if no trunk has the arm's name.
    """
    own = trunks_of(values)
    others = [trunk for trunk in own if trunk != arm]
    if arm not in own or not others:
        return Blocks({}, [])
    cells: Cells = {}
    for branch, value in sorted(values.items()):
        stays = branch._replace(trunk=arm)
        if branch.arm == arm and branch.trunk != arm and stays in values:
            cells.setdefault((branch.trunk, branch.trunk_seed), []).append(value - values[stays])
    return _contrast(cells, dict.fromkeys(others, 1.0), normalize=True)


def pairs(values: Values, arm: str, baseline: str) -> Cells:
    """D = y[arm] - y[baseline] of every trunk, by data seed in ascending order; trunks without a pair are absent."""
    cells: Cells = {}
    for branch, value in sorted(values.items()):
        other = branch._replace(arm=baseline)
        if branch.arm == arm and other in values:
            cells.setdefault((branch.trunk, branch.trunk_seed), []).append(value - values[other])
    return cells


def trunks_of(values: Iterable[Branch]) -> list[str]:
    """The trunk methods of the branches, sorted."""
    return sorted({branch.trunk for branch in values})


def shared_seeds(values: Iterable[Branch]) -> list[int]:
    """The data seeds that more than one trunk seed has, sorted; the blocks are independent if there are none."""
    users: dict[int, set[int]] = {}
    for branch in values:
        users.setdefault(branch.seed, set()).add(branch.trunk_seed)
    return sorted(seed for seed, trunk_seeds in users.items() if len(trunk_seeds) > 1)


def _contrast(cells: Cells, weights: Mapping[str, float], normalize: bool = False) -> Blocks:
    """The weighted sum over trunk methods of the cells' means, by trunk seed; with `normalize` the weighted mean."""
    total = sum(weights.values()) if normalize else 1.0
    seeds = sorted({seed for trunk, seed in cells if trunk in weights})
    whole = [seed for seed in seeds if all((trunk, seed) in cells for trunk in weights)]
    blocks = {seed: sum(w * fmean(cells[trunk, seed]) for trunk, w in weights.items()) / total for seed in whole}
    return Blocks(blocks, [seed for seed in seeds if seed not in blocks])


def complete(cells: Cells, trunks: Sequence[str]) -> list[int]:
    """The trunk seeds for which every one of the trunk methods has a cell, sorted."""
    return sorted(s for s in {seed for _, seed in cells} if all((trunk, s) in cells for trunk in trunks))
