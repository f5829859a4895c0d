"""Numbers of one run. The intervals over several seeds are those of `statistics/intervals.py`."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from moe_jax.runtime.ledger import KINDS
from moe_jax.runtime.log import LAYERS

from ..statistics.intervals import finite_of
from .sweep import Run, as_number, by_step


def for_programs(value: Any) -> Any:
    """A value for JSON, with null for every number in it that is not finite."""
    if isinstance(value, dict):
        return {key: for_programs(one) for key, one in value.items()}
    if isinstance(value, list):
        return [for_programs(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- one run --------------------------------------------------------------------------------------------


def last(key: str) -> Callable[[Run], float]:
    """A function that returns the value in a run's last line with the key; nan if no line has it."""
    return lambda run: run.final(key)


def tail(key: str) -> Callable[[Run], float]:
    """A function that returns the mean over the last quarter of a run's lines with the key; nan if none is finite."""

    def mean(run: Run) -> float:
        finite = finite_of(last_quarter(run.curve(key)[1]))
        return float(finite.mean()) if finite.size else math.nan

    return mean


def typical(key: str, factor: float = 1.0) -> Callable[[Run], float]:
    """A function that returns the median over a run's lines with the key, times a factor; nan if none is finite."""

    def median(run: Run) -> float:
        finite = finite_of(run.curve(key)[1])
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
