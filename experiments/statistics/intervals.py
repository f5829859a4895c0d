"""Intervals over the numbers of several seeds: mean and 95 % t-interval, alone or paired.

An arm is compared with the baseline over the seeds that both have finished (same initial weights, same batches), so
effects common to both runs of a seed cancel; the interval is the 95 % t-interval of those differences.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t-interval.

    Attributes:
        mean: mean over seeds; nan if no seed has the value.
        half: half-width, in the unit of the mean; None with fewer than two seeds.
        n: number of seeds.
    """

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; False without an interval."""
        return self.half is not None and abs(self.mean) > self.half


NOTHING = Interval(math.nan, None, 0)


def interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % t-interval of a few numbers, one per seed; non-finite ones are left out.

    Args:
        values: one number per seed, any unit.

    Returns:
        `Interval(mean, half, n)`; half = t(0.975, n - 1) * standard deviation (n - 1) / sqrt(n).
    """
    finite = finite_of(values)
    if finite.size == 0:
        return NOTHING
    if finite.size == 1:
        return Interval(float(finite[0]), None, 1)
    half = t_quantile(finite.size) * float(finite.std(ddof=1)) / math.sqrt(finite.size)
    return Interval(float(finite.mean()), half, int(finite.size))


def middle(values: Iterable[float]) -> Interval:
    """The median of a few numbers, one per seed, as an `Interval` without a width; non-finite ones are left out."""
    finite = finite_of(values)
    return Interval(float(np.median(finite)), None, int(finite.size)) if finite.size else NOTHING


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean difference to the baseline over the seeds that both have, with its interval.

    Args:
        values: seed -> number of the arm.
        baseline: seed -> number of the baseline, same unit.

    Returns:
        The interval of `values[seed] - baseline[seed]`; n = 0 if they share no seed.
    """
    return interval(values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys()))


def t_quantile(n: int) -> float:
    """The factor between standard error and half-width for n >= 2 seeds: 12.7 at 2, 4.3 at 3, 2.8 at 5."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


def finite_of(values: Iterable[float]) -> np.ndarray:
    """The finite ones of some numbers, float64[N]."""
    array = np.asarray(list(values), dtype=np.float64)
    return array[np.isfinite(array)]
