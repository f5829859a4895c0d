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
        if is_study(directory):
            _report_study(directory, output, options)
            return
        if is_branched(directory):
            _report_branched(directory, output, options)
            return
        sweep = read_sweep(directory, options.baseline)
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        output = write(sweep, output, options.figures, columns)
    except ValueError as error:
        fail(str(error))
    except OSError as error:  # for example, the sweep belongs to another user
        print_table(sweep, columns)
        fail(f"{error.filename} cannot be written ({error.strerror}); --output=FILE names another file.")
    print_table(sweep, columns)
    print(f"Wrote {output}")


def _report_study(directory: Path, output: Path | None, options: argparse.Namespace) -> None:
    from ..study.report import report_study

    for flag, value in (("--baseline", options.baseline), ("--figures", options.figures)):
        if value:
            raise SweepError(f"{flag} is for one sweep, and DIR={directory} holds the study; leave it out.")
    report_study(directory, output)


def _report_branched(directory: Path, output: Path | None, options: argparse.Namespace) -> None:
    if options.figures:
        raise SweepError(
            f"--figures is for plain sweeps, and DIR={directory} is a branched one, whose page has its own drawings; "
            f"leave it out, or give {directory}/trunks."
        )
    sweep = read_branched(directory, options.baseline)
    output = write_branched(sweep, output)
    print_branched(sweep)
    print(f"Wrote {output}")


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
    parser.add_argument("--figures", action="store_true", help="also write the pictures to DIR/figures/*.png")
    return parser
