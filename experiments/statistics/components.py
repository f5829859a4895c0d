"""What the spread of paired differences consists of, estimated by the method of moments (analysis of variance).

For a branched sweep D[m, s, d] = mean of method m + block[s] + trunk[m, s] + noise[m, s, d], so that a block mean over
M trunk methods and n data seeds has the variance

    block^2 + trunk^2 / M + noise^2 / (M n).

More data seeds reduce only the last term, and more trunk seeds reduce all.
"""

import math
from collections.abc import Iterable
from statistics import harmonic_mean
from typing import NamedTuple

import numpy as np

from .blocks import Cells, complete
from .intervals import CONFIDENCE, finite_of


class Spread(NamedTuple):
    """A standard deviation, and its 95 % interval for independent normal numbers, in their unit; n numbers.

    All are nan with fewer than two numbers.
    """

    sd: float
    low: float
    high: float
    n: int


class Components(NamedTuple):
    """The spread of the blocks of a branched sweep, and its parts as standard deviations in the unit of the values.

    Attributes:
        of_blocks: between block means; what an interval over blocks depends on.
        block: what all trunk methods of a trunk seed share.
        trunk: what the branches of one trunk share; nan with one trunk method, where `block` contains it.
        noise: between data seeds of one trunk; nan with one data seed, where `trunk` or `block` contains it.
        num_trunks: M, trunk methods.
        num_seeds: data seeds per trunk, the harmonic mean over trunks.
    """

    of_blocks: Spread
    block: float
    trunk: float
    noise: float
    num_trunks: int
    num_seeds: float

    def with_seeds(self, num_seeds: int) -> float:
        """The standard deviation of block means expected with another number of data seeds per trunk.

        At least what the noise between data seeds alone makes of it; nan where that noise is not known and
        the number is another one.
        """
        if not math.isfinite(self.noise):
            return self.of_blocks.sd if num_seeds == self.num_seeds else math.nan
        noise = self.noise**2 / self.num_trunks
        variance = self.of_blocks.sd**2 + noise * (1 / num_seeds - 1 / self.num_seeds)
        # the noise is known better than the few blocks, and they cannot spread less than it makes them
        return math.sqrt(max(variance, noise / num_seeds)) if math.isfinite(variance) else math.nan


def spread(values: Iterable[float]) -> Spread:
    """The standard deviation (n - 1) of finite numbers, with the interval from the chi-square distribution."""
    from scipy import stats

    known = finite_of(values)
    n = int(known.size)
    if n < 2:
        return Spread(math.nan, math.nan, math.nan, n)
    sd = float(known.std(ddof=1))
    low, high = (math.sqrt((n - 1) / stats.chi2.ppf(0.5 + sign * CONFIDENCE / 2, n - 1)) for sign in (1, -1))
    return Spread(sd, sd * low, sd * high, n)


def components(cells: Cells) -> Components:
    """The components of paired differences; blocks that lack a trunk method are left out.

    Args:
        cells: (trunk method, trunk seed) -> differences by data seed, as `blocks.pairs` returns them.

    Returns:
        Estimates that would be negative are 0.
    """
    trunks = sorted({trunk for trunk, _ in cells})
    seeds = complete(cells, trunks)
    kept = [[cells[trunk, seed] for seed in seeds] for trunk in trunks]
    means = np.asarray([[float(np.mean(cell)) for cell in row] for row in kept]).reshape(len(trunks), len(seeds))
    counts = [len(cell) for row in kept for cell in row]
    of_blocks = spread(means.mean(axis=0)) if trunks else spread([])
    free = sum(counts) - len(counts)
    within = sum(float(np.var(cell)) * len(cell) for row in kept for cell in row)
    noise = within / free if free else math.nan
    num_seeds = float(harmonic_mean(counts)) if counts else math.nan
    noise_of_cell = noise / num_seeds if free else 0.0
    interaction = _interaction(means)  # trunk^2 + noise^2 / n
    trunk = interaction - noise_of_cell
    shared = (interaction if len(trunks) > 1 else noise_of_cell) / max(len(trunks), 1)
    block = of_blocks.sd**2 - shared
    return Components(of_blocks, _root(block), _root(trunk), _root(noise), len(trunks), num_seeds)


def _interaction(means: np.ndarray) -> float:
    """The mean square that is left of means [M, S] without those of rows and columns; nan if M or S is below 2."""
    rows, columns = means.shape
    if min(rows, columns) < 2:
        return math.nan
    rest = means - means.mean(axis=1, keepdims=True) - means.mean(axis=0, keepdims=True) + means.mean()
    return float((rest**2).sum()) / ((rows - 1) * (columns - 1))


def _root(variance: float) -> float:
    return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
