"""Laws of the model of devices: rounds are those of the dispatcher, and the factor is 1 for even loads."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.report.sweep import Run
from experiments.study.devices import (
    DEVICES,
    POD_EXCHANGES,
    POD_STEP,
    ROUNDS,
    factor,
    mean_rounds,
    needed_rounds,
    rounds_record,
)
from moe_jax.config import MeshConfig
from moe_jax.dispatch import ExpertWeights, apply_experts
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.routing import RouterConfig, count, route

TOKENS, EXPERTS, SLOTS, WIDTH = 64, 16, 2, 4
WEIGHTS = ExpertWeights(*np.ones((3, EXPERTS, WIDTH, WIDTH), np.float32))


def ids_of(kind: str) -> np.ndarray:
    """Experts [T, S]: random, all on the first device, or of the first device in a part of the tokens."""
    scores = np.random.default_rng(0).random((TOKENS, EXPERTS))
    ids = scores.argsort(axis=1)[:, :SLOTS].astype(np.int32)
    if kind == "one device":
        ids[:] = [0, 1]
    elif kind == "one source":
        ids[: TOKENS // DEVICES] = [3, 2]
    elif kind == "empty slots":
        ids[:] = [0, EXPERTS]
    return ids


@functools.cache
def dispatcher():
    mesh = make_mesh(MeshConfig(data=1, expert=DEVICES), jax.devices()[:DEVICES])

    def run(x, ids):
        routing = route(jnp.zeros((TOKENS, EXPERTS)), RouterConfig(top_k=SLOTS))
        gates = jnp.where(ids < EXPERTS, 0.5, 0.0)
        routing = routing._replace(expert_ids=ids, gates=gates, loads=count(ids, EXPERTS))
        return apply_experts(x, routing, WEIGHTS, mesh=mesh, dispatcher="rounds", capacity_factor=1.25)[1].rounds

    return jax.jit(run, in_shardings=(batch_sharding(mesh), batch_sharding(mesh)))


@pytest.mark.parametrize(
    ("kind", "rounds"), [("random", None), ("one device", 6), ("one source", 6), ("empty slots", 3)]
)
def test_rounds_are_those_that_the_dispatcher_needs_on_as_many_devices(kind, rounds):
    ids = ids_of(kind)
    (ours,) = needed_rounds(ids[None], EXPERTS, 1.25)
    assert ours == int(dispatcher()(np.ones((TOKENS, WIDTH), np.float32), ids))
    assert rounds in (None, ours)


def run_with(folder, experts=EXPERTS) -> Run:
    config = {"model": {"num_experts": experts, "capacity_factor": 1.25}}
    return Run("bias", 0, folder, config, {}, [])


def test_the_last_stored_routing_of_a_run_counts(tmp_path):
    (tmp_path / "routing").mkdir()
    for step, kind in ((100, "random"), (1000, "one device")):
        np.save(tmp_path / f"routing/{step}.npy", np.stack([ids_of(kind), ids_of("empty slots")]).astype(np.uint16))
    assert rounds_record(run_with(tmp_path)) == {"devices": DEVICES, "step": 1000, "rounds": [6, 3]}
    assert mean_rounds(run_with(tmp_path)) == 4.5
    assert math.isnan(mean_rounds(run_with(tmp_path, experts=12)))


def test_without_routing_the_stored_rounds_count(tmp_path):
    assert math.isnan(mean_rounds(run_with(tmp_path)))
    (tmp_path / ROUNDS).write_text('{"devices": 8, "step": 3, "rounds": [1, 2]}')
    assert mean_rounds(run_with(tmp_path)) == 1.5
    (tmp_path / ROUNDS).write_text("[")
    with pytest.raises(ValueError, match=r"rounds\.json.*restore it with git"):
        mean_rounds(run_with(tmp_path))


def test_the_factor_is_the_largest_load_of_a_device_by_the_mean():
    even = np.full((2, 1, EXPERTS), 8.0)
    assert factor(even) == 1.0
    uneven = even.copy()
    uneven[0, 0, :4] = [16, 16, 0, 0]  # the first device has twice the mean in one of two steps
    assert factor(uneven) == 1.5


def test_the_seconds_of_a_pod_are_those_of_the_planning_page(repo):
    page = (repo / "docs/planning.md").read_text()
    step = re.search(r"schedule: ([\d.]+) ms a step", page)[1]
    exchanges = re.search(r"│ all-to-all .*│ +([\d.]+) │", page)[1]
    assert (float(step), float(exchanges)) == pytest.approx((1e3 * POD_STEP, 1e3 * POD_EXCHANGES), rel=1e-3)
