"""`python -m experiments.power DIR [--difference=0.001] [--json=FILE]`: what a sweep resolves, and what it would take.

For every pair of arms of a plain or branched sweep: the spread of the paired differences in held-out bits per byte and
its components, the smallest difference that the runs in DIR resolve, and the seeds, or trunk seeds x data seeds, that
resolve the given one. Resolved: the 95 % t-interval excludes 0 in 80 % of such sweeps.

The spread is itself an estimate: numbers in brackets are for the ends of its 95 % interval (normal differences).
"""

import argparse
import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.runtime.files import output_of, write_json

from .report import is_branched, read_branched, read_sweep
from .report.branched import Branched
from .report.columns import QUALITY
from .report.numbers import for_programs
from .report.sweep import Run, Sweep, SweepError, planned_steps
from .statistics.blocks import effect, pairs
from .statistics.components import Components, Spread, components, spread
from .statistics.power import MOST, needed, smallest

if TYPE_CHECKING:
    from rich.console import Console

DATA_SEEDS = (1, 2, 4, 8)  # for which a branched sweep's trunk seeds are computed
TOKENS = (
    "Held-out tokens: the noise from their finite number cannot be estimated, because the logs have sums over all "
    "held-out tokens only. Arms of one sweep are evaluated on the same tokens."
)


@dataclass(frozen=True)
class Design:
    """A size of sweep that resolves the difference.

    Attributes:
        data_seeds: per trunk; 0 for a plain sweep.
        seeds: seeds, or trunk seeds, at the estimated spread; None if above `MOST` or not known.
        low, high: the same at the ends of the spread's interval.
        steps: training steps of the whole sweep with all its arms and trunk methods; None if not known.
    """

    data_seeds: int
    seeds: int | None
    low: int | None
    high: int | None
    steps: int | None


@dataclass(frozen=True)
class Pair:
    """Two arms of a sweep. All numbers in bits per byte but counts; nan where the runs do not determine one.

    Attributes:
        difference: the mean of arm minus other.
        n: paired seeds, or blocks.
        sd: of the n differences, with the ends of its 95 % interval.
        parts: the standard deviations of its components, by name.
        resolves: the smallest difference that n resolve.
        designs: what resolves the requested difference.
    """

    arm: str
    other: str
    difference: float
    n: int
    sd: Spread
    parts: dict[str, float]
    resolves: float
    designs: list[Design]


# --- plain sweeps -------------------------------------------------------------------------------------------


def plain_pairs(sweep: Sweep, difference: float) -> list[Pair]:
    """Every pair of arms of a plain sweep.

    Components: y[arm, seed] = mean of arm + seed + run; the difference of two arms has twice the variance of `run`.
    """
    numbers = {
        arm: {s: v for s, r in runs.items() if math.isfinite(v := QUALITY.of(r))} for arm, runs in sweep.runs.items()
    }
    steps = _steps(sweep.finished)
    found = []
    for other, arm in itertools.combinations(sweep.arms, 2):
        both = sorted(numbers[arm].keys() & numbers[other].keys())
        values = np.asarray([[numbers[name][seed] for seed in both] for name in (arm, other)]).reshape(2, -1)
        differences = values[0] - values[1]
        sd = spread(differences)
        shared = math.sqrt(max(float(np.cov(values)[0, 1]), 0.0)) if len(both) > 1 else math.nan
        mean = float(differences.mean()) if both else math.nan
        parts = {"seed": shared, "run": sd.sd / math.sqrt(2)}
        design = _design(0, difference, sd, None if steps is None else steps * len(sweep.arms))
        found.append(Pair(arm, other, mean, len(both), sd, parts, smallest(len(both), sd.sd), [design]))
    return found


# --- branched sweeps ----------------------------------------------------------------------------------------


def branched_pairs(sweep: Branched, difference: float) -> list[Pair]:
    """Every pair of arms of a branched sweep; see `statistics/components.py` for the components."""
    values = sweep.values(QUALITY)
    found = []
    for other, arm in itertools.combinations(sweep.arms, 2):
        blocks = effect(values, arm, other)
        parts = components(pairs(values, arm, other))
        named = {"block": parts.block, "trunk": parts.trunk, "noise": parts.noise}
        designs = [_branched_design(sweep, parts, seeds, difference) for seeds in DATA_SEEDS]
        n = len(blocks.blocks)
        resolves = smallest(n, parts.of_blocks.sd)
        found.append(Pair(arm, other, blocks.interval.mean, n, parts.of_blocks, named, resolves, designs))
    return found


def _branched_design(sweep: Branched, parts: Components, data_seeds: int, difference: float) -> Design:
    sd, now = parts.with_seeds(data_seeds), parts.of_blocks
    scale = sd / now.sd if now.sd else 1.0
    of_trunk, of_branch = _steps(sweep.trunks.finished), _steps(list(sweep.runs.values()))
    steps = None
    if of_branch is not None and of_trunk is not None:
        steps = len(sweep.trunks.arms) * (of_trunk + len(sweep.arms) * data_seeds * (of_branch - sweep.at))
    return _design(data_seeds, difference, Spread(sd, now.low * scale, now.high * scale, now.n), steps)


def _design(data_seeds: int, difference: float, sd: Spread, steps_per_seed: int | None) -> Design:
    seeds, low, high = (needed(difference, value) for value in (sd.sd, sd.low, sd.high))
    return Design(data_seeds, seeds, low, high, seeds * steps_per_seed if seeds and steps_per_seed else None)


def _steps(runs: list[Run]) -> int | None:
    """The number of steps of the runs' configs, the largest if they differ."""
    return max((steps for run in runs if (steps := planned_steps(run.config)) is not None), default=None)


# --- output -------------------------------------------------------------------------------------------------


def print_pairs(found: Iterable[Pair], difference: float, title: str, console: "Console") -> None:
    """Print a table with a row for each pair, and for branched sweeps one for each number of data seeds."""
    from rich.table import Table
    from rich.text import Text

    found = list(found)
    parts = list(found[0].parts)
    branched = found[0].designs[0].data_seeds > 0
    what = "trunk seeds x data seeds" if branched else "seeds"
    table = Table(title=Text(title))
    for header in ("pair", "n", "difference", "sd", *parts, "resolves now", f"{what} for {difference:g}"):
        table.add_column(Text(header), justify="left" if header == "pair" else "right", overflow="fold")
    for pair in found:
        spread_text = f"{_number(pair.sd.sd)}\n({_number(pair.sd.low)} to {_number(pair.sd.high)})"
        cells = [f"{pair.arm} - {pair.other}", str(pair.n), f"{pair.difference:+.5f}" if pair.n else "-", spread_text]
        cells += [_number(pair.parts[name]) for name in parts]
        designs = "\n".join(_design_text(design) for design in pair.designs)
        table.add_row(*map(Text, [*cells, _number(pair.resolves), designs]))
    console.print(table)


def _design_text(design: Design) -> str:
    text = _count(design.seeds) + (f" x {design.data_seeds}" if design.data_seeds else "")
    if design.seeds is None:
        return text
    steps = f", {design.steps:,} steps" if design.steps else ""
    return f"{text} ({_count(design.low)} to {_count(design.high)}){steps}"


def _count(seeds: int | None) -> str:
    return "?" if seeds is None else f"{seeds:,}"


def _number(value: float) -> str:
    return f"{value:.5f}" if math.isfinite(value) else "-"


def notes(branched: bool) -> list[str]:
    """What the table's columns mean, a sentence or two each."""
    words = (
        "sd: between the block means, one per trunk seed. Components: block, shared by the trunks of a trunk seed; "
        "trunk, shared by the branches of a trunk; noise, between data seeds. Steps: of all trunks and branches."
        if branched
        else "sd: between the paired differences. Components: seed, which both arms share and pairing removes; run, of "
        "one run. Steps: of all runs of the sweep."
    )
    return [
        f"{words} In brackets: for the ends of the 95 % interval of the sd. ?: above {MOST:,}, or the runs do not "
        "determine it (-).",
        TOKENS,
    ]


def as_json(found: Iterable[Pair], difference: float, branched: bool, directory: Path) -> dict[str, Any]:
    """The same numbers for programs; null for a number that is not known."""
    return {
        "directory": str(directory),
        "branched": branched,
        "measure": QUALITY.title,
        "difference": difference,
        "tokens": None,
        "notes": notes(branched),
        "pairs": for_programs([asdict(pair) | {"sd": pair.sd._asdict()} for pair in found]),
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command. Bad input ends it with a sentence on standard error and status 2."""
    from rich.console import Console
    from rich.text import Text

    options = _parser().parse_args(argv)
    print_any_name()
    try:
        if not (math.isfinite(options.difference) and options.difference > 0):
            raise ValueError(f"--difference={options.difference:g} must be above 0 bits per byte; try 0.001.")
        directory = path_of(options.directory, "DIR")
        output = output_of(options.json, "--json") if options.json else None
        branched = is_branched(directory)
        sweep: Sweep | Branched = read_branched(directory) if branched else read_sweep(directory)
        if len(sweep.arms) < 2:
            raise SweepError(f"DIR={directory} must have at least two arms to compare; it has {sweep.arms[0]} only.")
        found = (
            branched_pairs(sweep, options.difference)
            if isinstance(sweep, Branched)
            else plain_pairs(sweep, options.difference)
        )
        if output is not None:
            write_json(output, as_json(found, options.difference, branched, directory))
    except (ValueError, OSError) as error:
        fail(str(error))
    console = Console(width=140)
    print_pairs(found, options.difference, f"{sweep.name}: {QUALITY.title}", console)
    for note in notes(branched) + sweep.problems:
        console.print(Text(f"! {note}" if note in sweep.problems else note))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.power",
        description="What a plain or branched sweep resolves in held-out bits per byte, and what it would take to "
        "resolve a given difference: 95 % intervals, power 0.8.",
    )
    parser.add_argument("directory", metavar="DIR", help="folder with sweep.json and the runs")
    parser.add_argument("--difference", type=float, default=0.001, help="in bits per byte (0.001)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to a file")
    return parser


if __name__ == "__main__":
    main()
