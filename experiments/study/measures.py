"""The numbers of claims: each measure reads finished runs of one table and gives one number per block.

A block is a trunk seed of a branched sweep, or a seed of a plain one; its interval is the t-interval of the blocks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..report.branched import Branched
from ..report.sweep import Run, Sweep
from ..statistics import blocks
from ..statistics.blocks import Blocks, Branch
from ..statistics.intervals import Interval, interval

QUALITY = "eval/bits_per_byte"
BALANCE = "eval/max_violation"
SEQUENCE = "eval/sequence_max_violation"

Tables = Mapping[str, Sweep | Branched]
Number = Callable[[Run], float]


@dataclass(frozen=True)
class Found:
    """A measured number.

    Attributes:
        blocks: seed of the block -> its number.
        runs: folders of the runs that it came from.
        missing: why there is no number; empty if there is one.
    """

    blocks: Mapping[int, float] = field(default_factory=dict)
    runs: Sequence[Path] = ()
    missing: str = ""

    @property
    def interval(self) -> Interval:
        """Mean over the blocks and 95 % t-interval."""
        return interval(self.blocks.values())


Measure = Callable[[Tables], Found]


def last(key: str) -> Number:
    """A run's last value of a logged key."""
    return lambda run: run.final(key)


def log(number: Number) -> Number:
    """The natural logarithm of a run's number, so that differences are ratios; nan unless it is positive."""

    def of(run: Run) -> float:
        value = number(run)
        return math.log(value) if value > 0 else math.nan

    return of


def tail(key: str) -> Number:
    """The mean of a logged value over the last quarter of a run's lines with the key."""

    def of(run: Run) -> float:
        _, values = run.curve(key)
        finite = values[np.isfinite(values)]
        return float(finite[-max(1, len(finite) // 4) :].mean()) if len(finite) else math.nan

    return of


# --- one table --------------------------------------------------------------------------------------------


def level(table: str, arm: str, number: Number, trunk: str | None = None) -> Measure:
    """The mean of an arm; of a branched sweep over all trunk methods, or over the trunks of one."""

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm], number)
        cells: dict[tuple[str, int], list[float]] = {}
        for branch, value in values.items():
            if trunk in (None, branch.trunk):
                cells.setdefault((branch.trunk, branch.trunk_seed), []).append(value)
        methods = {method for method, _ in cells}
        seeds = sorted({seed for _, seed in cells})
        found = {s: fmean(fmean(cells[m, s]) for m in methods) for s in seeds if all((m, s) in cells for m in methods)}
        return _found(found, [runs[b] for b in values if trunk in (None, b.trunk)], table, [arm])

    return measure


def effect(table: str, arm: str, baseline: str, number: Number, trunk: str | None = None) -> Measure:
    """Arm minus baseline between branches of the same trunk and data; in a plain sweep between runs of one seed."""

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm, baseline], number)
        if trunk is None:
            found = blocks.effect(values, arm, baseline)
        else:
            found = blocks.effect_on(values, arm, baseline, trunk)
        return _of_blocks(found, values, runs, table, [arm, baseline], trunk)

    return measure


def favour(table: str, arm: str, baseline: str, number: Number) -> Measure:
    """The effect on trunks of the arm's own method minus the effect on the others."""

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm, baseline], number)
        return _of_blocks(blocks.favour(values, arm, baseline), values, runs, table, [arm, baseline])

    return measure


def unequal(table: str, arm: str, other: str, trunks: Iterable[str]) -> Measure:
    """The number of branches whose last evaluation differs between two arms, in any digit of any measure."""
    trunks = set(trunks)

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm, other], lambda run: 0.0)
        found: dict[int, float] = {}
        used = []
        for branch in values:
            pair = branch._replace(arm=other)
            if branch.arm == arm and pair in runs and branch.trunk in trunks:
                used += [runs[branch], runs[pair]]
                differs = _evaluation(runs[branch]) != _evaluation(runs[pair])
                found[branch.trunk_seed] = found.get(branch.trunk_seed, 0.0) + differs
        return _found(found, used, table, [arm, other])

    return measure


def rank_correlation(first: Mapping[str, Measure], second: Mapping[str, Measure]) -> Measure:
    """Spearman's correlation over arms between two measures of each arm, in every block; in [-1, 1]."""

    def measure(tables: Tables) -> Found:
        from scipy import stats

        pairs = [(first[arm](tables), second[arm](tables)) for arm in first]
        for found in (one for pair in pairs for one in pair):
            if found.missing:
                return found
        seeds = set.intersection(*(set(one.blocks) for pair in pairs for one in pair if one.blocks))
        values = {}
        for seed in sorted(seeds):
            xs = [x.blocks[seed] for x, _ in pairs]
            ys = [y.blocks[seed] for _, y in pairs]
            values[seed] = float(stats.spearmanr(xs, ys).statistic)
        return Found(values, [folder for _, y in pairs for folder in y.runs])

    return measure


def constant(value: float, like: Measure) -> Measure:
    """A number that is known beforehand, in the blocks of another measure."""

    def measure(tables: Tables) -> Found:
        found = like(tables)
        return found if found.missing else Found(dict.fromkeys(found.blocks, value))

    return measure


# --- several measures -------------------------------------------------------------------------------------


def minus(first: Measure, second: Measure) -> Measure:
    """The difference of two measures, block by block."""

    def measure(tables: Tables) -> Found:
        pair = first(tables), second(tables)
        for found in pair:
            if found.missing:
                return found
        common = sorted(pair[0].blocks.keys() & pair[1].blocks.keys())
        return Found({s: pair[0].blocks[s] - pair[1].blocks[s] for s in common}, [*pair[0].runs, *pair[1].runs])

    return measure


def from_file(table: str, arm: str, file: str, number: Callable[[Any], float], trunk: str | None = None) -> Measure:
    """A number of the JSON file that a command wrote into each of an arm's runs, or into the trunks of that name."""

    def measure(tables: Tables) -> Found:
        sweep = tables.get(table)
        if isinstance(sweep, Branched):
            sweep = sweep.trunks
        runs = sweep.runs.get(arm, {}) if sweep else {}
        found = {seed: number(content) for seed, run in runs.items() if (content := _json(run.directory / file))}
        return _found(found, [runs[seed] for seed in found], table, [arm], f" with {file}")

    return measure


def of_trunks(table: str, arm: str, number: Number) -> Measure:
    """The mean of a trunk method of a branched sweep at the step of branching."""

    def measure(tables: Tables) -> Found:
        sweep = tables.get(table)
        runs = sweep.trunks.runs.get(arm, {}) if isinstance(sweep, Branched) else {}
        found = {seed: value for seed, run in runs.items() if math.isfinite(value := number(run))}
        return _found(found, [runs[seed] for seed in found], table, [f"trunk {arm}"])

    return measure


# --- reading ----------------------------------------------------------------------------------------------


def _values(
    tables: Tables, table: str, arms: Sequence[str], number: Number
) -> tuple[dict[Branch, float], dict[Branch, Run]]:
    """The finite numbers of the arms' finished runs; a seed of a plain sweep is a trunk seed with one branch."""
    sweep = tables.get(table)
    if isinstance(sweep, Branched):
        runs = {branch: run for branch, run in sweep.runs.items() if branch.arm in arms}
    else:
        by_arm = sweep.runs if sweep else {}
        runs = {Branch("", seed, arm, 0): run for arm in arms for seed, run in by_arm.get(arm, {}).items()}
    values = {branch: value for branch, run in runs.items() if math.isfinite(value := number(run))}
    return values, runs


def _of_blocks(
    found: Blocks,
    values: Mapping[Branch, float],
    runs: Mapping[Branch, Run],
    table: str,
    arms: Sequence[str],
    trunk: str | None = None,
) -> Found:
    used = [runs[b] for b in values if b.trunk_seed in found.blocks and trunk in (None, b.trunk)]
    return _found(found.blocks, used, table, arms)


def _found(found: Mapping[int, float], runs: Iterable[Run], table: str, arms: Sequence[str], what: str = "") -> Found:
    if not found:
        return Found(missing=f"{table} has no finished runs of {' and '.join(arms)}{what}")
    return Found(dict(found), [run.directory for run in runs])


def _evaluation(run: Run) -> dict[str, Any]:
    """What the last evaluation of a run logged."""
    lines = [line for line in run.metrics if QUALITY in line]
    return {key: value for key, value in lines[-1].items() if key.startswith("eval/")}


def _json(path: Path) -> Any:
    import json

    return json.loads(path.read_text()) if path.is_file() else None
