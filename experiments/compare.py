"""Whether runs were repeated with the same numbers: every run that two folders have, step by step.

    python -m experiments.compare A B [--tolerance=1e-6]

A and B are folders of runs, of sweeps or of the study, or the study's committed archives, which hold float32 values to
6e-8. Runs are the same if they have the same place below A and B. With --tolerance the command ends with status 1
if a number differs by more, in proportion to the larger, or if only one of two runs logged it.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.runtime.log import METRICS

from .report.sweep import as_number, by_step
from .study.archive import opened

KEYS = ("loss", "moe/max_violation", "eval/bits_per_byte", "eval/max_violation")


class Compared(NamedTuple):
    """A run in both folders.

    Attributes:
        name: its place below them.
        steps: that both logged.
        differences: key -> the largest difference at a step, in proportion to the larger value; nan where only one of
            the two logged the key, or one is nan; keys that neither has are missing.
    """

    name: str
    steps: int
    differences: dict[str, float]


def compare(first: Path, second: Path) -> list[Compared]:
    """Compare every run that two folders have, in the order of their places.

    Raises:
        ValueError: they have no run in common.
        SweepError: an archive is damaged.
    """
    with opened(first) as a, opened(second) as b:
        here, there = ({file.parent.relative_to(at).as_posix(): file for file in at.rglob(METRICS)} for at in (a, b))
        common = sorted(here.keys() & there.keys())
        if not common:
            raise ValueError(
                f"{first} has {len(here)} runs and {second} {len(there)}, none at the same place; give the two folders "
                "below which runs have the same names."
            )
        return [_compared(name, here[name], there[name]) for name in common]


def _compared(name: str, first: Path, second: Path) -> Compared:
    a, b = ({line["step"]: line for line in by_step(file)[0]} for file in (first, second))
    steps = sorted(a.keys() & b.keys())
    differences = {}
    for key in KEYS:
        logged = [step for step in steps if key in a[step] or key in b[step]]
        if logged:
            differences[key] = max((_difference(a[step], b[step], key) for step in logged), key=_nan_last)
    return Compared(name, len(steps), differences)


def _difference(a: dict[str, Any], b: dict[str, Any], key: str) -> float:
    if key not in a or key not in b:
        return math.nan
    x, y = as_number(a[key]), as_number(b[key])
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what goes wrong ends it with a sentence."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="a folder of runs or archives")
    parser.add_argument("second", metavar="B", help="another")
    parser.add_argument("--tolerance", type=float, metavar="X", help="the largest relative difference that passes")
    options = parser.parse_args(arguments)
    print_any_name()
    try:
        found = compare(path_of(options.first, "A"), path_of(options.second, "B"))
    except (ValueError, OSError) as error:
        fail(str(error))
    table = Table("run", "steps", *KEYS, caption="largest relative difference over the steps that both logged")
    for one in found:
        cells = (f"{one.differences[key]:.1e}" if key in one.differences else "-" for key in KEYS)
        table.add_row(one.name, str(one.steps), *cells)
    Console().print(table)
    largest = max((value for one in found for value in one.differences.values()), key=_nan_last, default=math.nan)
    print(f"{len(found)} runs in common; the largest relative difference is {largest:.1e}")
    # not >, because nan compares as False
    if options.tolerance is not None and not largest <= options.tolerance:
        fail(f"the numbers differ by more than --tolerance={options.tolerance:g}.", status=1)


if __name__ == "__main__":
    main()
