"""The shape of a machine, and the time that an exchange over its links takes."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.planning.collectives import Collective
from moe_jax.runtime.chips import ALIASES, CHIPS, Chip, Gpu


class Topology(NamedTuple):
    """`slices` equal tori of one family, joined by the data-centre network; family "cpu" has one dimension.

    dims: of the torus, or hosts x GPUs of each. GPUs have no torus: their slice is the domain that NVLink joins, some
    hosts, and `slices` is 1.
    """

    family: str
    dims: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        shape = f"{self.family}:{'x'.join(map(str, self.dims))}"
        return shape if self.slices == 1 else f"{self.slices}x{shape}"

    @property
    def chip(self) -> Chip | None:
        """The published figures of the family's chip; None for cpu."""
        return CHIPS.get(self.family)

    @property
    def gpu(self) -> Gpu | None:
        """What is known of the family's GPU; None for others."""
        return self.chip.gpu if self.chip else None

    @property
    def platform(self) -> str:
        """jax's name for it: "cpu", "gpu" or "tpu"."""
        return "cpu" if self.chip is None else "gpu" if self.gpu else "tpu"

    @property
    def domains(self) -> tuple[int, int, int]:
        """(NVLink domains, hosts of each, GPUs of each host)."""
        assert self.gpu
        hosts, gpus = self.dims
        return max(1, hosts // self.gpu.hosts), min(hosts, self.gpu.hosts), gpus


def parse_topology(text: str) -> Topology:
    """`v5p:8x16x16`, `cpu:8`, `2xv5e:16x16` for two slices, or `h100:2x8` for two hosts of eight GPUs.

    Raises:
        ValueError: the text has another form, or names no known family of chips.
    """
    example = "write FAMILY:SHAPE, such as v5e:16x16, v5p:8x16x16, 2xv5e:16x16 (two slices), h100:2x8 or cpu:8"
    found = re.fullmatch(r"(?:(\d+)x)?([A-Za-z]\w*):([\dx]+)", text.strip().lower())
    if not found:
        raise ValueError(f"--topology={text} is not a topology; {example}.")
    family = ALIASES.get(found[2], found[2])
    if family not in CHIPS and family != "cpu":
        raise ValueError(f"--topology={text} names no known family of chips; choose {', '.join(CHIPS)} or cpu.")
    sizes = found[3].split("x")
    wanted = CHIPS[family].dimensions if family in CHIPS else 1
    if not all(s.isdigit() and int(s) for s in sizes) or len(sizes) != wanted or (family == "cpu" and found[1]):
        shape = "N" if wanted == 1 else "HOSTSxGPUS" if CHIPS[family].gpu else "x".join("ABC"[:wanted])
        raise ValueError(
            f"--topology={text} must give {wanted} positive size{'s' * (wanted > 1)}; write {family}:{shape}."
        )
    topology = Topology(family, tuple(map(int, sizes)), int(found[1] or 1))
    if topology.gpu:
        _check_hosts(text, topology, topology.gpu)
    return topology


def _check_hosts(text: str, topology: Topology, gpu: Gpu) -> None:
    hosts, gpus = topology.dims
    if topology.slices > 1:
        raise ValueError(f"--topology={text} gives slices, which GPUs do not have; write {topology.family}:HOSTSxGPUS.")
    if gpus > gpu.per_host:
        raise ValueError(
            f"--topology={text} has {gpus} GPUs a host, but a host of this family has at most {gpu.per_host}; write "
            f"{topology.family}:HOSTSx{gpu.per_host}."
        )
    if hosts > gpu.hosts and hosts % gpu.hosts:
        raise ValueError(
            f"--topology={text} has {hosts} hosts, but NVLink joins {gpu.hosts} of them to a domain; choose at most "
            f"{gpu.hosts} hosts or a multiple."
        )


class Place(NamedTuple):
    """The place of a device: its slice, or NVLink domain, and its coordinates in the torus."""

    slice: int
    coords: tuple[int, ...]


DIMENSIONS = ("x", "y", "z")
NVLINK = "NVLink"
ACROSS, INFINIBAND = "across slices", "InfiniBand"  # the data-centre networks of TPUs and of GPUs
NETWORKS = (ACROSS, INFINIBAND)


class Exchange(NamedTuple):
    """The least time of one collective, alone on its links.

    seconds: from its start to its end. busy: how long it keeps the links of each dimension of the torus busy, or
    NVLink, and the data-centre network; collectives on different ones can run at the same time.
    """

    seconds: float
    busy: dict[str, float]


def exchange(c: Collective, places: Sequence[Place], topology: Topology) -> Exchange | None:
    """The time of one collective on the interconnect; None without a chip.

    Links carry W bytes/s each way. Along a dimension of the torus that the group spans at `a` positions, `s` apart,
    a chip has two links if the group closes to a ring there and one if it is a line, shared with the s - 1 groups
    between its members. All-gather, reduce-scatter and all-reduce: bytes sent over the links of all spanned
    dimensions at once, or over two of them if the compiled algorithm passes parts around one ring. All-to-all of B
    bytes a chip: what the busiest link carries in the slowest dimension, s B a / 8 on a ring and s B a / 4 on a line.
    Across slices: what must leave the slice over the chip's share of the data-centre network, and the rest inside.
    Within an NVLink domain, where switches join every GPU to every other: bytes sent over all links of a GPU. Latency
    is not counted, nor other traffic.
    """
    if topology.chip is None:
        return None
    if len(c.group) < 2:
        return Exchange(0.0, {})
    members = [places[i] for i in c.group]
    inside = [m for m in members if m.slice == members[0].slice]
    network = INFINIBAND if topology.gpu else ACROSS
    across = _across(c, members, len(inside), topology.chip)
    within = _switched(c, inside, topology.chip) if topology.gpu else _inside(c, inside, topology, topology.chip)
    return Exchange(across + within.seconds, within.busy | ({network: across} if across else {}))


def _across(c: Collective, members: Sequence[Place], inside: int, chip: Chip) -> float:
    slices = len({m.slice for m in members})
    share = 1 if c.kind in PAIRWISE or c.kind == "collective-permute" else inside
    factor = 2 if c.kind == "all-reduce" else 1
    return factor * c.bytes / share * (slices - 1) / slices / chip.dcn


def _inside(c: Collective, members: Sequence[Place], topology: Topology, chip: Chip) -> Exchange:
    """The part of a collective within a slice."""
    links: dict[str, float] = {}  # of a chip, that the group may use
    through: dict[str, float] = {}  # seconds of an all-to-all on the busiest link
    for n, size in enumerate(topology.dims):
        used = sorted({m.coords[n] for m in members})
        if len(used) < 2:
            continue
        stride = min(b - a for a, b in itertools.pairwise(used))
        ring = size % chip.ring_multiple == 0 and len(used) * stride == size
        links[DIMENSIONS[n]] = (2 if ring else 1) / stride
        halves = (len(used) // 2) * ((len(used) + 1) // 2)  # pairs on either side of the middle
        through[DIMENSIONS[n]] = stride * c.bytes * halves / len(used) / (2 if ring else 1) / chip.link
    if not links:  # one device, or two of one chip
        return Exchange(0.0, {})
    if c.kind in PAIRWISE:
        return Exchange(max(through.values()), through)
    sent = c._replace(group=c.group[: len(members)]).sent
    total = sum(links.values())
    evenly = sent / total / chip.link
    return Exchange(sent / (min(2.0, total) if c.one_ring else total) / chip.link, dict.fromkeys(links, evenly))


def _switched(c: Collective, members: Sequence[Place], chip: Chip) -> Exchange:
    """The part of a collective within an NVLink domain."""
    if len(members) < 2:
        return Exchange(0.0, {})
    to_members = len(members) / len(c.group) if c.kind in PAIRWISE else 1.0  # the rest is for other domains
    seconds = to_members * c._replace(group=c.group[: len(members)]).sent / chip.link
    return Exchange(seconds, {NVLINK: seconds})


PAIRWISE = ("all-to-all", "ragged-all-to-all")  # every member sends something else to every other


def place_of(device: Any) -> Place:
    """A device's place in its torus or NVLink domain; local CPU devices form a line."""
    coords = tuple(getattr(device, "coords", None) or (device.id,))
    if getattr(device, "platform", "") == "gpu":
        return Place(coords[0], coords[1:])  # of a domain, a host and a GPU
    return Place(getattr(device, "slice_index", None) or 0, coords)
