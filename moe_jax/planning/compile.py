"""Compile the train step for devices that are not present."""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.config import Config
from moe_jax.planning import gpu
from moe_jax.planning.topology import Topology

if TYPE_CHECKING:
    from jax.sharding import Mesh


def prepare_environment(topology: Topology) -> None:
    """Set the environment for jax, which is imported afterwards: the CPU, with enough fake devices.

    Raises:
        ValueError: the compiler for the topology is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or XLA calls a compilation of two minutes an error
    if topology.family == "cpu":
        others = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={topology.dims[0]}".strip()
        return
    if topology.gpu:
        gpu.check_wheels(topology)
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology} needs the TPU compiler, which is not installed; run pip install 'jax[tpu]', "
            "which has the libtpu that fits the installed jax."
        )
    quiet = dict(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5p-8")
    # no TPU is opened, so several plans may run at the same time
    for key, value in (quiet | dict(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_MIN_LOG_LEVEL="3")).items():
        os.environ.setdefault(key, value)


def compiler_version(topology: Topology) -> dict[str, str]:
    """The wheel that compiles for the topology, and its version; nothing for CPUs, which jax itself compiles for."""
    wheels = {"tpu": ["libtpu"], "gpu": [gpu.COMPILER]}.get(topology.platform, [])
    return {wheel: metadata.version(wheel) for wheel in wheels}


def topology_devices(topology: Topology) -> Sequence[Any]:
    """The devices to compile for; unless they are CPUs, they need not exist.

    Raises:
        ValueError: the compiler refuses the shape, or there are too few local devices.
    """
    import jax

    if topology.chip is None:
        local = jax.devices("cpu")
        if len(local) < topology.dims[0]:
            raise ValueError(
                f"--topology={topology} needs {topology.dims[0]} local devices, but there are {len(local)}; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.dims[0]} before jax is imported."
            )
        return local[: topology.dims[0]]
    from jax.experimental import topologies

    name = str(topology._replace(slices=1))
    options = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices  # type: ignore[assignment]
    try:
        return gpu.devices(topology) if topology.gpu else topologies.get_topology_desc(name, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        if "lockfile" in problem:
            raise ValueError(
                f"--topology={topology}: another process holds the TPU compiler's lock; wait for it, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1."
            ) from None
        raise ValueError(
            f"--topology={topology} was refused by the {topology.platform.upper()} compiler: {problem}; try another "
            "shape, or the compiler that fits the installed jax."
        ) from None


class Compiled(NamedTuple):
    """The compiled train step: its text, XLA's memory analysis in bytes, and its seconds and processor seconds."""

    text: str
    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int
    peak: int
    seconds: float
    cpu_seconds: float


class DoesNotFit(Exception):
    """The compiler could not fit the step into memory: bytes needed and available, 0 if unknown."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.needed = needed
        self.available = available


def compile_step(config: Config, mesh: "Mesh") -> Compiled:
    """Lower and compile the real train step for the devices of `mesh`; no array is created.

    Raises:
        DoesNotFit: the compiler ran out of the chip's memory.
    """
    import jax

    from moe_jax.mesh import platform
    from moe_jax.training.compile import abstract_arguments, make_train_step

    started = time.perf_counter()
    busy = time.process_time()
    counted = dataclasses.replace(config.model, cpu_kernel="xla")  # a product in C++ would not be in the text
    config = dataclasses.replace(config, model=counted)
    with gpu.default_device(mesh):
        lowered = make_train_step(config, mesh).lower(*abstract_arguments(config, mesh))
    try:
        compiled = lowered.compile(gpu.OPTIONS if platform(mesh) == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise DoesNotFit(*out_of_memory(str(error))) from None
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu {metadata.version('libtpu')} writes programs that jax {jax.__version__} cannot read "
            f"({str(error).splitlines()[0]}); run pip install 'jax[tpu]', which has the libtpu that fits a jax."
        ) from None
    m = compiled.memory_analysis()
    return Compiled(
        text=text,
        arguments=m.argument_size_in_bytes,
        results=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        code=m.generated_code_size_in_bytes,
        peak=getattr(m, "peak_memory_in_bytes", 0),
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - busy,
    )


def out_of_memory(message: str) -> tuple[int, int]:
    """(bytes needed, bytes available) from the compiler's message, 0 if it does not say."""

    def read(pattern: str) -> int:
        found = re.search(pattern, message)
        return round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0

    number = r"([\d.]+)([KMGT]?)"
    needed = read(rf"\({number}\) exceeds available") or read(rf"[Uu]sed {number}")
    return needed, read(rf"available HBM \({number}\)") or read(rf"[Uu]sed [\d.]+[KMGT]? of {number}")


def state_bytes(config: Config, mesh: "Mesh") -> tuple[int, int, int]:
    """Bytes on each chip of (parameters and their average, optimizer, the rest of the state), by their shardings."""
    import jax

    from moe_jax.mesh import bytes_on_device
    from moe_jax.training.state import abstract_state

    state = abstract_state(config, mesh)

    def size(tree: Any) -> int:
        return sum(map(bytes_on_device, jax.tree.leaves(tree)))

    return (
        size((state.params, state.ema)),
        size(state.optimizer),
        size((state.bias, state.balance, state.anticipation, state.guard)),
    )
