"""The command: reads a sweep or the study, prints its main table or verdicts, and writes its page."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of

from .branched import is_branched, read_branched
from .columns import COLUMNS, Column
from .crossed_page import write_branched
from .page import write
from .sweep import SweepError, read_sweep
from .terminal import print_branched, print_table
from .watch import watch

WATCH = 30  # seconds between two looks at a sweep


def main(argv: list[str] | None = None, columns: Iterable[Column] = COLUMNS) -> None:
    """Run the command. Bad input ends it with a sentence on standard error and status 2.

    Args:
        argv: DIR and flags; None takes them from the command line.
        columns: the columns of the tables.
    """
    options = _parser().parse_args(argv)
    print_any_name()
    columns = list(columns)
    from ..study.archive import is_study  # it reads sweeps as this package does

    try:
        directory = path_of(options.directory, "DIR")
        output = path_of(options.output, "--output") if options.output else None
        if options.watch is not None and options.watch < 1:
            raise SweepError(f"--watch={options.watch} must be at least 1 second; leave the number out for {WATCH}.")
        if is_study(directory):
            _report_study(directory, output, options)
        elif options.watch is not None:
            watch(directory, options.watch, lambda: _report_sweep(directory, output, options, columns))
        else:
            _report_sweep(directory, output, options, columns)
    except (ValueError, OSError) as error:
        fail(str(error))


def _report_sweep(directory: Path, output: Path | None, options: argparse.Namespace, columns: list[Column]) -> bool:
    """Report a sweep, branched or not; whether all its runs are finished."""
    if is_branched(directory):
        return _report_branched(directory, output, options)
    sweep = read_sweep(directory, options.baseline)
    finished, planned = len(sweep.finished), len(sweep.arms) * len(sweep.seeds)
    try:
        output = write(sweep, output, options.figures, columns, _reload(options, finished, planned))
    except OSError as error:  # for example, the sweep belongs to another user
        print_table(sweep, columns)
        fail(f"{error.filename} cannot be written ({error.strerror}); --output=FILE names another file.")
    print_table(sweep, columns)
    print(f"Wrote {output}", flush=True)
    return finished == planned


def _reload(options: argparse.Namespace, finished: int, planned: int) -> int:
    """The seconds after which a browser reads the page again: as long as runs are watched that are not finished."""
    return options.watch if options.watch is not None and finished < planned else 0


def _report_study(directory: Path, output: Path | None, options: argparse.Namespace) -> None:
    from ..study.report import report_study

    given = ("--baseline", options.baseline), ("--figures", options.figures), ("--watch", options.watch)
    for flag, value in given:
        if value:
            raise SweepError(f"{flag} is for one sweep, and DIR={directory} holds the study; leave it out.")
    report_study(directory, output)


def _report_branched(directory: Path, output: Path | None, options: argparse.Namespace) -> bool:
    if options.figures:
        raise SweepError(
            f"--figures is for plain sweeps, and DIR={directory} is a branched one, whose page has its own drawings; "
            f"leave it out, or give {directory}/trunks."
        )
    sweep = read_branched(directory, options.baseline)
    finished = len(sweep.runs)
    output = write_branched(sweep, output, _reload(options, finished, sweep.num_planned))
    print_branched(sweep)
    print(f"Wrote {output}", flush=True)
    return finished == sweep.num_planned


def _parser() -> argparse.ArgumentParser:
    package = __name__.rpartition(".")[0]  # moe_jax.experiments.report in a wheel, experiments.report in a clone
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description="Turns the runs of a sweep into a report: one self-contained page with the answer, tables, "
        "pictures and their limits.",
    )
    parser.add_argument("directory", metavar="DIR", help="folder with sweep.json and the runs, or of the study")
    parser.add_argument("--output", metavar="FILE", help="the page (DIR/report.html); of the study, its folder (DIR)")
    parser.add_argument("--baseline", metavar="ARM", help="arm to compare with (the one in sweep.json)")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=int,
        nargs="?",
        const=WATCH,
        help=f"check the runs every SECONDS ({WATCH}) and keep the page current until all are finished",
    )
    parser.add_argument("--figures", action="store_true", help="also write the pictures to DIR/figures/*.png")
    return parser
