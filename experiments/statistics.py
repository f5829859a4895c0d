"""A sweep's folder becomes numbers: runs are read, checked for being finished, and compared seed by seed.

Two rules hold everywhere. Only finished runs are counted, and every other run is named in `Sweep.problems`.
An arm is compared with the baseline on the seeds both have finished (same initial weights, same batches), so
what the seeds share cancels; the interval is the 95 % t-interval of those differences.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import flatten
from moe_jax.runtime.ledger import KINDS
from moe_jax.runtime.log import parts

CONFIDENCE = 0.95
STEPS_KEY = "num_steps"
DOMAIN_PREFIX = "eval/bits_per_byte/"


class SweepError(ValueError):
    """A folder that cannot be reported on; the message is a sentence for the user."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % t-interval.

    Attributes:
        mean: mean over seeds; nan when no seed has the value.
        half: half-width, in the unit of the mean; None with fewer than two seeds.
        n: number of seeds.
    """

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """True when 0 lies outside the interval; False when there is no interval."""
        return self.half is not None and abs(self.mean) > self.half


NOTHING = Interval(math.nan, None, 0)


@dataclass(frozen=True)
class Run:
    """One finished run: one arm with one seed."""

    arm: str
    seed: int
    directory: Path
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """What a sweep asked for, and the finished runs it has so far.

    Attributes:
        runs: arm -> seed -> finished run; every arm has an entry, possibly an empty one.
        problems: a sentence for each run that is missing, unfinished, diverged or partly unreadable.
    """

    directory: Path
    name: str
    description: str
    command: str
    arms: list[str]
    seeds: list[int]
    baseline: str
    config: Mapping[str, Any]
    arms_config: Mapping[str, Mapping[str, Any]]
    runs: dict[str, dict[int, Run]]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ArmSummary:
    """One arm in numbers; a value the arm does not log is an `Interval` with n = 0.

    Attributes:
        bits_per_byte: held-out bits per byte at the last evaluation.
        difference: its paired difference to the baseline; n = 0 for the baseline itself.
        max_violation: held-out, (max - mean) / mean load over the whole held-out set, mean over layers.
        max_violation_difference: its paired difference to the baseline.
        train_max_violation: the same of one training batch, mean over the last quarter of logged steps.
        worst_layer: held-out max violation of the worst layer.
        dead_experts: experts without one token in the last quarter of logged steps, summed over layers.
        eval_dead_experts: experts without one held-out token, as the run logged them.
        aux_loss: auxiliary loss, 1 = balanced, mean over the last quarter; measured, trained on or not.
        tokens_per_second: median over steps of each run, then over runs; nan when not logged.
        gflops_per_second, mfu: the same of the model's FLOPs, and of their share of the devices' peak.
        seconds: kind of work -> wall-clock seconds of all finished runs; empty when none says.
        domains: domain -> held-out bits per byte.
        domain_differences: domain -> paired difference to the baseline.
    """

    arm: str
    seeds: tuple[int, ...]
    bits_per_byte: Interval
    difference: Interval
    max_violation: Interval
    max_violation_difference: Interval
    train_max_violation: Interval
    worst_layer: Interval
    dead_experts: Interval
    eval_dead_experts: Interval
    aux_loss: Interval
    tokens_per_second: float
    gflops_per_second: float
    mfu: float
    seconds: dict[str, float]
    domains: dict[str, Interval]
    domain_differences: dict[str, Interval]


# --- intervals ------------------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> Interval:
    """Mean and 95 % t-interval of a few numbers, one a seed; non-finite ones are left out.

    Args:
        values: one number a seed, any unit.

    Returns:
        `Interval(mean, half, n)`; half = t(0.975, n - 1) * standard deviation (n - 1) / sqrt(n).
    """
    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=np.float64)
    if finite.size == 0:
        return NOTHING
    if finite.size == 1:
        return Interval(float(finite[0]), None, 1)
    half = t_quantile(finite.size) * float(finite.std(ddof=1)) / math.sqrt(finite.size)
    return Interval(float(finite.mean()), half, int(finite.size))


def t_quantile(n: int) -> float:
    """The factor between standard error and half-width for n >= 2 seeds: 12.7 at 2, 4.3 at 3, 2.8 at 5."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean difference to the baseline over the seeds both have, with its interval.

    Args:
        values: seed -> number of the arm.
        baseline: seed -> number of the baseline, same unit.

    Returns:
        The interval of `values[seed] - baseline[seed]`; n = 0 when they share no seed.
    """
    return interval(values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys()))


def noise_floor(config: Mapping[str, Any]) -> float | None:
    """Training max violation of a perfectly uniform random router: what finite batches alone produce.

    E loads with mean T K / E vary by chance; the largest lies m(E) standard deviations above the mean, as the
    largest of E normal numbers does (m = 1.5 for 8, 2.4 for 64; its limit sqrt(2 ln E) is too high there).

    Args:
        config: nested; reads batch_size, sequence_length, model.num_experts, model.top_k.

    Returns:
        m(E) sqrt((1 - K/E) E / (T K)) with T tokens a step, or None when a key is missing or E <= K.
    """
    flat = flatten(config)
    keys = ("batch_size", "sequence_length", "model.num_experts", "model.top_k")
    numbers = [as_number(flat.get(key)) for key in keys]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        return None
    batch, sequence, experts, top_k = numbers
    if experts <= top_k:
        return None
    deviation = math.sqrt((1 - top_k / experts) * experts / (batch * sequence * top_k))
    return _largest_normal(experts) * deviation


def _largest_normal(n: float) -> float:
    """m(n): mean of the largest of n >= 2 standard normal numbers whose sum is fixed at 0."""
    from scipy import stats

    x = np.linspace(-10.0, 10.0, 4001)
    density = n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1)
    return float(np.trapezoid(x * density, x)) * math.sqrt(n / (n - 1))


# --- files ----------------------------------------------------------------------------------------------


def as_number(value: Any) -> float:
    """A logged value as float; null, text and anything that is not a number become nan."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def arm_settings(sweep: Sweep, arm: str) -> dict[str, Any]:
    """The dotted settings in which an arm differs from the sweep's base config."""
    base = flatten(sweep.config)
    own = flatten(sweep.arms_config.get(arm) or {})
    return {key: value for key, value in own.items() if key not in base or base[key] != value}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when the file is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SweepError(f"{path} is not valid JSON ({error}); write it again or delete it.") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a jsonl file by step; a killed run leaves a partial line, a resumed one repeats steps.

    Args:
        path: one JSON object a line, each with an integer `step`; may be missing.

    Returns:
        The rows sorted by step, of equal steps the last written; and how many lines were unreadable.
    """
    rows: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for part in parts(path):
        with part.open(encoding="utf-8", errors="replace") as lines:
            for line in filter(str.strip, lines):
                row = _parse(line)
                if row is None:
                    unreadable += 1
                else:
                    rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)], unreadable


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def layer_arrays(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Loads and biases of every expert over the run, read from layers.jsonl.

    Returns:
        (steps int64[N], loads float64[N, L, E], bias float64[N, L, E] or None when not logged), or None for
        a run without MoE layers. Rows whose shape differs from the last row's are left out.
    """
    rows, _ = read_lines(run.directory / "layers.jsonl")
    loads = [_array(row.get("loads")) for row in rows]
    if not loads or loads[-1].ndim != 2 or loads[-1].size == 0:
        return None
    keep = [i for i, load in enumerate(loads) if load.shape == loads[-1].shape]
    biases = [_array(rows[i].get("bias")) for i in keep]
    has_bias = all(bias.shape == loads[-1].shape for bias in biases)
    steps = np.asarray([rows[i]["step"] for i in keep], dtype=np.int64)
    return steps, np.stack([loads[i] for i in keep]), np.stack(biases) if has_bias else None


def _array(nested: Any) -> np.ndarray:
    try:
        return np.asarray(nested, dtype=np.float64)  # null becomes nan
    except (TypeError, ValueError):
        return np.empty(0)


# --- runs -----------------------------------------------------------------------------------------------


def read_sweep(directory: str | Path, baseline: str | None = None) -> Sweep:
    """Reads sweep.json and every run it names.

    Args:
        directory: holds sweep.json and <arm>/seed<k>/metrics.jsonl.
        baseline: arm to compare with; None takes the one in sweep.json.

    Returns:
        The sweep with its finished runs, and a sentence for each run that is not.

    Raises:
        SweepError: no such folder, no sweep.json, or one without arms or seeds or with an unknown baseline.
    """
    directory = Path(directory)
    spec = _read_spec(directory, baseline)
    runs, problems = _finished(_read_runs(directory, spec), spec)
    return Sweep(
        directory=directory,
        name=str(spec.get("name") or directory.name),
        description=str(spec.get("description") or ""),
        command=str(spec.get("command") or ""),
        arms=spec["arms"],
        seeds=spec["seeds"],
        baseline=spec["baseline"],
        config=spec.get("config") or {},
        arms_config=spec.get("arms_config") or {},
        runs=runs,
        problems=problems + _other_data(runs, spec["baseline"]) + _strangers(directory, spec),
    )


def _read_spec(directory: Path, baseline: str | None) -> dict[str, Any]:
    if not directory.is_dir():
        raise SweepError(f"DIR={directory} must be a folder that holds a sweep; it does not exist.")
    path = directory / "sweep.json"
    if not path.is_file():
        raise SweepError(f"DIR={directory} must hold sweep.json; try the folder that ablate wrote.")
    spec = read_json(path)
    for key in ("arms", "seeds"):
        if not isinstance(spec.get(key), list) or not spec[key]:
            rule = "must be a list with at least one entry; run the sweep again to write it."
            raise SweepError(f"{path}: {key}={spec.get(key)!r} {rule}")
    spec["baseline"] = baseline or spec.get("baseline") or spec["arms"][0]
    if spec["baseline"] not in spec["arms"]:
        rule = f"must be one of the sweep's arms; try one of: {', '.join(map(str, spec['arms']))}."
        raise SweepError(f"baseline={spec['baseline']!r} {rule}")
    return spec


def _read_runs(directory: Path, spec: Mapping[str, Any]) -> list[tuple[Run, int]]:
    runs = []
    for arm in spec["arms"]:
        for seed in spec["seeds"]:
            folder = directory / arm / f"seed{seed}"
            metrics, unreadable = read_lines(folder / "metrics.jsonl")
            config = read_json(folder / "config.json") or _overridden(spec, arm)
            runs.append((Run(arm, seed, folder, config, read_json(folder / "run.json"), metrics), unreadable))
    return runs


def _overridden(spec: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """The config an arm asked for, with dotted keys: what a run without config.json is judged by."""
    return flatten(spec.get("config") or {}) | flatten((spec.get("arms_config") or {}).get(arm) or {})


def _finished(read: list[tuple[Run, int]], spec: Mapping[str, Any]) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """Splits what was read into finished runs and sentences about the others."""
    ends = [steps - 1 for run, _ in read if (steps := planned_steps(run.config)) is not None]
    evaluations = [evaluated[-1] for run, _ in read if (evaluated := _evaluated(run))]
    last = max(ends or evaluations, default=-1)
    runs: dict[str, dict[int, Run]] = {arm: {} for arm in spec["arms"]}
    problems = []
    for run, unreadable in read:
        problem = _problem(run, last)
        if problem:
            problems.append(f"{run.arm}, seed {run.seed}: {problem}")
        else:
            runs[run.arm][run.seed] = run
        if unreadable:
            lines = "line was" if unreadable == 1 else "lines were"
            problems.append(f"{run.arm}, seed {run.seed}: {unreadable} unreadable {lines} left out.")
    return runs, problems


def _problem(run: Run, last: int) -> str | None:
    """Why a run is not counted, or None: a counted run was evaluated at the last step that its own config plans.

    Args:
        run: what there is of it.
        last: of other runs, for one whose config does not say how many steps it has.
    """
    if not run.metrics:
        return "not started (no metrics)."
    if why := run.info.get("diverged"):
        return f"diverged ({str(why).partition(';')[0]}); left out of every mean."
    steps = planned_steps(run.config)
    end = last if steps is None else steps - 1
    step, evaluated = run.metrics[-1]["step"], _evaluated(run)
    if step < end:
        return f"unfinished (step {step} of {end + 1})."
    if not evaluated or evaluated[-1] < end:
        return f"unfinished (step {step}, no evaluation of it yet)."
    if not math.isfinite(final(run, "eval/bits_per_byte")):
        return f"diverged (the evaluation at step {evaluated[-1]} is not finite); left out of every mean."
    return None


def planned_steps(config: Mapping[str, Any]) -> int | None:
    """The number of steps a config asks for, or None when it does not say."""
    steps = as_number(config.get(STEPS_KEY))
    return int(steps) if math.isfinite(steps) else None


def _evaluated(run: Run) -> list[int]:
    return [row["step"] for row in run.metrics if "eval/bits_per_byte" in row]


def corpus_of(info: Mapping[str, Any]) -> str:
    """The fingerprint of the data that a run read, from its run.json; empty where it is older than fingerprints."""
    identity = info.get("identity")
    return str(identity.get("corpus", "")) if isinstance(identity, Mapping) else ""


def _other_data(runs: Mapping[str, Mapping[int, Run]], baseline: str) -> list[str]:
    """A sentence for every run that read other data than the baseline's run of its seed, with which it is paired."""
    problems = []
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            other = runs[baseline].get(seed)
            pair = [corpus_of(one.info) for one in (run, other) if one is not None]
            if all(pair) and len(set(pair)) > 1:
                problems.append(
                    f"{arm}, seed {seed}: read other data than {baseline}; their difference is not of the arms."
                )
    return problems


def _strangers(directory: Path, spec: Mapping[str, Any]) -> list[str]:
    """Runs in the folder that sweep.json does not name: said, not silently left out."""
    named = {(arm, f"seed{seed}") for arm in spec["arms"] for seed in spec["seeds"]}
    found = sorted(path.parent for path in directory.glob("*/seed*/metrics.jsonl"))
    return [
        f"{folder.parent.name}/{folder.name} is not named in sweep.json and was not read."
        for folder in found
        if (folder.parent.name, folder.name) not in named
    ]


# --- one run -> one number ------------------------------------------------------------------------------


def curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """One logged value over the run.

    Returns:
        (steps int64[N], values float64[N]) of the rows that have the key; null is nan.
    """
    rows = [row for row in run.metrics if key in row]
    steps = np.asarray([row["step"] for row in rows], dtype=np.int64)
    return steps, np.asarray([as_number(row[key]) for row in rows], dtype=np.float64)


def final(run: Run, key: str) -> float:
    """The value in the last row that has the key; nan when none has it."""
    _, values = curve(run, key)
    return float(values[-1]) if values.size else math.nan


def last_quarter(values: np.ndarray) -> np.ndarray:
    """The last quarter of the rows, rounded up, so at least one when there is one."""
    return values[len(values) - math.ceil(len(values) / 4) :]


def tail_mean(run: Run, key: str) -> float:
    """Mean over the last quarter of logged steps; nan when never logged there."""
    _, values = curve(run, key)
    tail = last_quarter(values)
    return float(tail[np.isfinite(tail)].mean()) if np.isfinite(tail).any() else math.nan


def dead_at_end(run: Run) -> float:
    """Experts, summed over layers, that got no token in the last quarter of logged steps; nan if dense."""
    arrays = layer_arrays(run)
    if arrays is None:
        return math.nan
    _, loads, _ = arrays
    return float((last_quarter(loads).sum(axis=0) == 0).sum())


def _median_speed(runs: Iterable[Run], key: str) -> float:
    medians = []
    for run in runs:
        _, values = curve(run, key)
        if np.isfinite(values).any():
            medians.append(float(np.median(values[np.isfinite(values)])))
    return float(np.median(medians)) if medians else math.nan


def _seconds(runs: Iterable[Run]) -> dict[str, float]:
    """What the runs' ledgers add up to, by kind of work."""
    times = [time for run in runs if isinstance(time := run.info.get("time"), Mapping)]
    return {kind: sum(as_number(time.get(kind, 0.0)) for time in times) for kind in KINDS} if times else {}


# --- arms -----------------------------------------------------------------------------------------------


def summarise(sweep: Sweep | str | Path) -> list[ArmSummary]:
    """Every arm of a sweep in numbers, in the sweep's order.

    Args:
        sweep: a sweep that was read, or its folder.

    Returns:
        One summary an arm; an arm without a finished run has no seeds and n = 0 everywhere.

    Raises:
        SweepError: the folder holds no readable sweep.
    """
    if not isinstance(sweep, Sweep):
        sweep = read_sweep(sweep)
    return [_summary(sweep, arm) for arm in sweep.arms]


def finals(sweep: Sweep, arm: str, key: str) -> dict[int, float]:
    """Seed -> last value of a key, of an arm's finished runs."""
    return {seed: final(run, key) for seed, run in sweep.runs[arm].items()}


def to_baseline(sweep: Sweep, arm: str, key: str) -> Interval:
    """Paired difference of a key's last value to the baseline; n = 0 for the baseline itself."""
    if arm == sweep.baseline:
        return NOTHING
    return paired(finals(sweep, arm, key), finals(sweep, sweep.baseline, key))


def domain_keys(sweep: Sweep) -> list[str]:
    """The per-domain keys that any finished run logged, sorted."""
    rows = (row for runs in sweep.runs.values() for run in runs.values() for row in run.metrics)
    return sorted({key for row in rows for key in row if key.startswith(DOMAIN_PREFIX)})


def _summary(sweep: Sweep, arm: str) -> ArmSummary:
    runs = list(sweep.runs[arm].values())
    domains = {key.removeprefix(DOMAIN_PREFIX): key for key in domain_keys(sweep)}

    def last(key: str) -> Interval:
        return interval(final(run, key) for run in runs)

    def tail(key: str) -> Interval:
        return interval(tail_mean(run, key) for run in runs)

    return ArmSummary(
        arm=arm,
        seeds=tuple(sweep.runs[arm]),
        bits_per_byte=last("eval/bits_per_byte"),
        difference=to_baseline(sweep, arm, "eval/bits_per_byte"),
        max_violation=last("eval/max_violation"),
        max_violation_difference=to_baseline(sweep, arm, "eval/max_violation"),
        train_max_violation=tail("moe/max_violation"),
        worst_layer=last("eval/max_violation_worst"),
        dead_experts=interval(dead_at_end(run) for run in runs),
        eval_dead_experts=last("eval/dead_experts"),
        aux_loss=tail("moe/aux_loss"),
        tokens_per_second=_median_speed(runs, "tokens_per_second"),
        gflops_per_second=_median_speed(runs, "gflops_per_second"),
        mfu=_median_speed(runs, "mfu"),
        seconds=_seconds(runs),
        domains={name: last(key) for name, key in domains.items()},
        domain_differences={name: to_baseline(sweep, arm, key) for name, key in domains.items()},
    )
