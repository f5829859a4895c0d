"""GPUs that are not present: one sentence for what is missing, and what XLA needs to know of them."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

from moe_jax.planning import compile, gpu
from moe_jax.planning.topology import parse_topology
from moe_jax.runtime.chips import CHIPS

H100 = parse_topology("h100:2x8")


def test_missing_wheels_are_named_in_one_sentence(monkeypatch):
    installed = ["jax-cuda12-plugin"]
    monkeypatch.setattr(metadata, "distributions", lambda name: [name] if name in installed else [])
    monkeypatch.setattr(compile.os, "environ", {})
    with pytest.raises(ValueError, match=r"^--topology=h100:2x8 needs the compiler for NVIDIA GPUs, but ") as error:
        compile.prepare_environment(H100)
    assert "but jax-cuda12-pjrt, nvidia-cuda-nvcc-cu12, tokamax are not installed; run pip" in str(error.value)


@pytest.mark.parametrize(
    ("family", "capability", "cores", "name"),
    [
        ("h100", 9, 132, "NVIDIA H100 80GB HBM3"),
        ("b200", 10, 148, "NVIDIA B200"),
        ("gb200", 10, 152, "NVIDIA GB200"),
    ],
)
def test_xla_compiles_for_the_gpu_that_the_plan_assumes(family, capability, cores, name):
    text = gpu.target(CHIPS[family])
    assert re.search(rf"cuda_compute_capability {{ major: {capability} }}", text)
    assert f"core_count: {cores}\n" in text
    assert f'device_description_str: "{name}"' in text
    assert f"device_memory_size: {CHIPS[family].hbm}\n" in text
    assert f"memory_bandwidth: {round(CHIPS[family].hbm_bandwidth)}\n" in text


# --- with the compiler for GPUs, by hand: python -m pytest -m slow tests/planning/test_gpu.py ----------------------


def plan(repo, tmp_path, *arguments):
    """The report, and the compiled program."""
    report, text = tmp_path / "plan.json", tmp_path / "step.hlo"
    command = [sys.executable, "-m", "moe_jax.plan", *arguments, f"--json={report}", f"--hlo={text}"]
    result = subprocess.run(command, cwd=repo, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(report.read_text()), text.read_text()


missing = gpu.missing_wheels()
with_compiler = pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: pip install 'moe_jax[gpu-plan]'")


@pytest.mark.slow
@with_compiler
def test_two_layers_of_qwen3_on_two_hosts_multiply_nothing_in_vain(repo, tmp_path):
    of_qwen3 = "--config=configs/qwen3_30b_a3b.py", "--config.model.num_layers=2", "--config.model.remat=full"
    of_qwen3 += ("--config.mesh.expert=8",)
    report, text = plan(repo, tmp_path, "--topology=h100:2x8", *of_qwen3, "--config.batch_size=16")
    assert report["fits"] and report["not_counted"]["kernels_without_flops"] == []
    tokamax = {f"PallasMosaicGpu{kernel}" for kernel in ("RaggedDot", "FlashAttention", "FlashAttentionVjp")}
    assert report["kernels"].keys() == {"__cublas$lt$matmul", *tokamax}  # no dense product, no attention with a bias
    assert not re.search(r"(pred|f32|s8)\[(\d+,)*4096,4096\]", text)  # which tokens are visible
    assert report["synchronous_share"] == 0
    assert {tuple(c["axes"]) for c in report["collectives"] if c["kind"] == "all-to-all"} == {("expert",)}
    assert report["seconds"]["InfiniBand"] > 0 and report["links"]["busy"]["NVLink"] > 0
    # beyond the ideal: 0.15 for attention's scores, which it leaves out, and 0.09 for what remat="full" computes again
    assert report["flops_per_step"]["compiled_over_ideal"] < 1.25


@pytest.mark.slow
@with_compiler
@pytest.mark.parametrize("topology", ["b200:2x8", "gb200:4x4"])
def test_other_families_have_a_compiler_too(repo, tmp_path, topology):
    mini = "--config=configs/deepseek_v3_mini.py", "--config.batch_size=64", "--config.mesh.expert=8"
    report, _ = plan(repo, tmp_path, f"--topology={topology}", *mini)
    assert report["fits"] and report["not_counted"]["kernels_without_flops"] == []
    assert report["kernels"].keys() == {"__cublas$lt$matmul", "PallasTritonRaggedDot"}
    assert ("InfiniBand" in report["seconds"]) == (topology == "b200:2x8")  # four hosts of GB200 are one NVLink domain
    # an expert's 128 rows are one tile; attention in float32 is XLA's, all scores of which are 0.3 of the ideal
    assert report["flops_per_step"]["compiled_over_ideal"] < 1.35
