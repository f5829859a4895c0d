"""A made-up study: the main sweep with a few arms, with numbers that are known, and one plain table."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sweeps import write_run, write_sweep

TRUNKS = ("bias", "aux_1e-2")
AT, STEPS = 1000, 1400
CONFIG = {
    "num_steps": STEPS,
    "batch_size": 8,
    "sequence_length": 256,
    "model": {"num_experts": 16, "capacity_factor": 1.25, "top_k": 4, "num_layers": 4},
    "balance": {},
}


class Arm(NamedTuple):
    """What an arm logs: bits per byte above the bias's, max violation, and the ratio of gradient norms."""

    bits: float = 0.0
    violation: float = 0.2
    gradients: float = 0.0


def line(step: int, arm: Arm, level: float) -> dict:
    """A line of metrics.jsonl with an evaluation; `level` is the bits per byte of the bias."""
    row = {
        "step": step,
        "loss": 2.0,
        "bits_per_byte": level + arm.bits,
        "skipped": 0,
        "moe/max_violation": arm.violation,
        "interference/router_ratio": arm.gradients,
    }
    return row | {
        "eval/bits_per_byte": level + arm.bits,
        "eval/max_violation": arm.violation,
        "eval/sequence_max_violation": 0.3 + arm.violation,
        "eval/dead_experts": 0,
        "eval/domain_information": 0.02 + arm.bits,
    }


def layers(steps: Iterable[int], arm: Arm, layer_count: int = 1) -> list[dict]:
    """Loads of 16 experts of which the first has the max violation, and a bias that grows."""
    loads = np.full(16, 512.0)
    loads[0] *= 1 + arm.violation
    loads[1:] -= 512 * arm.violation / 15
    bias = np.linspace(-0.1, 0.1, 16)
    return [
        {
            "step": s,
            "loads": [loads.round(3).tolist()] * layer_count,
            "bias": [(bias * s / STEPS).round(4).tolist()] * layer_count,
        }
        for s in steps
    ]


def main_sweep(
    folder: Path,
    arms: Mapping[str, Arm],
    trunk_seeds: Iterable[int] = (0, 1),
    data_seeds: Iterable[int] = (0,),
    missing: Iterable[tuple[str, int, str]] = (),
    noise: float = 0.0,
) -> Path:
    """The table `arms` in a folder of a study; branches of (trunk, trunk seed, arm) in `missing` are not finished.

    The trunk seed s adds s to the loss, and the trunk of aux_1e-2 0.1: both cancel. In the block s an arm's loss is
    1e-5 s higher, so that intervals are not empty.
    """
    directory, generator = folder / "arms", np.random.default_rng(0)
    seeds, missing = list(trunk_seeds), set(missing)
    parts = [[trunk, seed] for seed in seeds for trunk in TRUNKS]
    every = [1000 * s + d for s in seeds for d in data_seeds]
    plan = dict(baseline="bias", config=CONFIG)
    write_sweep(directory, list(arms), every, at=AT, trunks=list(TRUNKS), parts=parts, trunks_config={}, **plan)
    write_sweep(directory / "trunks", list(TRUNKS), seeds, **plan | {"baseline": "bias"})
    for trunk, seed in parts:
        level = 2.8 + seed + 0.1 * (trunk == "aux_1e-2")
        trunk_steps = (99, 499, AT - 1)
        rows = [line(step, Arm(gradients=0.1 * (trunk != "bias")), level) for step in trunk_steps]
        config = CONFIG | {"num_steps": AT}
        write_run(directory / "trunks" / trunk / f"seed{seed}", rows, layers(trunk_steps, Arm()), config)
        part = directory / "branches" / trunk / f"seed{seed}"
        write_sweep(part, list(arms), [1000 * seed + d for d in data_seeds], **plan)
        for name, arm in arms.items():
            if (trunk, seed, name) not in missing:
                for d in data_seeds:
                    here = arm._replace(
                        bits=arm.bits + (name != "bias") * 1e-5 * seed + noise * generator.normal(),
                        violation=arm.violation * np.exp(30 * noise * generator.normal()),
                        gradients=arm.gradients * (1 + 0.01 * seed),
                    )
                    steps = (1099, 1199, 1299, STEPS - 1)
                    rows = [line(step, here, level + 0.01 * d) for step in steps]
                    write_run(part / name / f"seed{1000 * seed + d}", rows, layers(steps, here), CONFIG)
    return directory


def plain_table(folder: Path, name: str, arms: Mapping[str, Arm], seeds: Iterable[int] = (0, 1, 2)) -> Path:
    """A plain table of whole runs."""
    directory, seeds = folder / name, list(seeds)
    write_sweep(directory, list(arms), seeds, config=CONFIG)
    for arm, numbers in arms.items():
        for seed in seeds:
            rows = [line(step, numbers, 2.8 + seed) for step in (699, STEPS - 1)]
            write_run(directory / arm / f"seed{seed}", rows, [], CONFIG)
    return directory


def write_ablation(folder: Path, whole: float, shared: float, best: float) -> None:
    """The file of the evaluate command about experts taken away, in bits per byte."""
    variants = {"as it is": whole, "without shared": shared, "without the best 1": best}
    (folder / "ablation.json").write_text(json.dumps({k: {"loss": v, "bits_per_byte": v} for k, v in variants.items()}))
