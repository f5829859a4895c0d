"""What imbalance would cost with expert parallelism, computed from logged loads: a model, not a measurement.

Experts are spread over devices, consecutive ones together. In a synchronous step every device waits, layer by layer,
for the one with the most token copies, so the experts' part of the step takes the factor

    mean over layers and steps of (largest load of a device / mean load of the devices)

times as long as with even loads. Communication, memory and everything that is not an expert are left out.
"""

import math

import numpy as np

from ..report.numbers import last_quarter, layer_arrays
from ..report.sweep import Run

DEVICES = 8
DRAWS = 200  # batches of a random router


def device_factor(run: Run) -> float:
    """The factor on the experts' time over the last quarter of a run's logged steps; at least 1.

    Returns:
        nan without logged loads, or if the experts do not divide by the devices.
    """
    arrays = layer_arrays(run)
    return math.nan if arrays is None else factor(last_quarter(arrays[1]))


def factor(loads: np.ndarray) -> float:
    """Loads float64[N, L, E] -> mean over N and L of the largest device's load by the mean; nan if not whole."""
    steps, layers, experts = loads.shape
    if experts % DEVICES:
        return math.nan
    devices = loads.reshape(steps, layers, DEVICES, experts // DEVICES).sum(axis=3)
    return float((devices.max(axis=2) / devices.mean(axis=2)).mean())


def random_factor(tokens: int, experts: int, top_k: int) -> float:
    """The factor of a router that gives each of a step's tokens to top_k experts at random."""
    generator = np.random.default_rng(0)
    loads = np.zeros((DRAWS, 1, experts))
    for draw in loads[:, 0]:
        chosen = generator.random((tokens, experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
        draw += np.bincount(chosen.ravel(), minlength=experts)
    return factor(loads)
