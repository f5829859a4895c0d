"""Published figures of accelerators."""

from typing import NamedTuple

GIB = 2**30

# dense bf16 FLOP/s; the larger figures in NVIDIA's data sheets are for sparse matrices. Longer names come first.
GPUS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, by jax's name for it; None where it is unknown, as for CPUs.

    Args:
        device_kind: "TPU v5 lite", "TPU v6e", "TPU7x", "NVIDIA H100 80GB HBM3", ...
    """
    if device_kind.startswith("TPU"):
        chip = chip_of(device_kind)
        return chip.flops if chip else None
    found = next((name for name in GPUS if name in device_kind), None)
    return GPUS[found] if found else None


def chip_of(device_kind: str) -> "Chip | None":
    """The figures of a TPU, by jax's name for it; None for other devices."""
    if not device_kind.startswith("TPU"):
        return None
    name = device_kind.lower().replace(" ", "").removeprefix("tpu")
    name = {"v5": "v5p", "7x": "tpu7x"}.get(name, name)
    return CHIPS.get(ALIASES.get(name, name))


class Gpu(NamedTuple):
    """What only GPUs have: the domain that NVLink joins, and what XLA's compiler needs to know of an absent one.

    per_host: GPUs of a host, at most. hosts: of one NVLink domain, at most. name: jax's name for the device.
    capability: CUDA's. cores: streaming multiprocessors. l2: bytes of the cache. clock: GHz.
    """

    per_host: int
    hosts: int
    name: str
    capability: int
    cores: int
    l2: int
    clock: float


class Chip(NamedTuple):
    """One device as jax sees it; for a tpu7x that is half a chip.

    flops: peak dense bf16 FLOP/s. hbm, hbm_bandwidth: bytes, bytes/s. link: one-way bytes/s of one ICI link, or of all
    NVLinks of a GPU. dcn: bytes/s into the data-centre network. dimensions: of the torus, or hosts x GPUs; a dimension
    of a torus closes to a ring if its size is a multiple of `ring_multiple`. source: of the figures. options: compiler
    options. gpu: None for a TPU.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    link: float
    dcn: float
    dimensions: int
    ring_multiple: int
    source: str
    options: tuple[tuple[str, str], ...] = ()
    gpu: Gpu | None = None


_DOCS = "docs.cloud.google.com/tpu/docs/"
_BOOK = "links and data-centre network: jax-ml.github.io/scaling-book/tpus, 'TPU specs'"
_MEGACORE = (("chip_config_name", "megacore"),)  # both cores of a v4 are one device

CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1200e9, 4.5e10, 6.25e9, 3, 4, f"{_DOCS}v4; {_BOOK}", _MEGACORE),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 4.5e10, 3.125e9, 2, 16, f"{_DOCS}v5e; {_BOOK}"),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 9e10, 6.25e9, 3, 4, f"{_DOCS}v5p; {_BOOK}"),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 9e10, 12.5e9, 2, 16, f"{_DOCS}v6e; {_BOOK}"),
    "tpu7x": Chip(1153.5e12, 96 * GIB, 3.7e12, 4.5e10, 6.25e9, 3, 4, f"{_DOCS}tpu7x; {_BOOK}; each halved"),
}


def _gpu(peak: str, hbm: int, hbm_bandwidth: float, nvlink: float, gpu: Gpu) -> Chip:
    """A GPU with 400 Gbit/s of InfiniBand, as in NVIDIA's own systems."""
    return Chip(GPUS[peak], hbm, hbm_bandwidth, nvlink, 5e10, 2, 1, _NVIDIA, gpu=gpu)


_NVIDIA = (
    "NVIDIA's data sheets of H100 SXM, HGX B200 and GB200 NVL72; memory, cores, cache and clock: openxla/xla, "
    "xla/backends/gpu/target_config/specs"
)
_H100 = Gpu(8, 1, "NVIDIA H100 80GB HBM3", 9, 132, 52428800, 1.98)
_B200 = Gpu(8, 1, "NVIDIA B200", 10, 148, 132644864, 1.965)
_GB200 = Gpu(4, 18, "NVIDIA GB200", 10, 152, 135528448, 2.062)

CHIPS |= {
    "h100": _gpu("H100", 84942979072, 3352.32e9, 4.5e11, _H100),
    "b200": _gpu("B200", 191514411008, 7672.32e9, 9e11, _B200),
    "gb200": _gpu("GB200", 197897748480, 7928.064e9, 9e11, _GB200),
}

ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
