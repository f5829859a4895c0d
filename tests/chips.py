"""The chips of a topology, with the attributes that a mesh reads, without the compiler that knows them."""

import itertools

from moe_jax.planning.topology import parse_topology

KINDS = {"v5p": "TPU v5", "v5e": "TPU v5 lite"}


class Device:
    """A chip of another machine."""

    platform, process_index, core_on_chip = "tpu", 0, 0

    def __init__(self, number, coords, kind, slice_index=0):
        self.id, self.coords, self.device_kind, self.slice_index = number, coords, kind, slice_index


def chips(text, slice_index=0, first=0):
    """The devices of one slice, `v5p:4x4x4`, numbered from `first`."""
    topology = parse_topology(text)
    corners = itertools.product(*map(range, topology.dims))
    return [Device(first + n, at, KINDS[topology.family], slice_index) for n, at in enumerate(corners)]
