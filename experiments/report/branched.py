"""Reads a branched sweep from its logs: the trunks, and the branches of each trunk, as plain sweeps.

    DIR/sweep.json, DIR/trunks/<method>/seed<k>/, DIR/branches/<method>/seed<k>/<arm>/seed<j>/

Needs metrics.jsonl, config.json, run.json and sweep.json, and neither checkpoints nor data.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..statistics.blocks import Branch, shared_seeds
from .columns import Column
from .sweep import NOT_STARTED, Run, Sweep, SweepError, read_spec, read_sweep


@dataclass(frozen=True)
class Branched:
    """The plan of a branched sweep, and what is finished of it.

    Attributes:
        at: the step of branching.
        trunks: the plain sweep of the trunks; its arms are the trunk methods.
        parts: (trunk method, trunk seed) -> the plain sweep of that trunk's branches.
        arms: of the branches.
        baseline: the arm with which the others are compared.
        config: the base config, nested.
        arms_config, trunks_config: arm or trunk method -> the dotted keys it changes.
        problems: a sentence for each trunk and branch that is not finished, or partly unreadable.
    """

    directory: Path
    name: str
    description: str
    command: str
    at: int
    trunks: Sweep
    parts: dict[tuple[str, int], Sweep]
    arms: list[str]
    baseline: str
    config: Mapping[str, Any]
    arms_config: Mapping[str, Mapping[str, Any]]
    trunks_config: Mapping[str, Mapping[str, Any]]
    problems: list[str] = field(default_factory=list)

    @property
    def runs(self) -> dict[Branch, Run]:
        """Every finished branch by its name; `Run.directory` is the folder that its numbers come from."""
        return {
            Branch(trunk, trunk_seed, arm, seed): run
            for (trunk, trunk_seed), part in self.parts.items()
            for arm, runs in part.runs.items()
            for seed, run in runs.items()
        }

    @property
    def num_planned(self) -> int:
        """The number of branches that the sweep lists."""
        return sum(len(part.arms) * len(part.seeds) for part in self.parts.values())

    def values(self, column: Column) -> dict[Branch, float]:
        """A column's number of every finished branch that logged it."""
        found = {branch: column.of(run) for branch, run in self.runs.items()}
        return {branch: value for branch, value in found.items() if math.isfinite(value)}


def is_branched(directory: str | Path) -> bool:
    """Whether a folder's sweep.json is that of a branched sweep.

    Raises:
        SweepError: the folder or its sweep.json is missing, or it cannot be read.
    """
    return "trunks" in read_spec(Path(directory))


def read_branched(directory: str | Path, baseline: str | None = None) -> Branched:
    """Read the sweep.json of a branched sweep, its trunks and all branches.

    Args:
        directory: the folder that ablate wrote.
        baseline: the arm to compare with; None takes the one in sweep.json.

    Raises:
        SweepError: the folder is not a branched sweep, a part of it is missing, or the baseline is unknown.
    """
    directory = Path(directory)
    spec = read_spec(directory)
    if "trunks" not in spec:
        raise SweepError(f"DIR={directory} must hold a branched sweep; it holds a plain one, which read_sweep reads.")
    named = spec.get("parts")
    if not isinstance(named, list) or not named or not all(isinstance(p, list) and len(p) == 2 for p in named):
        raise SweepError(
            f"{directory / 'sweep.json'}: parts={named!r} must be a list of [trunk method, trunk seed]; run the sweep "
            "again to write it."
        )
    trunks = read_sweep(directory / "trunks")
    parts = {(m, s): read_sweep(directory / "branches" / m / f"seed{s}", baseline) for m, s in named}
    first = next(iter(parts.values()))
    problems = [f"trunk {problem}" for problem in trunks.problems]
    problems += _of_branches(parts)
    found = Branched(
        directory=directory,
        name=str(spec.get("name") or directory.name),
        description=str(spec.get("description") or ""),
        command=str(spec.get("command") or ""),
        at=spec.get("at", 0),
        trunks=trunks,
        parts=parts,
        arms=list(dict.fromkeys(arm for part in parts.values() for arm in part.arms)),
        baseline=first.baseline,
        config=spec.get("config") or {},
        arms_config=spec.get("arms_config") or {},
        trunks_config=spec.get("trunks_config") or {},
    )
    found.problems.extend(problems + _remarks(found))
    return found


def _of_branches(parts: Mapping[tuple[str, int], Sweep]) -> list[str]:
    """What is wrong with branches, each with its trunk; an arm of which none is started is one sentence."""
    not_started = {
        arm: [
            f"trunk {m}, seed {s}: {arm}, seed {seed}: {NOT_STARTED}"
            for (m, s), part in parts.items()
            for seed in part.seeds
        ]
        for arm in dict.fromkeys(arm for part in parts.values() for arm in part.arms)
    }
    problems = [f"trunk {m}, seed {s}: {problem}" for (m, s), part in parts.items() for problem in part.problems]
    waiting = {arm: lines for arm, lines in not_started.items() if len(lines) > 1 and set(lines) <= set(problems)}
    skipped = {line for lines in waiting.values() for line in lines}
    return [line for line in problems if line not in skipped] + [
        f"{arm}: its {len(lines)} branches are not started." for arm, lines in waiting.items()
    ]


def _remarks(sweep: Branched) -> list[str]:
    """What limits the intervals: shared data seeds."""
    shared = shared_seeds(sweep.runs)
    if not shared:
        return []
    return [
        f"Trunk seeds share data seeds ({', '.join(map(str, shared))}), so the intervals of effects hold for other "
        "trunk seeds, but not for other orders of the data."
    ]
