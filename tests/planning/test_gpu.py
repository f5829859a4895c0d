"""GPUs that are not present: one sentence for what is missing, and what XLA is told of them."""

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
    installed = ["jax-cuda12-plugin", "tokamax"]
    monkeypatch.setattr(metadata, "distributions", lambda name: [name] if name in installed else [])
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


# --- with the compiler for GPUs, by hand: python -m pytest -m slow tests/planning/test_gpu.py ----------------------

MISSING = gpu.missing_wheels()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'moe_jax[gpu-plan]'")
def test_a_plan_for_two_hosts_has_grouped_products_and_both_levels_of_links(repo, tmp_path):
    report, text = tmp_path / "plan.json", tmp_path / "step.hlo"
    command = [sys.executable, "-m", "moe_jax.plan", "--config=configs/deepseek_v3_mini.py", "--topology=h100:2x8"]
    command += ["--config.batch_size=16", f"--json={report}", f"--hlo={text}"]
    result = subprocess.run(command, cwd=repo, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ragged_dot_general" not in text.read_text()
    plan = json.loads(report.read_text())
    assert plan["not_counted"]["kernels_without_flops"] == []
    assert plan["seconds"]["InfiniBand"] > 0
    assert plan["links"]["busy"]["NVLink"] > 0
    # an expert's 32 rows are multiplied as a tile of 128; every row by each of the 16 experts would be more than 3
    assert plan["flops_per_step"]["compiled_over_ideal"] < 2.2
