"""The tables of a report as text: each row of `COLUMNS` is a number that the report shows, and where it shows it.

To add a column, pass one more row: `main(columns=[*COLUMNS, Column(...)])`, as in docs/examples/column.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moe_jax.runtime.ledger import KINDS

from ..statistics.intervals import NOTHING, Interval, interval, middle, paired
from .numbers import dead_at_end, last, seconds_of, tail, typical
from .sweep import DOMAIN_PREFIX, EVALUATED, Run, Sweep, domain_keys

PAGE = ("page",)
EVERYWHERE = ("page", "terminal")  # a terminal has room for only a few
TIME = ("time",)  # the page's table of where the time went


@dataclass(frozen=True)
class Column:
    """A number of every finished run, and how a cell of a table shows it for the seeds of an arm.

    Attributes:
        title: the heading, which is unique.
        digits: decimals.
        of: finished run -> number, nan if the run did not log it.
        shown: any of "page", "terminal" and "time".
        compared: show the mean with its interval, and below it the paired difference to the baseline; if False, show
            only the median, for numbers that depend on the machine.
    """

    title: str
    digits: int
    of: Callable[[Run], float]
    shown: tuple[str, ...] = PAGE
    compared: bool = True


QUALITY = Column("bits per byte, held out", 4, last(EVALUATED), EVERYWHERE)
BALANCE = Column("max violation, held out", 3, last("eval/max_violation"), EVERYWHERE)
COLUMNS = (
    QUALITY,
    BALANCE,
    Column("max violation, training", 3, tail("moe/max_violation")),
    Column("worst layer, held out", 3, last("eval/max_violation_worst")),
    Column("dead experts, end of training", 1, dead_at_end, EVERYWHERE),
    Column("dead experts, held out", 1, last("eval/dead_experts")),
    Column("aux loss (1 = even)", 3, tail("moe/aux_loss")),
    Column("tokens/s", 0, typical("tokens_per_second"), EVERYWHERE, compared=False),
    Column("GFLOP/s", 1, typical("gflops_per_second"), TIME, compared=False),
    Column("MFU, %", 1, typical("mfu", 100.0), TIME, compared=False),
)


class Measured(NamedTuple):
    """A column's number for one arm.

    Attributes:
        value: mean or median over its seeds; n = 0 if no seed has the number.
        difference: paired, arm minus baseline; n = 0 for the baseline itself and for columns without comparison.
    """

    value: Interval
    difference: Interval


def measure(sweep: Sweep, column: Column) -> dict[str, Measured]:
    """A column's number for every arm."""
    numbers = {arm: {seed: column.of(run) for seed, run in runs.items()} for arm, runs in sweep.runs.items()}
    if not column.compared:
        return {arm: Measured(middle(own.values()), NOTHING) for arm, own in numbers.items()}
    base = numbers[sweep.baseline]
    return {
        arm: Measured(interval(own.values()), NOTHING if arm == sweep.baseline else paired(own, base))
        for arm, own in numbers.items()
    }


# --- text -----------------------------------------------------------------------------------------------


def show(value: Interval, digits: int, signed: bool = False) -> str:
    """An interval as text: `1.2345 ± 0.0021`, `± n/a` for one seed, `-` for none.

    Args:
        value: the interval.
        digits: decimals of both numbers.
        signed: write + for a positive mean, and mark an interval that excludes 0 with `*`.
    """
    if value.n == 0:
        return "-"
    text = f"{value.mean:+,.{digits}f}" if signed else f"{value.mean:,.{digits}f}"
    if value.half is None:
        return f"{text} ± n/a"
    return f"{text} ± {value.half:,.{digits}f}" + (" *" if signed and value.excludes_zero else "")


def cell(column: Column, measured: Measured) -> str:
    """One or two lines: the value, and below it the paired difference, if any."""
    value, difference = measured
    if not column.compared:
        return f"{value.mean:,.{column.digits}f}" if value.n else "-"
    below = f"\n{show(difference, column.digits, signed=True)}" if difference.n else ""
    return show(value, column.digits) + below


class Table(NamedTuple):
    """A table as text, with a row per arm that starts with its name; a line break separates value and difference."""

    headers: list[str]
    rows: list[list[str]]


def _table(sweep: Sweep, columns: Iterable[Column]) -> Table:
    columns = list(columns)
    measured = [measure(sweep, column) for column in columns]
    rows = [[arm, *(cell(c, found[arm]) for c, found in zip(columns, measured, strict=True))] for arm in sweep.arms]
    return Table(["arm", *(column.title for column in columns)], rows)


def main_table(sweep: Sweep, columns: Iterable[Column], place: str) -> Table:
    """The number of finished seeds of every arm, and the columns for `place`, which is "page" or "terminal"."""
    headers, rows = _table(sweep, (column for column in columns if place in column.shown))
    seeds = {arm: str(len(runs)) for arm, runs in sweep.runs.items()}
    return Table([headers[0], "seeds", *headers[1:]], [[row[0], seeds[row[0]], *row[1:]] for row in rows])


def domain_columns(sweep: Sweep) -> list[Column]:
    """Held-out bits per byte, with a column per domain."""
    names = {key.removeprefix(DOMAIN_PREFIX): key for key in domain_keys(sweep)}
    return [Column(name, QUALITY.digits, last(key)) for name, key in names.items()]


def domain_table(sweep: Sweep) -> Table:
    """Held-out bits per byte by domain; only the arms' names if no run logged any."""
    return _table(sweep, domain_columns(sweep))


def time_table(sweep: Sweep, columns: Iterable[Column]) -> Table:
    """Each arm's wall-clock time by kind of work, and the columns for "time"; arms without a ledger are left out."""
    headers, rows = _table(sweep, (column for column in columns if "time" in column.shown))
    spent = {arm: seconds_of(runs.values()) for arm, runs in sweep.runs.items()}
    kept = [[row[0], *_time_cells(spent[row[0]]), *row[1:]] for row in rows if sum(spent[row[0]].values())]
    return Table(["arm", "minutes", *KINDS, "data wait", *headers[1:]], kept)


def _time_cells(seconds: dict[str, float]) -> list[str]:
    total = sum(seconds.values())
    stepping = seconds["data"] + seconds["step"]
    wait = f"{seconds['data'] / stepping:.2%}" if stepping else "-"
    return [f"{total / 60:,.1f}", *(f"{seconds[kind] / total:.1%}" for kind in KINDS), wait]
