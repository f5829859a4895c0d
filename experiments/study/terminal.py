"""Prints the verdicts in a terminal."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..report.terminal import WIDTH
from .verdicts import Judged
from .words import ours

if TYPE_CHECKING:
    from rich.console import Console

NOTE = "Ours: mean over the blocks, which are seeds or trunk seeds, and its 95 % t-interval."


def print_verdicts(judged: Iterable[Judged], console: "Console | None" = None) -> None:
    """Print a row for every claim: its number and text, what was measured, and the verdict.

    Args:
        judged: as `verdicts.judge` returns them.
        console: where to print; None is standard output.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table(caption=Text(NOTE))
    table.add_column("")
    table.add_column("claim", overflow="fold")
    table.add_column("ours", justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for one in judged:
        table.add_row(*map(Text, (one.claim.number, one.claim.text, ours(one), one.verdict)))
    console.print(table)
