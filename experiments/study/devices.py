"""What imbalance would cost with expert parallelism, computed from runs on one device: a model, not a measurement.

Experts are spread over devices, consecutive ones together. In a synchronous step every device waits, layer by layer,
for the one with the most token copies, so the experts' part of the step takes the factor

    mean over layers and steps of (largest load of a device / mean load of the devices)

times as long as with even loads. Before that, devices exchange token copies in rounds of a fixed size
(moe_jax/dispatch/rounds.py), as many as the fullest pair of devices needs: 1 with even loads. Memory and everything
that is not an expert are left out.
"""

import math
from typing import Any

import numpy as np

from moe_jax.config import flatten
from moe_jax.runtime.files import read_json

from ..report.numbers import last_quarter, layer_arrays
from ..report.sweep import Run

DEVICES = 8
DRAWS = 200  # batches of a random router
# in the plan of configs/deepseek_v3.py on 2048 v5p chips (docs/planning.md): seconds of a step, and of its exchanges
POD_STEP, POD_EXCHANGES = 6.08, 1.547
ROUNDS = "rounds.json"  # in a run's folder, beside its logs


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


# --- rounds of exchange -----------------------------------------------------------------------------------


def mean_rounds(run: Run) -> float:
    """The rounds that each MoE layer would need for the first held-out batch at the end of a run, the mean over layers.

    Returns:
        nan if the run did not store its routing (`measure_every`), or its batch or experts do not divide by the
        devices.
    """
    found = rounds_record(run)
    return float(np.mean(found["rounds"])) if found else math.nan


def rounds_record(run: Run) -> dict[str, Any]:
    """What rounds.json has: devices, step, rounds of each layer. Computed from the run's routing where that is stored.

    Raises:
        ValueError: a file is damaged.
    """
    if not any(run.directory.glob("routing/*.npy")):
        return read_json(run.directory / ROUNDS, "restore it with git, or collect the runs again.")
    from moe_jax.analysis.specialisation import stored_ids, stored_steps  # loads jax, which archives do without

    step = stored_steps(run.directory)[-1]
    config = flatten(run.config)
    experts, factor = int(config["model.num_experts"]), float(config["model.capacity_factor"])
    ids = stored_ids(run.directory, step)
    if ids.shape[1] % DEVICES or experts % DEVICES:
        return {}
    return {"devices": DEVICES, "step": step, "rounds": needed_rounds(ids, experts, factor)}


def needed_rounds(expert_ids: np.ndarray, num_experts: int, capacity_factor: float) -> list[int]:
    """The rounds of each layer if `DEVICES` devices had equal parts of the tokens, in order, and of the experts.

    Args:
        expert_ids: int [L, T, S]; ids from E on are empty slots.
        num_experts: E.
        capacity_factor: of a round, over the mean number of copies between two devices.
    """
    sources = (expert_ids // (num_experts // DEVICES)).reshape(len(expert_ids), DEVICES, -1)
    copies = sources.shape[2]  # of a device
    sent = np.stack([(sources == target).sum(axis=2) for target in range(DEVICES)], axis=2)
    capacity = min(copies, math.ceil(capacity_factor * copies / DEVICES))
    return [math.ceil(most / capacity) for most in sent.max(axis=(1, 2)).tolist()]
