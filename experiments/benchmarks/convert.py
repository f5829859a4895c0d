"""`python -m experiments.benchmarks.convert`: memory and speed of `moe_jax.convert`, both ways, on a synthetic model.

    --gigabytes=5                 the size of the model in bfloat16: Qwen3-MoE with many experts, in shards
    --embed_dim=1024 --expert_ffw_dim=512 --num_experts=64 --vocab_size=32000
    --folder=DIR                  the folder for its temporary files, three times its size; default: the system's
    --json=FILE

Every conversion runs in a process of its own. peak: its largest resident memory; above: the peak without the largest
tensor; idle: the peak of the same command on a small model, which is mostly libraries. Converting back must give the
same tensors, bit for bit, or the benchmark fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import timing
from moe_jax.config import ModelConfig, default, validate
from moe_jax.config.command import parse_flags
from moe_jax.huggingface.shards import Plan, digest, open_folder, write_folder

GIGABYTE = 10**9
SIZES = ("embed_dim", "expert_ffw_dim", "num_experts", "vocab_size")


def model_of(num_bytes: int, sizes: dict[str, int]) -> ModelConfig:
    """A Qwen3-MoE config of about this many bytes in bfloat16."""
    head = 64
    heads = sizes["embed_dim"] // head
    keys = dict(num_heads=heads, num_kv_heads=heads, head_dim=head, qk_norm="head", score="softmax", top_k=8)
    expert = 3 * sizes["embed_dim"] * sizes["expert_ffw_dim"]
    layer = 2 * (sizes["num_experts"] * expert + 4 * sizes["embed_dim"] ** 2)
    layers = max(1, round((num_bytes - 4 * sizes["vocab_size"] * sizes["embed_dim"]) / layer))
    ours = {**keys, **sizes, "num_layers": layers, "param_dtype": "bfloat16"}
    return validate(default(model=ours)).model


def write_model(folder: Path, config: ModelConfig) -> dict[str, int]:
    """Write config.json and the tensors, one after the other; return bytes in all, bytes of the largest, and number."""
    import ml_dtypes

    from moe_jax.huggingface.config_out import choose, to_hf
    from moe_jax.huggingface.tensors import tensors

    family = choose(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(family, config, "bfloat16", {})))
    plans = [Plan(t.name, "bfloat16", t.shape) for t in tensors(family, config)]
    noise = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7).astype(ml_dtypes.bfloat16)
    shapes = {plan.name: plan.shape for plan in plans}
    for _ in write_folder(folder, plans, lambda name: np.resize(np.roll(noise, hash(name) % 997), shapes[name])):
        pass
    sizes = [plan.num_bytes for plan in plans]
    return {"bytes": sum(sizes), "largest": max(sizes), "tensors": len(sizes)}


def convert(source: Path, target: Path) -> dict[str, float]:
    """Run the command; return its seconds and its largest resident memory in bytes.

    Raises:
        ValueError: the command failed; its own error is printed above.
    """
    command = [sys.executable, "-m", "moe_jax.convert", f"--input={source}", f"--output={target}"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} ended with status {process.returncode}; see above.")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - start, "peak": used.ru_maxrss * unit}


def measure(home: Path, num_bytes: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Convert a model of about this many bytes in both directions, and check that its tensors are unchanged.

    Raises:
        ValueError: a conversion failed, or a tensor changed.
    """
    about: dict[str, Any] = write_model(home / "hf", model_of(num_bytes, sizes))
    for way, source, target in (("in", "hf", "run"), ("out", "run", "back")):
        about[way] = convert(home / source, home / target)
        about[way] |= {
            "above": about[way]["peak"] - about["largest"],
            "megabytes_per_second": about["bytes"] / 10**6 / about[way]["seconds"],
        }
    for name in differing(home / "hf", home / "back"):
        raise ValueError(f"tensor {name} is not the same after both conversions.")
    return about


def differing(one: Path, other: Path) -> Iterator[str]:
    """The names of tensors that are not the same in both folders."""
    first = open_folder(one)
    second = open_folder(other)
    for name in first.keys() | second.keys():
        if name not in first or name not in second or digest(first[name]) != digest(second[name]):
            yield name


def report(found: dict[str, Any]) -> None:
    """Print the figures."""
    size = found["bytes"] / GIGABYTE
    largest = found["largest"] / 10**6
    print(f"{size:.2f} GB in {found['tensors']} tensors, the largest of {largest:.1f} MB; equal after both conversions")
    for way in ("in", "out"):
        f = found[way]
        print(
            f"{way:>3}: peak {f['peak'] / 10**6:.0f} MB, {f['above'] / 10**6:.0f} MB above the largest tensor "
            f"(idle {found['idle'][way]['peak'] / 10**6:.0f} MB), {f['megabytes_per_second']:.0f} MB/s"
        )


@timing.command
def main(flag: Any) -> None:
    """Measure, print, and write."""
    sizes: dict[str, Any] = {name: flag[name].value for name in SIZES}
    with tempfile.TemporaryDirectory(dir=flag.folder) as home:
        small = measure(Path(home) / "small", 1, dict.fromkeys(SIZES, 128))
        found = measure(Path(home) / "large", int(flag.gigabytes * GIGABYTE), sizes)
    found["idle"] = {way: small[way] for way in ("in", "out")}
    report(found)
    timing.save(flag.json, found | {"sizes": sizes})


if __name__ == "__main__":
    flags.DEFINE_float("gigabytes", 5.0, "Size of the model in bfloat16.", lower_bound=0.0)
    for key, value in zip(SIZES, (1024, 512, 64, 32000), strict=True):
        flags.DEFINE_integer(key, value, f"model.{key}", lower_bound=64)
    flags.DEFINE_string("folder", None, "The folder for temporary files.")
    flags.DEFINE_string("json", "", "A file to write the figures to.")
    app.run(main, flags_parser=parse_flags)
