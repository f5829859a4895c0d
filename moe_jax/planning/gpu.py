"""Compile for NVIDIA GPUs that are not present: the wheels, the devices, and what XLA needs to know of them."""

import contextlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from moe_jax.planning.topology import Topology
from moe_jax.runtime.chips import Chip

if TYPE_CHECKING:
    from jax.sharding import Mesh

COMPILER = "jax-cuda12-pjrt"  # XLA for GPUs
# then the kernels of jax, ptxas, and grouped products: XLA itself multiplies every row with every group
WHEELS = (COMPILER, "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "tokamax")

# by cuBLAS, because XLA's Triton finds no tiles for some products (widths of 96 and 24) where it cannot tune
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def check_wheels(topology: Topology) -> None:
    """Refuse to plan for GPUs without their compiler.

    Raises:
        ValueError: a wheel is not installed, which the sentence names.
    """
    if missing := missing_wheels():
        raise ValueError(
            f"--topology={topology} needs the compiler for NVIDIA GPUs, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; run pip install 'moe_jax[gpu-plan]'."
        )


def missing_wheels() -> list[str]:
    """Those of WHEELS that are not installed."""
    return [wheel for wheel in WHEELS if not any(metadata.distributions(name=wheel))]


def devices(topology: Topology) -> Sequence[Any]:
    """The GPUs of a topology, in the order of their hosts; a slice of jax's is an NVLink domain."""
    from jax.experimental import topologies

    assert topology.chip
    shape = "x".join(map(str, topology.domains))
    return topologies.get_topology_desc(platform="cuda", target_config=target(topology.chip), topology=shape).devices


@contextlib.contextmanager
def default_device(mesh: "Mesh") -> Iterator[None]:
    """A context in which jax's default device is one of the mesh's if those are GPUs: tokamax compiles for it.

    Raises:
        ValueError: the step needs cuDNN, which is not installed.
    """
    import jax
    from absl import logging

    from moe_jax.mesh import platform

    if platform(mesh) != "gpu":
        yield
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # tokamax warns of every kernel that nobody has tuned
    try:
        with jax.default_device(mesh.devices.flat[0]):
            yield
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ValueError(
            "attention of these GPUs and sizes is cuDNN's, which is not installed; run pip install nvidia-cudnn-cu12 "
            "(1.1 GB), or plan with model.compute_dtype='float32'."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def target(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text: what its compiler needs to know of one that is not present.

    What is the same of Hopper and Blackwell stands here, the rest in `chips`.
    """
    assert chip.gpu
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {chip.gpu.cores}
  memory_bandwidth: {chip.hbm_bandwidth:.0f}
  l2_cache_size: {chip.gpu.l2}
  clock_rate_ghz: {chip.gpu.clock}
  device_memory_size: {chip.hbm}
  cuda_compute_capability {{ major: {chip.gpu.capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{chip.gpu.name}"
"""
