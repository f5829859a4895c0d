"""Turns the runs of a sweep into a report: one self-contained page with the answer, tables, pictures and their limits.

    python -m experiments.report DIR [--output=DIR/report.html] [--baseline=ARM] [--figures]

Read in this order: `sweep` (the finished runs of a folder), `numbers` (the numbers of a run, and intervals over seeds),
`columns` (the tables), `settings`, `answer` (sentences), `drawing`, `experts` and `figures` (pictures), `terminal`,
`page`.
"""

from .columns import COLUMNS, Column
from .command import main
from .page import write
from .sweep import read_sweep
from .terminal import print_table

__all__ = ["COLUMNS", "Column", "main", "print_table", "read_sweep", "write"]
