"""The chips of a torus in the order of the mesh: experts on a block, and the rest by dimensions of the torus.

An exchange between all pairs of a group takes as long as its longest side, so that a block beats a ring that winds
through the torus. Weights are gathered over what is left, one dimension after the other: a gather along one dimension
is a ring, which the chip's SparseCores can do while its TensorCore multiplies.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.runtime.chips import chip_of

GATHERED = 3  # the dimensions of a torus, at most
# The bytes of weights that a layer gathers and scatters, over those of the rows that it exchanges, are this over the
# number of devices that share the experts; 1.3 for Qwen3-30B at 16k tokens a device, 29 for DeepSeek-V3 at 4k.
WEIGHTS_TO_ROWS = 12


def placed(devices: Sequence[Any], experts: int) -> np.ndarray | None:
    """The devices of one slice as an array [n0, n1, n2, experts]: weights are gathered over n2, then n1, then n0.

    Some are gathered over n0 before n1, to use the links of both (`config.axes.TURNED`). So n1 is 1 if the second
    dimension has fewer links than the first, and no third one is left.

    Args:
        devices: of one slice.
        experts: how many of them share the experts of a layer.

    Returns:
        None if the devices are no whole torus with one device a chip, or `experts` fit on no block of it.
    """
    chip = chip_of(getattr(devices[0], "device_kind", ""))
    coords = [tuple(getattr(d, "coords", None) or ()) for d in devices]
    if chip is None or len(set(coords)) < len(devices) or not coords[0]:
        return None
    first, last = np.min(coords, axis=0), np.max(coords, axis=0)
    dims = tuple(int(n) for n in last - first + 1)
    shapes = list(blocks(dims, experts))
    if math.prod(dims) != len(devices) or not shapes:
        return None
    torus = np.empty(dims, object)
    for device, at in zip(devices, coords, strict=True):
        torus[tuple(np.array(at) - first)] = device
    block = min(shapes, key=lambda shape: cost(dims, shape, chip.ring_multiple))
    split = torus.reshape([n for d, b in zip(dims, block, strict=True) for n in (d // b, b)])
    order = gathering_order(dims, block, chip.ring_multiple)
    left = split.transpose([*(2 * n for n in order), *(2 * n + 1 for n in range(len(dims)))])
    sizes = [dims[n] // block[n] for n in order]
    rates = [_links(dims[n], dims[n] // block[n], block[n], chip.ring_multiple) for n in order]
    sizes += [1] * (GATHERED - len(sizes))
    if sizes[2] == 1 and rates[1] < rates[0]:
        sizes = [sizes[0], 1, sizes[1]]
    return left.reshape(*sizes, experts)


def blocks(dims: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """All shapes of `size` chips whose sides divide those of a torus."""
    sides = [[n for n in range(1, d + 1) if d % n == 0] for d in dims]
    return (shape for shape in itertools.product(*sides) if math.prod(shape) == size)


def cost(dims: Sequence[int], block: Sequence[int], ring_multiple: int) -> float:
    """The time of an exchange of rows, and of gathering weights, with a block of this shape: the lower the better."""
    weights = WEIGHTS_TO_ROWS / math.prod(block)
    return exchange(dims, block, ring_multiple) + weights * gathering(dims, block, ring_multiple)


def exchange(dims: Sequence[int], block: Sequence[int], ring_multiple: int) -> float:
    """The time of an exchange between all pairs of a block, in that which a link takes for the bytes of a chip.

    By the formula of `planning.topology.exchange`, as `gathering` is.
    """
    return max(n // 2 * ((n + 1) // 2) / n / _links(d, n, 1, ring_multiple) for d, n in zip(dims, block, strict=True))


def gathering(dims: Sequence[int], block: Sequence[int], ring_multiple: int) -> float:
    """The time of gathering over what blocks leave, in that which a link takes for the bytes of the whole."""
    time, share = 0.0, 1.0  # of the whole after a stage
    for n in gathering_order(dims, block, ring_multiple):
        members = dims[n] // block[n]
        time += share * (1 - 1 / members) / _links(dims[n], members, block[n], ring_multiple)
        share /= members
    return time


def gathering_order(dims: Sequence[int], block: Sequence[int], ring_multiple: int) -> list[int]:
    """The dimensions of a torus in the order of the mesh's axes: the last stage, of most bytes, has the most links."""

    def key(n: int) -> tuple[float, int]:
        members = dims[n] // block[n]
        return (-_links(dims[n], members, block[n], ring_multiple) if members > 1 else 0.0, -members)

    return sorted(range(len(dims)), key=key)


def _links(size: int, members: int, stride: int, ring_multiple: int) -> float:
    """Links of a chip along a dimension of `size`, of a group with `members` there, which shares them with others."""
    closes = members * stride == size and size % ring_multiple == 0
    return (2 if closes else 1) / stride
