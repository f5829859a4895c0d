"""Exchanges between devices in a compiled program: kind, bytes, group of devices."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.planning.hlo import Computation, Instruction, Leaf, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Collective(NamedTuple):
    """An exchange between devices, as one device sees it.

    bytes: its input (of an all-gather: its output), once. group: ids of the devices of the first group, in the order of
    the mesh. asynchronous: other work may be scheduled between its start and its end. one_ring: the compiled algorithm
    passes parts around a single ring of all devices, even if they span several dimensions of a torus.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    asynchronous: bool
    shape: str
    op_name: str
    one_ring: bool = False

    @property
    def sent(self) -> float:
        """Bytes that leave the device: (n-1)/n of what is gathered, scattered or exchanged, twice for all-reduce."""
        n = len(self.group)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return self.bytes * (n - 1) / max(n, 1) * (2 if self.kind == "all-reduce" else 1)


def collective(i: Instruction, here: Computation, module: Module) -> Collective | None:
    """The exchange that an instruction starts, or None: a group of one device exchanges nothing.

    In programs for TPU, an asynchronous exchange is three fusions that each hold the instruction, of which only the
    first counts, and a reduce-scatter is a fusion of an all-reduce and a slice of its result. What crosses slices is
    sent and received by the host.
    """
    if i.opcode == "recv":
        return _across_slices(i)
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    others = here.instructions.values()
    targets = {t[1] for o in others if (t := re.search(r'custom_call_target="([^"]*)"', o.attributes))}
    chained = "chain_id=" in i.attributes
    if chained and "AsyncCollectiveStart" not in targets:
        return None
    inputs = [leaf for name in i.operands for leaf in here.instructions[name].leaves]
    out = i.leaves[len(inputs) :] if i.opcode.endswith("-start") and len(i.leaves) > len(inputs) else i.leaves
    group = replica_group(i.attributes) or tuple(range(module.devices))
    if len(group) == 1:
        return None
    if kind == "all-reduce" and (scattered := _slice_of(i, here)):
        kind = "reduce-scatter"
        out = scattered
    moved = [leaf for leaf in (out if kind == "all-gather" else inputs) if leaf.dims or kind != "all-gather"]
    started = i.opcode.endswith("-start") or chained
    return Collective(kind, _bytes(moved), group, started, _shape(moved), i.op_name, is_one_ring(i.attributes))


def _bytes(leaves: Sequence[Leaf]) -> int:
    return sum(leaf.bytes for leaf in leaves)


def _shape(leaves: Sequence[Leaf]) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.dims)}".replace(" ", "") for leaf in leaves)


def is_one_ring(attributes: str) -> bool:
    """Whether the TPU compiler chose an algorithm on one ring, by the name or the log that it writes for it."""
    return '"emitter":"1D' in attributes or "Type: 1D" in attributes


def _across_slices(i: Instruction) -> Collective | None:
    """What a `recv` brings from other slices, of which the mesh has the slower axes: one device of each is the group.

    The TPU compiler exchanges within a slice first, so that every device receives its own part only. A program with
    several slices numbers the devices of one.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if not kind:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}', i.attributes)
    if not target:
        raise ValueError(f"slices have an unknown form: {i.attributes[:MOST_CHARACTERS]}")
    slices = len(target[1].split(","))
    group = tuple(n * (int(target[2]) + 1) for n in range(slices))
    received = [leaf for leaf in i.leaves if leaf.dims]
    name = kind[1].lower().replace("_", "-")
    size = _bytes(received) * (slices if name == "reduce-scatter" else 1)
    return Collective(name, size, group, True, _shape(received), i.op_name)


def _slice_of(i: Instruction, here: Computation) -> tuple[Leaf, ...]:
    """The slice of an all-reduce that is its fusion's only result; empty if there is none."""
    root = here.root
    while root.opcode in ("bitcast", "copy", "convert") and root.operands:
        root = here.instructions[root.operands[0]]
    if root.opcode == "dynamic-slice" and root.operands[0] == i.name:
        return root.leaves
    return ()


def replica_group(attributes: str) -> tuple[int, ...]:
    """The ids of the first group: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `mesh['a'=2,'b'=2] {'b'}`, or pairs of a permute.

    Empty if the instruction names none, which means all devices.
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(d) for d in listed[1].split(","))
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes)
    if iota:
        return tuple(_listed(iota[3], iota[4], n) for n in range(int(iota[2])))
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}", attributes)
    if mesh:
        group = _mesh_group(mesh[1], mesh[4])
        return tuple(_listed(mesh[2], mesh[3], n) for n in group) if mesh[2] else group
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"replica groups have an unknown form: {attributes[:MOST_CHARACTERS]}")
    return ()


MOST_CHARACTERS = 200  # of the program's text, quoted in an error

_IOTA = r"\[([\d,]*)\](?:T\(([\d,]*)\))?"  # dimensions and their order


def _listed(sizes: str, transposed: str | None, position: int) -> int:
    """Element `position` of a list of devices given as dimensions and their order."""
    dims = [int(d) for d in sizes.split(",")]
    order = [int(d) for d in transposed.split(",")] if transposed else list(range(len(dims)))
    return _transposed(dims, order, position)


def _transposed(dims: list[int], order: list[int], position: int) -> int:
    """Element `position` of `iota(prod(dims)).reshape(dims).transpose(order)`, flattened."""
    value = 0
    for axis in reversed(order):
        position, at = divmod(position, dims[axis])
        value += at * math.prod(dims[axis + 1 :])
    return value


def _mesh_group(axes: str, used: str) -> tuple[int, ...]:
    """The first group of a mesh: its ids vary along the named axes, `'x':(m)k` being a part of axis x."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    strides = {}
    names = list(sizes)
    for n, name in enumerate(names):
        strides[name] = math.prod(sizes[other] for other in names[n + 1 :])
    group = [0]
    for name, major, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", used):
        count = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(major) * count) if size else 1)
        group = [at + k * step for at in group for k in range(count)]
    return tuple(group)
