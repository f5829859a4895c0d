"""Runs become a claim: one self-contained page with the answer first, then tables, pictures and their limits.

    python -m experiments.report DIR [--output=DIR/report.html] [--baseline=ARM] [--figures]

Read in this order: `sweep` (a folder becomes finished runs), `numbers` (a run becomes numbers, seeds an interval),
`columns` (what is shown), `settings`, `answer` (sentences), `drawing`, `experts` and `figures` (pictures), `terminal`,
`page`.
"""

from .columns import COLUMNS, Column
from .command import main
from .page import write
from .sweep import read_sweep
from .terminal import print_table

__all__ = ["COLUMNS", "Column", "main", "print_table", "read_sweep", "write"]
