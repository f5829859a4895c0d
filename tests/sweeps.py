"""Folders of sweeps with made-up logs: small ones for arithmetic, and ones that look like training for pages."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

MOE = re.compile("moe/|violation|dead")  # what a dense arm does not log
DOMAINS = ("prose", "code", "mathematics")
CONFIG: dict[str, Any] = {
    "num_steps": 1000,
    "batch_size": 16,
    "sequence_length": 256,
    "learning_rate": 1e-3,
    "model": {"num_layers": 4, "num_experts": 16, "top_k": 2, "embed_dim": 128},
    "balance": {},
}
ARMS_CONFIG = {
    "none": {},
    "aux_loss": {"balance.aux_loss.weight": 0.02},
    "bias_sign": {"balance.bias_sign.rate": 0.001},
    "dense": {"model": {"num_experts": 0, "embed_dim": 128}},
}


def write_sweep(directory: Path, arms: list[str], seeds: list[int], /, **changes: Any) -> None:
    """sweep.json alone."""
    spec = {
        "name": "balance, small",
        "description": "Which way of balancing keeps the loss and evens the load?",
        "arms": arms,
        "seeds": seeds,
        "baseline": arms[0],
        "command": "python -m experiments.ablate --config=configs/small.py",
        "config": CONFIG,
        "arms_config": {arm: ARMS_CONFIG.get(arm, {}) for arm in arms},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sweep.json").write_text(json.dumps(spec | changes))


def write_run(folder: Path, metrics: list[dict], layers: list[dict], config: dict | None = None) -> None:
    """One run's files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in layers))


def tiny_metrics(bits: float, violation: float, steps: tuple[int, ...] = (0, 250, 500, 999)) -> list[dict]:
    """Four rows whose last quarter is the last row, so every expected number is one that is written here."""
    rows = [
        {
            "step": step,
            "loss": 3.0,
            "moe/max_violation": 10 * violation if step < steps[-1] else 2 * violation,
            "moe/aux_loss": 1.5,
            "tokens_per_second": 1000.0 + step,
            "skipped": 0,
        }
        for step in steps
    ]
    rows[-1] |= {
        "eval/bits_per_byte": bits,
        "eval/bits_per_byte/prose": bits - 0.1,
        "eval/max_violation": violation,
        "eval/max_violation_worst": 1.5 * violation,
        "eval/dead_experts": 1,
    }
    return rows


def tiny_layers(steps: tuple[int, ...] = (0, 250, 500, 999)) -> list[dict]:
    """Two layers of three experts; at the end two of the six experts are dead, before that none."""
    alive, dead = [[1, 1, 1], [1, 1, 1]], [[3, 0, 0], [1, 1, 1]]
    zero = [[0.0] * 3] * 2
    return [{"step": s, "loads": dead if s == steps[-1] else alive, "bias": zero} for s in steps]


def tiny_sweep(directory: Path, bits: dict[str, list[float]], **changes: Any) -> Path:
    """An arm's list holds held-out bits per byte by seed; max violation is 1 for the first arm, 0.5 after."""
    arms = list(bits)
    write_sweep(directory, arms, list(range(max(map(len, bits.values())))), **changes)
    for i, arm in enumerate(arms):
        for seed, value in enumerate(bits[arm]):
            metrics = tiny_metrics(value, 1.0 if i == 0 else 0.5)
            write_run(directory / arm / f"seed{seed}", metrics, tiny_layers())
    return directory


def branched_sweep(
    directory: Path,
    numbers: dict[tuple[str, int, str, int], float],
    *,
    at: int = 600,
    trunks: tuple[str, ...] = ("none", "bias_sign"),
    missing: tuple[tuple[str, int, str, int], ...] = (),
) -> Path:
    """A branched sweep whose branches have held-out bits per byte by (trunk, trunk seed, arm, data seed).

    Branches log the steps from `at` on. Those in `missing` are planned and have no folder.
    """
    planned = [*numbers, *missing]
    arms = list(dict.fromkeys(arm for _, _, arm, _ in planned))
    trunk_seeds = sorted({seed for _, seed, _, _ in planned})
    parts = [[trunk, seed] for trunk in trunks for seed in trunk_seeds]
    config = {method: ARMS_CONFIG.get(method, {}) for method in trunks}
    seeds = sorted({seed for *_, seed in planned})
    write_sweep(directory, arms, seeds, at=at, trunks=list(trunks), parts=parts, trunks_config=config)
    write_sweep(directory / "trunks", list(trunks), trunk_seeds)
    for trunk, trunk_seed in parts:
        steps = (0, at // 2, at - 1)
        metrics = tiny_metrics(1.5, 0.5, steps)
        write_run(directory / "trunks" / trunk / f"seed{trunk_seed}", metrics, [], CONFIG | {"num_steps": at})
        own = [branch for branch in planned if branch[:2] == (trunk, trunk_seed)]
        part = directory / "branches" / trunk / f"seed{trunk_seed}"
        write_sweep(part, arms, sorted({seed for *_, seed in own}))
        for branch in own:
            if branch in numbers:
                metrics = tiny_metrics(numbers[branch], 0.5, (at, CONFIG["num_steps"] - 1))
                write_run(part / branch[2] / f"seed{branch[3]}", metrics, [])
    return directory


def simulated_sweep(directory: Path, arms: list[str], seeds: list[int], every: int = 10) -> Path:
    """Logs that look like training: a collapsing, a lightly balanced, a bias-balanced and a dense arm."""
    write_sweep(directory, arms, seeds)
    for arm in arms:
        for seed in seeds:
            metrics, layers = simulated_run(arm, seed, every)
            folder = directory / arm / f"seed{seed}"
            write_run(folder, metrics, layers)
            info = {"versions": {"jax": "0.7.0"}, "machine": "one CPU", "git": "abc1234", "seconds": 600.0}
            info["time"] = {"init": 60.0, "step": 540.0}
            (folder / "run.json").write_text(json.dumps(info))
    return directory


def simulated_run(arm: str, seed: int, every: int, experts: int = 16, layers: int = 4) -> tuple[list, list]:
    """One run: router preferences drift, the arm's method pulls them back, loads are multinomial draws."""
    shared = np.random.default_rng(seed)  # the same for all arms: what pairing by seed cancels
    own = np.random.default_rng([seed, len(arm)])
    offset = 0.01 * shared.normal()
    taste, bias = 0.2 * shared.normal(size=(layers, experts)), np.zeros((layers, experts))
    metrics, rows = [], []
    for step in range(every - 1, CONFIG["num_steps"], every):
        taste += 0.035 * shared.normal(size=taste.shape) + (0.012 * taste if arm == "none" else 0)
        taste *= 0.93 if arm == "aux_loss" else 1.0
        share = np.exp(taste + bias) / np.exp(taste + bias).sum(axis=1, keepdims=True)
        share[share < 0.012] = 0.0
        loads = np.stack([own.multinomial(8192, s / s.sum()) for s in share])
        if arm == "bias_sign":
            bias = bias - 0.03 * np.sign(loads - loads.mean(axis=1, keepdims=True))
        metrics.append(simulated_row(arm, step, loads, offset, own, last=step + every >= CONFIG["num_steps"]))
        rows.append({"step": step, "loads": loads.tolist(), "bias": bias.round(5).tolist()})
    return metrics, [] if arm == "dense" else rows


def simulated_row(
    arm: str, step: int, loads: np.ndarray, offset: float, own: np.random.Generator, last: bool
) -> dict[str, Any]:
    """One line of metrics.jsonl; evaluation every hundred steps."""
    effect = {"none": 0.0, "aux_loss": 0.004, "bias_sign": -0.006, "dense": 0.05}.get(arm, 0.002)
    bits = 1.3 + 2.2 * math.exp(-step / 160) + offset + effect + 0.0015 * own.normal()
    violation = loads.max(axis=1) / loads.mean(axis=1) - 1
    row: dict[str, Any] = {"step": step, "loss": bits * 2.1 + 0.03 * own.normal(), "skipped": 0}
    row["tokens_per_second"] = 21000 + 400 * own.normal()
    moe = {"moe/max_violation": violation.mean(), "moe/aux_loss": 1 + 0.1 * violation.mean()}
    evaluated = {"eval/bits_per_byte": bits, "eval/max_violation": 0.9 * violation.mean()}
    evaluated |= {"eval/max_violation_worst": violation.max(), "eval/dead_experts": int((loads == 0).sum())}
    for i, domain in enumerate(DOMAINS):
        evaluated[f"eval/bits_per_byte/{domain}"] = bits + 0.2 * (i - 1) + 0.002 * own.normal()
    moe["moe/violation_floor"] = 0.08
    row |= moe | (evaluated if step % 100 == 0 or last else {})
    return {key: value for key, value in row.items() if arm != "dense" or not MOE.search(key)}


def keep_account(folder: Path, gflops: float, mfu: float | None = None, **seconds: float) -> None:
    """A run's ledger in run.json, and its rates in every line but the first."""
    (folder / "run.json").write_text(json.dumps({"time": seconds}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line |= {"gflops_per_second": gflops} | ({} if mfu is None else {"mfu": mfu})
    lines[0]["gflops_per_second"] = None  # it compiled
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
