"""Prints the main table in a terminal, and a line for each run that is not counted."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .answer import remarks
from .columns import COLUMNS, Column, main_table
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
    from rich.table import Table
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    headers, rows = main_table(sweep, columns, "terminal")
    table = Table(title=Text(sweep.name), caption=Text(TABLE_NOTE))
    for header in headers:
        table.add_column(Text(header), justify="left" if header == "arm" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for remark in remarks(sweep):
        console.print(Text(f"! {remark}"))
