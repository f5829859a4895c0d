"""Prints the main tables in a terminal, and a line for each run that is not counted."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .answer import remarks
from .branched import Branched
from .columns import BALANCE, COLUMNS, QUALITY, Column, main_table
from .columns import Table as Cells
from .crossed import CROSSED_NOTE, branched_table, left_out
from .sweep import Sweep

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 110  # characters, if the output is a file or a pipe, for which rich would assume 80
TABLE_NOTE = (
    "Mean over seeds ± half-width of the 95 % t-interval; second line: arm minus baseline, paired by seed; "
    "* the interval excludes 0; - not logged or not comparable."
)


def print_table(sweep: Sweep, columns: Iterable[Column] = COLUMNS, console: "Console | None" = None) -> None:
    """Print the columns for the terminal, and a line for each run that is not counted.

    Args:
        sweep: as `read_sweep` returns it.
        columns: those with "terminal" in `shown` are printed.
        console: where to print; None is standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    _print(console, main_table(sweep, columns, "terminal"), sweep.name, TABLE_NOTE)
    for remark in remarks(sweep):
        console.print(Text(f"! {remark}"))


def print_branched(sweep: Branched, console: "Console | None" = None) -> None:
    """Print the effects of a branched sweep on quality and balance, and a line for each run that is not counted.

    Args:
        sweep: as `read_branched` returns it.
        console: where to print; None is standard output.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    for column, title, note in ((QUALITY, sweep.name, ""), (BALANCE, "", CROSSED_NOTE)):
        headers, rows = branched_table(sweep, column)
        narrow = [[cell.replace(" ± ", "\n± ") for cell in row] for row in rows]  # a terminal may have 80 characters
        _print(console, Cells(headers, narrow), title, note)
    for remark in sweep.problems + left_out(sweep):
        console.print(Text(f"! {remark}"))


def _print(console: "Console", cells: Cells, title: str, note: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, caption=Text(note) if note else None)
    for header in cells.headers:
        table.add_column(Text(header), justify="left" if header == "arm" else "right", overflow="fold")
    for row in cells.rows:
        table.add_row(*map(Text, row))
    console.print(table)
