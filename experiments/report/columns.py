"""The tables of a report as text: ONE row of `COLUMNS` for each number that is shown, and where.

A column of your own is one more row: `main(columns=[*COLUMNS, Column(...)])`, see docs/examples/column.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moe_jax.runtime.ledger import KINDS

from .numbers import NOTHING, Interval, dead_at_end, interval, last, middle, paired, seconds_of, tail, typical
from .sweep import DOMAIN_PREFIX, EVALUATED, Run, Sweep, domain_keys

PAGE = ("page",)
EVERYWHERE = ("page", "terminal")  # a terminal has room for few
TIME = ("time",)  # the page's table of where the time went


@dataclass(frozen=True)
class Column:
    """One number of every finished run, and how its seeds become a cell of the tables.

    Attributes:
        key: its name in code.
        title: its heading.
        digits: decimals.
        of: finished run -> number, nan where the run did not log it.
        shown: any of "page", "terminal" and "time".
        compared: a mean with its interval, and under it the paired difference to the baseline; False gives the
            median alone, as suits what depends on the machine.
    """

    key: str
    title: str
    digits: int
    of: Callable[[Run], float]
    shown: tuple[str, ...] = PAGE
    compared: bool = True


QUALITY = Column("bits_per_byte", "bits per byte, held out", 4, last(EVALUATED), EVERYWHERE)
BALANCE = Column("max_violation", "max violation, held out", 3, last("eval/max_violation"), EVERYWHERE)
COLUMNS = (
    QUALITY,
    BALANCE,
    Column("train_max_violation", "max violation, training", 3, tail("moe/max_violation")),
    Column("worst_layer", "worst layer, held out", 3, last("eval/max_violation_worst")),
    Column("dead_experts", "dead experts, end of training", 1, dead_at_end, EVERYWHERE),
    Column("eval_dead_experts", "dead experts, held out", 1, last("eval/dead_experts")),
    Column("aux_loss", "aux loss (1 = even)", 3, tail("moe/aux_loss")),
    Column("tokens_per_second", "tokens/s", 0, typical("tokens_per_second"), EVERYWHERE, compared=False),
    Column("gflops_per_second", "GFLOP/s", 1, typical("gflops_per_second"), TIME, compared=False),
    Column("mfu", "MFU, %", 1, typical("mfu", 100.0), TIME, compared=False),
)


class Measured(NamedTuple):
    """What a column says of an arm.

    Attributes:
        value: mean or median over its seeds; n = 0 when no seed has the number.
        difference: paired, arm minus baseline; n = 0 for the baseline itself and for what is not compared.
    """

    value: Interval
    difference: Interval


def measure(sweep: Sweep, column: Column) -> dict[str, Measured]:
    """What a column says of every arm."""
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
    """One or two lines: the value, and below it the paired difference where there is one."""
    value, difference = measured
    if not column.compared:
        return f"{value.mean:,.{column.digits}f}" if value.n else "-"
    below = f"\n{show(difference, column.digits, signed=True)}" if difference.n else ""
    return show(value, column.digits) + below


class Table(NamedTuple):
    """A table as text: a row an arm, its name first; a line break within a cell separates value and difference."""

    headers: list[str]
    rows: list[list[str]]


def _table(sweep: Sweep, columns: Iterable[Column]) -> Table:
    columns = list(columns)
    measured = [measure(sweep, column) for column in columns]
    rows = [[arm, *(cell(c, found[arm]) for c, found in zip(columns, measured, strict=True))] for arm in sweep.arms]
    return Table(["arm", *(column.title for column in columns)], rows)


def main_table(sweep: Sweep, columns: Iterable[Column], place: str) -> Table:
    """The arms in the columns shown at a place, "page" or "terminal", behind their numbers of finished seeds."""
    headers, rows = _table(sweep, (column for column in columns if place in column.shown))
    seeds = {arm: str(len(runs)) for arm, runs in sweep.runs.items()}
    return Table([headers[0], "seeds", *headers[1:]], [[row[0], seeds[row[0]], *row[1:]] for row in rows])


def domain_columns(sweep: Sweep) -> list[Column]:
    """Held-out bits per byte, a column a domain."""
    names = {key.removeprefix(DOMAIN_PREFIX): key for key in domain_keys(sweep)}
    return [Column(name, name, QUALITY.digits, last(key)) for name, key in names.items()]


def domain_table(sweep: Sweep) -> Table:
    """Held-out bits per byte by domain; only the arms' names when no run logged any."""
    return _table(sweep, domain_columns(sweep))


def time_table(sweep: Sweep, columns: Iterable[Column]) -> Table:
    """Where each arm's wall-clock time went, and the columns shown beside; arms that kept no account are left out."""
    headers, rows = _table(sweep, (column for column in columns if "time" in column.shown))
    spent = {arm: seconds_of(runs.values()) for arm, runs in sweep.runs.items()}
    kept = [[row[0], *_time_cells(spent[row[0]]), *row[1:]] for row in rows if sum(spent[row[0]].values())]
    return Table(["arm", "minutes", *KINDS, "data wait", *headers[1:]], kept)


def _time_cells(seconds: dict[str, float]) -> list[str]:
    total = sum(seconds.values())
    stepping = seconds["data"] + seconds["step"]
    wait = f"{seconds['data'] / stepping:.2%}" if stepping else "-"
    return [f"{total / 60:,.1f}", *(f"{seconds[kind] / total:.1%}" for kind in KINDS), wait]
