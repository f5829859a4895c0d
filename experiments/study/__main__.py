"""Runs the study of balancing: its tables one after the other, their logs packed, the verdicts on its claims.

    python -m experiments.study --workdir=DIR [--results=DIR] [--shard=i/n] [--tables=arms,gates]

Needs the text that `make corpus` makes. A repeated command resumes where the last one ended, whatever ended it. With
--shard=i/n it trains every n-th trunk with its branches, and every n-th whole run, so that n machines share the work,
with one workdir or with one each. The logs of finished runs are packed into --results after every table, and when a
signal ends the command. In the end it prints a verdict on every claim and, with all shards in one, writes the page of
the study beside the archives; `python -m experiments.report RESULTS` writes it at any time.
"""

import argparse
import sys
from collections.abc import Sequence

from moe_jax.config.command import fail, print_any_name
from moe_jax.config.paths import path_of
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.memory import use_huge_pages

from ..runs import parse_shard, refuse_cluster
from .plan import TABLES, parse_tables, read_tables
from .report import report_study
from .run import run_study

RESULTS = "experiments/results/study"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what goes wrong ends it with a sentence."""
    options = _parser().parse_args(arguments)
    print_any_name()
    use_huge_pages()
    keep_compiled()
    try:
        workdir, results = path_of(options.workdir, "--workdir"), path_of(options.results, "--results")
        shard = parse_shard(options.shard)
        refuse_cluster()
        tables = read_tables(parse_tables(options.tables), workdir)
        command = " ".join([f"python -m {__package__}", *(sys.argv[1:] if arguments is None else arguments)])
        stopped, failed = run_study(tables, results, shard, command)
        if stopped:
            raise SystemExit(128 + stopped)
        report_study(results, writes=shard[1] == 1)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))
    if failed:
        fail("\n  ".join(["not every run is finished:", *failed]), status=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the runs, created if absent")
    parser.add_argument("--results", default=RESULTS, metavar="DIR", help="folder of the archives (%(default)s)")
    parser.add_argument("--shard", default="0/1", metavar="i/n", help="every n-th run, from the i-th, counted from 0")
    parser.add_argument("--tables", default=",".join(TABLES), help="a selection of: %(default)s")
    return parser


if __name__ == "__main__":
    main()
