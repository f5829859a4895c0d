"""Experts are on a block of a torus, and weights are gathered over its dimensions one after the other."""

import itertools
import math

import numpy as np
import pytest
from chips import Device, chips

from moe_jax.config import MeshConfig
from moe_jax.config.axes import AXES, DATA
from moe_jax.mesh import make_mesh
from moe_jax.planning import topology as plans
from moe_jax.planning.collectives import Collective
from moe_jax.planning.topology import Place, parse_topology
from moe_jax.torus import blocks, exchange, gathering, placed


def spans(devices):
    """How many positions a group has along each dimension of the torus."""
    return tuple(len({d.coords[n] for d in devices.flat}) for n in range(len(devices.flat[0].coords)))


@pytest.mark.parametrize(
    ("text", "experts", "block", "stages"),
    [
        ("v5p:8x16x16", 64, (8, 2, 4), [8, 1, 4]),
        ("v5p:8x16x16", 32, (8, 1, 4), [16, 1, 4]),
        ("v5p:8x16x16", 8, (8, 1, 1), [16, 16, 1]),
        ("v5p:4x8x8", 1, (1, 1, 1), [8, 8, 4]),
        ("v5e:16x16", 64, (4, 16), [4, 1, 1]),
        ("v5e:8x16", 8, (4, 2), [8, 1, 2]),
    ],
)
def test_experts_are_on_a_block_and_every_axis_of_weights_is_along_one_dimension(text, experts, block, stages):
    mesh = make_mesh(MeshConfig(data=-1, expert=experts), chips(text))
    assert [mesh.shape[axis] for axis in DATA] == stages
    assert mesh.shape["expert"] == experts
    assert len({d.id for d in mesh.devices.flat}) == mesh.size == math.prod(parse_topology(text).dims)
    for axis in (*DATA, "expert"):
        groups = np.moveaxis(mesh.devices, AXES.index(axis), 0).reshape(mesh.shape[axis], -1).T
        found = {spans(group) for group in groups}
        assert found == {block} if axis == "expert" else all(sum(n > 1 for n in one) <= 1 for one in found)


def seconds(kind, members, topology):
    places = [Place(0, at) for at in members]
    c = Collective(kind, 10**9, tuple(range(len(places))), False, "", "", one_ring=kind == "all-gather")
    return plans.exchange(c, places, topology).seconds


@pytest.mark.parametrize("text", ["v5p:4x8x16", "v5p:2x4x4", "v5e:16x8"])
def test_the_cost_of_a_block_is_that_of_the_plan(text):
    topology = parse_topology(text)
    for block in blocks(topology.dims, 8):
        pairs = exchange(topology.dims, block, topology.chip.ring_multiple)
        members = list(itertools.product(*map(range, block)))
        assert pairs * 10**9 / topology.chip.link == pytest.approx(seconds("all-to-all", members, topology))


def test_gathering_along_one_dimension_takes_the_time_of_the_plan():
    topology = parse_topology("v5p:8x16x16")
    for block, along in (((8, 16, 4), 2), ((8, 16, 1), 2), ((2, 16, 16), 0)):
        size, stride = topology.dims[along], block[along]
        members = [tuple(at if n == along else 0 for n in range(3)) for at in range(0, size, stride)]
        time = gathering(topology.dims, block, topology.chip.ring_multiple)
        assert time * 10**9 / topology.chip.link == pytest.approx(seconds("all-gather", members, topology))


def test_every_slice_has_its_own_torus():
    devices = [d for n in range(2) for d in chips("v5p:4x4x4", n, 64 * n)]
    mesh = make_mesh(MeshConfig(replica=2, data=-1, expert=8), devices)
    assert mesh.shape["replica"] == 2
    for replica in range(2):
        assert {d.slice_index for d in mesh.devices[replica].flat} == {replica}
    first, second = mesh.devices
    assert [d.coords for d in first.flat] == [d.coords for d in second.flat]


def test_what_is_no_whole_torus_has_jax_s_order():
    whole = chips("v5p:4x4x4")
    assert placed(whole, 8) is not None
    assert placed(whole[:-1], 8) is None, "a chip is missing"
    assert placed(whole, 3) is None, "no block has 3 chips"
    assert placed([*whole, *whole], 8) is None, "two devices a chip"
    assert placed([Device(d.id, d.coords, "cpu") for d in whole], 8) is None
