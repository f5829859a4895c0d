"""Numbers of one run, and intervals over the numbers of several seeds.

An arm is compared with the baseline over the seeds that both have finished (same initial weights, same batches), so
effects common to both runs of a seed cancel; the interval is the 95 % t-interval of those differences.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.runtime.ledger import KINDS
from moe_jax.runtime.log import LAYERS

from .sweep import Run, as_number, by_step

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


# --- several seeds --------------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % t-interval of a few numbers, one per seed; non-finite ones are left out.

    Args:
        values: one number per seed, any unit.

    Returns:
        `Interval(mean, half, n)`; half = t(0.975, n - 1) * standard deviation (n - 1) / sqrt(n).
    """
    finite = _finite(values)
    if finite.size == 0:
        return NOTHING
    if finite.size == 1:
        return Interval(float(finite[0]), None, 1)
    half = t_quantile(finite.size) * float(finite.std(ddof=1)) / math.sqrt(finite.size)
    return Interval(float(finite.mean()), half, int(finite.size))


def middle(values: Iterable[float]) -> Interval:
    """The median of a few numbers, one per seed, as an `Interval` without a width; non-finite ones are left out."""
    finite = _finite(values)
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


def _finite(values: Iterable[float]) -> np.ndarray:
    array = np.asarray(list(values), dtype=np.float64)
    return array[np.isfinite(array)]


# --- one run --------------------------------------------------------------------------------------------


def last(key: str) -> Callable[[Run], float]:
    """A function that returns the value in a run's last line with the key; nan if no line has it."""
    return lambda run: run.final(key)


def tail(key: str) -> Callable[[Run], float]:
    """A function that returns the mean over the last quarter of a run's lines with the key; nan if none is finite."""

    def mean(run: Run) -> float:
        finite = _finite(last_quarter(run.curve(key)[1]))
        return float(finite.mean()) if finite.size else math.nan

    return mean


def typical(key: str, factor: float = 1.0) -> Callable[[Run], float]:
    """A function that returns the median over a run's lines with the key, times a factor; nan if none is finite."""

    def median(run: Run) -> float:
        finite = _finite(run.curve(key)[1])
        return factor * float(np.median(finite)) if finite.size else math.nan

    return median


def last_quarter(values: np.ndarray) -> np.ndarray:
    """The last quarter of the rows, rounded up, so that it has at least one row if there is one."""
    return values[len(values) - math.ceil(len(values) / 4) :]


def dead_at_end(run: Run) -> float:
    """The number of experts, over all layers, without a token in the last quarter of logged steps; nan if dense."""
    arrays = layer_arrays(run)
    if arrays is None:
        return math.nan
    _, loads, _ = arrays
    return float((last_quarter(loads).sum(axis=0) == 0).sum())


def layer_arrays(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Loads and biases of every expert over the run, read from layers.jsonl.

    Returns:
        (steps int64[N], loads float64[N, L, E], bias float64[N, L, E] or None if not logged), or None for a run
        without MoE layers. Lines whose shape differs from the last line's are left out.
    """
    lines, _ = by_step(run.directory / LAYERS)
    loads = [_array(line.get("loads")) for line in lines]
    if not loads or loads[-1].ndim != 2 or loads[-1].size == 0:
        return None
    keep = [i for i, load in enumerate(loads) if load.shape == loads[-1].shape]
    biases = [_array(lines[i].get("bias")) for i in keep]
    has_bias = all(bias.shape == loads[-1].shape for bias in biases)
    steps = np.asarray([lines[i]["step"] for i in keep], dtype=np.int64)
    return steps, np.stack([loads[i] for i in keep]), np.stack(biases) if has_bias else None


def _array(nested: Any) -> np.ndarray:
    try:
        return np.asarray(nested, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError):
        return np.empty(0)


def seconds_of(runs: Iterable[Run]) -> dict[str, float]:
    """Kind of work -> seconds of all runs together, from their ledgers; empty if no run has one."""
    times = [time for run in runs if isinstance(time := run.info.get("time"), Mapping)]
    return {kind: sum(as_number(time.get(kind, 0.0)) for time in times) for kind in KINDS} if times else {}
