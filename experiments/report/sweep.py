"""Reads the finished runs of a sweep's folder, and reports every other run.

A run is finished if it was evaluated at the last step of its own config. The other runs, and other irregularities, are
sentences in `Sweep.problems`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import flatten
from moe_jax.runtime.files import read_json
from moe_jax.runtime.log import METRICS, lines_of

STEPS_KEY = "num_steps"
EVALUATED = "eval/bits_per_byte"  # a step was evaluated if its line has this key
NOT_STARTED = "not started (no metrics)."
DOMAIN_PREFIX = "eval/bits_per_byte/"
DAMAGED = "write it again or delete it."


class SweepError(ValueError):
    """A folder that cannot be reported on; the message is a sentence for the user."""


@dataclass(frozen=True)
class Run:
    """One run: one arm with one seed.

    Attributes:
        config: nested, or with dotted keys for a run without config.json.
        info: run.json; empty where there is none.
        metrics: the lines of metrics.jsonl, sorted by step.
    """

    arm: str
    seed: int
    directory: Path
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    metrics: list[dict[str, Any]]

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """A logged value over the run.

        Returns:
            (steps int64[N], values float64[N]) of the lines with the key; null is nan.
        """
        lines = [line for line in self.metrics if key in line]
        steps = np.asarray([line["step"] for line in lines], dtype=np.int64)
        return steps, np.asarray([as_number(line[key]) for line in lines], dtype=np.float64)

    def final(self, key: str) -> float:
        """The value in the last line with the key; nan if no line has it."""
        _, values = self.curve(key)
        return float(values[-1]) if values.size else math.nan


@dataclass(frozen=True)
class Sweep:
    """The plan of a sweep, and its finished runs so far.

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

    @property
    def finished(self) -> list[Run]:
        """Every finished run, arm by arm."""
        return [run for runs in self.runs.values() for run in runs.values()]


def as_number(value: Any) -> float:
    """A logged value as float; null, text and anything that is not a number become nan."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def by_step(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log file by step; a killed run leaves a partial line, and a resumed one may repeat steps.

    Args:
        path: one JSON object per line, each with an integer `step`; may be missing.

    Returns:
        The lines sorted by step, with only the last line of repeated steps; and the number of unreadable lines.
    """
    lines: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in lines_of(path):
        if line is None or not isinstance(line.get("step"), int):
            unreadable += 1
        else:
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)], unreadable


# --- the folder -----------------------------------------------------------------------------------------


def read_sweep(directory: str | Path, baseline: str | None = None) -> Sweep:
    """Read sweep.json and every run that it lists.

    Args:
        directory: holds sweep.json and <arm>/seed<k>/metrics.jsonl.
        baseline: the arm to compare with; None takes the one in sweep.json.

    Returns:
        The sweep with its finished runs, and a sentence for each run that is not finished.

    Raises:
        SweepError: the folder or its sweep.json is missing, or has no arms or seeds, or the baseline is unknown.
    """
    directory = Path(directory)
    spec = _read_plan(directory, baseline)
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


def read_spec(directory: Path) -> dict[str, Any]:
    """The content of a folder's sweep.json.

    Raises:
        SweepError: the folder or the file is missing, or damaged.
    """
    if not directory.is_dir():
        raise SweepError(f"DIR={directory} must be a folder that holds a sweep; it does not exist.")
    path = directory / "sweep.json"
    if not path.is_file():
        raise SweepError(f"DIR={directory} must hold sweep.json; try the folder that ablate wrote.")
    return _read_object(path)


def _read_plan(directory: Path, baseline: str | None) -> dict[str, Any]:
    spec, path = read_spec(directory), directory / "sweep.json"
    if "trunks" in spec:
        raise SweepError(
            f"DIR={directory} holds a branched sweep; give one of its plain ones, such as {directory}/trunks."
        )
    for key in ("arms", "seeds"):
        if not isinstance(spec.get(key), list) or not spec[key]:
            rule = "must be a list with at least one entry; run the sweep again to write it."
            raise SweepError(f"{path}: {key}={spec.get(key)!r} {rule}")
    spec["baseline"] = baseline or spec.get("baseline") or spec["arms"][0]
    if spec["baseline"] not in spec["arms"]:
        rule = f"must be one of the sweep's arms; try one of: {', '.join(map(str, spec['arms']))}."
        raise SweepError(f"baseline={spec['baseline']!r} {rule}")
    return spec


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, DAMAGED)
    except ValueError as error:
        raise SweepError(str(error)) from None


def _read_runs(directory: Path, spec: Mapping[str, Any]) -> list[tuple[Run, int]]:
    """Every run of the sweep, with the number of its unreadable lines."""
    runs = []
    for arm in spec["arms"]:
        for seed in spec["seeds"]:
            folder = directory / arm / f"seed{seed}"
            metrics, unreadable = by_step(folder / METRICS)
            config = _read_object(folder / "config.json") or _overridden(spec, arm)
            runs.append((Run(arm, seed, folder, config, _read_object(folder / "run.json"), metrics), unreadable))
    return runs


def _overridden(spec: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """An arm's config according to sweep.json, with dotted keys, for a run without config.json."""
    return flatten(spec.get("config") or {}) | flatten((spec.get("arms_config") or {}).get(arm) or {})


# --- finished or not ------------------------------------------------------------------------------------


def _finished(read: list[tuple[Run, int]], spec: Mapping[str, Any]) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """Split the runs into the finished ones and sentences about the others."""
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
    """Why a run is not counted; None if it was evaluated at the last step of its own config.

    Args:
        run: the run, finished or not.
        last: the last step of the other runs, for a run whose config lacks the number of steps.
    """
    if not run.metrics:
        return NOT_STARTED
    if why := run.info.get("diverged"):
        return f"diverged ({str(why).partition(';')[0]}); left out of every mean."
    steps = planned_steps(run.config)
    end = last if steps is None else steps - 1
    step = run.metrics[-1]["step"]
    evaluated = _evaluated(run)
    if step < end:
        return f"unfinished (step {step} of {end + 1})."
    if not evaluated or evaluated[-1] < end:
        return f"unfinished (step {step}, no evaluation of it yet)."
    if not math.isfinite(run.final(EVALUATED)):
        return f"diverged (the evaluation at step {evaluated[-1]} is not finite); left out of every mean."
    return None


def planned_steps(config: Mapping[str, Any]) -> int | None:
    """The number of steps in a config, or None if it is missing."""
    steps = as_number(config.get(STEPS_KEY))
    return int(steps) if math.isfinite(steps) else None


def _evaluated(run: Run) -> list[int]:
    return [line["step"] for line in run.metrics if EVALUATED in line]


def _other_data(runs: Mapping[str, Mapping[int, Run]], baseline: str) -> list[str]:
    """A sentence for every run that read other data than the baseline's run with the same seed."""
    problems = []
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            other = runs[baseline].get(seed)
            pair = [corpus_of(one.info) for one in (run, other) if one is not None]
            if all(pair) and len(set(pair)) > 1:
                problems.append(
                    f"{arm}, seed {seed}: read other data than {baseline}; their difference is not due to the arms."
                )
    return problems


def _strangers(directory: Path, spec: Mapping[str, Any]) -> list[str]:
    """A sentence for every run in the folder that is not in sweep.json."""
    named = {(arm, f"seed{seed}") for arm in spec["arms"] for seed in spec["seeds"]}
    found = sorted(path.parent for path in directory.glob(f"*/seed*/{METRICS}"))
    return [
        f"{folder.parent.name}/{folder.name} is not listed in sweep.json and was not read."
        for folder in found
        if (folder.parent.name, folder.name) not in named
    ]


# --- facts about the runs -------------------------------------------------------------------------------


def corpus_of(info: Mapping[str, Any]) -> str:
    """The fingerprint of the data that a run read, from its run.json; empty if the run is older than fingerprints."""
    identity = info.get("identity")
    return str(identity.get("corpus", "")) if isinstance(identity, Mapping) else ""


def domain_keys(sweep: Sweep) -> list[str]:
    """The per-domain keys that any finished run logged, sorted."""
    lines = (line for run in sweep.finished for line in run.metrics)
    return sorted({key for line in lines for key in line if key.startswith(DOMAIN_PREFIX)})
