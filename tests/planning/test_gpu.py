"""GPUs that are not present: one sentence for what is missing, and what XLA is told of them."""

import re
from importlib import metadata

import pytest

from moe_jax.planning import compile, gpu
from moe_jax.planning.topology import parse_topology
from moe_jax.runtime.chips import CHIPS

H100 = parse_topology("h100:2x8")


def test_missing_wheels_are_named_in_one_sentence(monkeypatch):
    def version(wheel):
        if wheel == "jax-cuda12-plugin":
            return "0.10.2"
        raise metadata.PackageNotFoundError(wheel)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(compile.os, "environ", {})
    with pytest.raises(ValueError, match=r"^--topology=h100:2x8 needs the compiler for NVIDIA GPUs, but ") as error:
        compile.prepare_environment(H100)
    assert "but jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12 are not installed; run pip install 'moe_jax[" in str(error.value)


@pytest.mark.parametrize(
    ("family", "capability", "cores", "name"),
    [
        ("h100", 9, 132, "NVIDIA H100 80GB HBM3"),
        ("b200", 10, 148, "NVIDIA B200"),
        ("gb200", 10, 152, "NVIDIA GB200"),
    ],
)
def test_xla_is_told_of_the_gpu_what_the_plan_assumes(family, capability, cores, name):
    text = gpu.target(CHIPS[family])
    assert re.search(rf"cuda_compute_capability {{ major: {capability} }}", text)
    assert f"core_count: {cores}\n" in text
    assert f'device_description_str: "{name}"' in text
    assert f"device_memory_size: {CHIPS[family].hbm}\n" in text
    assert f"memory_bandwidth: {round(CHIPS[family].hbm_bandwidth)}\n" in text
