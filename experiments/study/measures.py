"""The numbers of claims: each measure reads finished runs of one table and gives one number per block.

A block is a trunk seed of a branched sweep, or a seed of a plain one; its interval is the t-interval of the blocks.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from moe_jax.runtime.files import read_json

from ..report.branched import Branched
from ..report.sweep import DAMAGED, Run, Sweep
from ..statistics import blocks
from ..statistics.blocks import Branch
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
        runs: folders of the runs that it came from, each once.
        missing: why there is no number; empty if there is one.
        planned: the number of blocks that the table lists.
    """

    blocks: Mapping[int, float] = field(default_factory=dict)
    runs: Sequence[Path] = ()
    missing: str = ""
    planned: int = 0

    @property
    def interval(self) -> Interval:
        """Mean over the blocks and 95 % t-interval."""
        return interval(self.blocks.values())


Measure = Callable[[Tables], Found]


def log(number: Number) -> Number:
    """The natural logarithm of a run's number, so that differences are ratios; nan unless it is positive."""

    def of(run: Run) -> float:
        value = number(run)
        return math.log(value) if value > 0 else math.nan

    return of


# --- one table --------------------------------------------------------------------------------------------


def level(table: str, arm: str, number: Number, trunk: str | None = None) -> Measure:
    """The mean of an arm; of a branched sweep over all trunk methods, or over the trunks of one."""

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm], number)
        methods = _methods(tables, table) if trunk is None else [trunk]
        cells: dict[tuple[str, int], list[float]] = {}
        for branch, value in values.items():
            cells.setdefault((branch.trunk, branch.trunk_seed), []).append(value)
        whole = blocks.complete(cells, methods)
        found = {seed: fmean(fmean(cells[method, seed]) for method in methods) for seed in whole}
        used = [runs[b] for b in values if b.trunk in methods and b.trunk_seed in found]
        return _found(tables, table, [arm], found, used, runs)

    return measure


def effect(table: str, arm: str, baseline: str, number: Number, trunk: str | None = None) -> Measure:
    """Arm minus baseline between branches of the same trunk and data; in a plain sweep between runs of one seed."""

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm, baseline], number)
        if trunk is not None:
            found = blocks.effect_on(values, arm, baseline, trunk).blocks
            values = {branch: value for branch, value in values.items() if branch.trunk == trunk}
        elif _on_every_method(tables, table, values):
            found = blocks.effect(values, arm, baseline).blocks
        else:
            found = {}
        return _found(tables, table, [arm, baseline], found, _paired(values, runs, arm, baseline, found), runs)

    return measure


def favour(table: str, arm: str, baseline: str, number: Number) -> Measure:
    """The effect on trunks of the arm's own method minus the effect on the others."""

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm, baseline], number)
        whole = _on_every_method(tables, table, values)
        found = blocks.favour(values, arm, baseline).blocks if whole else {}
        return _found(tables, table, [arm, baseline], found, _paired(values, runs, arm, baseline, found), runs)

    return measure


def unequal(table: str, arm: str, other: str, trunks: Iterable[str]) -> Measure:
    """The number of branches whose last evaluation differs between two arms, in any digit of any measure.

    Compared are the measures that both log: of a bias alone, some exist only where there is one.
    """
    trunks = set(trunks)

    def measure(tables: Tables) -> Found:
        values, runs = _values(tables, table, [arm, other], lambda run: 0.0)
        found: dict[int, float] = {}
        used = []
        for branch in values:
            pair = branch._replace(arm=other)
            if branch.arm == arm and pair in runs and branch.trunk in trunks:
                used += [runs[branch], runs[pair]]
                differs = _differ(_evaluation(runs[branch]), _evaluation(runs[pair]))
                found[branch.trunk_seed] = found.get(branch.trunk_seed, 0.0) + differs
        return _found(tables, table, [arm, other], found, used, runs)

    return measure


def rank_correlation(first: Mapping[str, Measure], second: Mapping[str, Measure]) -> Measure:
    """Spearman's correlation over arms between two measures of each arm, in every block; in [-1, 1]."""

    def measure(tables: Tables) -> Found:
        from scipy import stats

        pairs = [(first[arm](tables), second[arm](tables)) for arm in first]
        every = [one for pair in pairs for one in pair]
        values = {}
        for seed in _common(every):
            xs = [x.blocks[seed] for x, _ in pairs]
            ys = [y.blocks[seed] for _, y in pairs]
            if len(set(xs)) > 1 and len(set(ys)) > 1:  # equal numbers have no order
                values[seed] = float(stats.spearmanr(xs, ys).statistic)
        return _combined(every, values)

    return measure


def constant(value: float, like: Measure) -> Measure:
    """A number that is known beforehand, in the blocks of another measure."""

    def measure(tables: Tables) -> Found:
        found = like(tables)
        return replace(found, blocks=dict.fromkeys(found.blocks, value))

    return measure


# --- several measures -------------------------------------------------------------------------------------


def minus(first: Measure, second: Measure) -> Measure:
    """The difference of two measures, block by block."""

    def measure(tables: Tables) -> Found:
        pair = first(tables), second(tables)
        return _combined(pair, {s: pair[0].blocks[s] - pair[1].blocks[s] for s in _common(pair)})

    return measure


def from_file(table: str, arm: str, file: str, number: Callable[[Any], float]) -> Measure:
    """A number of the JSON file that a command wrote into each of an arm's runs, or into the trunks of that name."""

    def measure(tables: Tables) -> Found:
        sweep = tables.get(table)
        if isinstance(sweep, Branched):
            sweep = sweep.trunks
        runs = sweep.runs.get(arm, {}) if sweep else {}
        read = {seed: content for seed, run in runs.items() if (content := read_json(run.directory / file, DAMAGED))}
        found = {seed: value for seed, content in read.items() if math.isfinite(value := number(content))}
        planned = len(sweep.seeds) if sweep else 0
        if not found:
            return Found(missing=f"{table}: no finished run of {arm} has {file} with this number", planned=planned)
        return Found(found, [runs[seed].directory for seed in found], planned=planned)

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


def _methods(tables: Tables, table: str) -> list[str]:
    """The trunk methods that a table plans; a plain sweep has one, which is ""."""
    sweep = tables.get(table)
    return sweep.trunks.arms if isinstance(sweep, Branched) else [""]


def _on_every_method(tables: Tables, table: str, values: Iterable[Branch]) -> bool:
    """Whether trunks of every planned method have numbers; a mean over some of them would be another quantity."""
    return set(_methods(tables, table)) <= set(blocks.trunks_of(values))


def _paired(
    values: Mapping[Branch, float], runs: Mapping[Branch, Run], arm: str, baseline: str, seeds: Collection[int]
) -> list[Run]:
    """The runs of both arms that have a number in both, in the blocks of the seeds."""
    pairs = [(b, b._replace(arm=baseline)) for b in values if b.arm == arm and b.trunk_seed in seeds]
    return [runs[branch] for pair in pairs if pair[1] in values for branch in pair]


def _found(
    tables: Tables,
    table: str,
    arms: Sequence[str],
    found: Mapping[int, float],
    used: Iterable[Run],
    runs: Mapping[Branch, Run],
) -> Found:
    """The measured number, or a sentence about the runs that are missing.

    Args:
        tables: all tables.
        table: the name of the one that was read.
        arms: what was read of it.
        found: seed of the block -> number.
        used: the runs that the numbers came from.
        runs: all finished runs of the arms.
    """
    sweep = tables.get(table)
    planned = 0
    if sweep is not None:
        planned = len(sweep.trunks.seeds if isinstance(sweep, Branched) else sweep.seeds)
    if found:
        return Found(dict(found), [run.directory for run in used], planned=planned)
    lacking = [arm for arm in arms if not any(branch.arm == arm for branch in runs)]
    if lacking:
        return Found(missing=f"{table}: no finished run of {' and '.join(lacking)}", planned=planned)
    seeds = "trunk seed has, on the trunks of every method," if isinstance(sweep, Branched) else "seed has"
    return Found(missing=f"{table}: no {seeds} a number of {' and '.join(arms)}", planned=planned)


def _common(every: Iterable[Found]) -> list[int]:
    """The blocks that every measure has."""
    return sorted(set.intersection(*(set(found.blocks) for found in every)))


def _combined(every: Sequence[Found], values: Mapping[int, float]) -> Found:
    """A number that was computed from several; what the first of them misses, if there is none."""
    planned = min(found.planned for found in every)
    if not values:
        why = next((found.missing for found in every if found.missing), "no block has all of the numbers")
        return Found(missing=why, planned=planned)
    return Found(values, list(dict.fromkeys(run for found in every for run in found.runs)), planned=planned)


def _evaluation(run: Run) -> dict[str, Any]:
    """What the last evaluation of a run logged."""
    lines = [line for line in run.metrics if QUALITY in line]
    return {key: value for key, value in lines[-1].items() if key.startswith("eval/")}


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(one[key] != other[key] for key in one.keys() & other.keys())
