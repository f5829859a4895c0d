"""Turns the runs of a sweep into a report: one self-contained page with the answer, tables, pictures and their limits.

    python -m experiments.report DIR [--output=DIR/report.html] [--baseline=ARM] [--figures]

DIR is a plain or a branched sweep, or the study: its archives or its workdir.

Read in this order: `sweep` (the finished runs of a folder), `numbers` (the numbers of a run, and intervals over seeds),
`columns` (the tables), `settings`, `answer` (sentences), `drawing`, `experts` and `figures` (pictures), `terminal`,
`page`; for branched sweeps `branched` (reading), `crossed` (tables and sentences), `crossed_page`.
"""

from .branched import is_branched, read_branched
from .columns import COLUMNS, Column
from .command import main
from .crossed_page import write_branched
from .page import write
from .sweep import read_sweep
from .terminal import print_branched, print_table

__all__ = [
    "COLUMNS",
    "Column",
    "is_branched",
    "main",
    "print_branched",
    "print_table",
    "read_branched",
    "read_sweep",
    "write",
    "write_branched",
]
