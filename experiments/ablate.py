"""`python -m experiments.ablate --config=configs/ablation/demo.py --workdir=DIR`: train a sweep of arms x seeds.

From a wheel: `python -m moe_jax.experiments.ablate --config=ablation/demo --workdir=DIR`.

Seeds are paired: seed k of every arm starts from the same weights and reads the same batches. The runs of an arm share
one compilation. Repeating the command resumes the sweep. The command ends with a table and the path of the report.

Several machines with a common DIR share the work. With --claim each trains any run that no other has, and takes over
those of a machine that died. `--shard=i/n` trains every n-th run from the i-th. --list prints one command for each run,
trunks first, for an engine that distributes commands; they differ in --only, which trains one run.

A failed run does not affect the others: they are trained, and the command ends with a sentence on each failed run and
status 1. When the command is repeated, it skips a run that diverged, which would diverge again, until its folder is
deleted, and retries runs that failed for other reasons. Only a disk that is full or not writable ends the sweep,
because it would end every run.

A branched sweep, `h.branches(trunks, arms, at=STEP)`, trains every trunk first, and then every arm from each of them.
A failed trunk fails its branches. With --shard a machine trains the branches of its own trunks; a branch whose trunk
another machine has not finished is reported, and trained when the command is repeated. All checkpoints are kept;
--discard_weights removes those of finished branches, which in sum are large, and never those of trunks.
"""

import shlex
import sys
from pathlib import Path

from absl import app, flags

from moe_jax.config import as_dict, validate
from moe_jax.config.command import config_source, define_config_flag, fail, parse_flags
from moe_jax.config.paths import workdir_of
from moe_jax.runtime.cache import keep_compiled
from moe_jax.runtime.files import is_remote
from moe_jax.runtime.memory import use_huge_pages

from . import hyper
from .planned import Planned, plan_sweep
from .runs import parse_shard, read_settings, refuse_cluster


def main(_: list[str]) -> None:
    """Plan, check, train, report."""
    flag = flags.FLAGS
    use_huge_pages()
    keep_compiled()
    try:
        workdir = workdir_of(flag.workdir)
        if is_remote(workdir):
            raise ValueError(f"--workdir={flag.workdir} is in a bucket, which cannot hold a sweep; give a folder.")
        shard = parse_shard(flag.shard)
        _refuse_two_ways()
        refuse_cluster()
        file, source, argument = config_source()
        if not hasattr(source, "get_hyper"):
            raise ValueError(f"--config={file} defines no get_hyper(h), so no sweep; use moe_jax.train for one run.")
        base = as_dict(validate(flag.config))
        listed = read_settings(file, source, argument)
        if flag.discard_weights and not isinstance(listed, hyper.Branches):
            raise ValueError(
                "--discard_weights is for branched sweeps, and get_hyper lists a plain one; leave it out, and delete "
                "the checkpoints folders of finished runs yourself."
            )
        sweep = plan_sweep(source, base, listed, workdir)
        if flag.list:
            print("\n".join(_commands(sweep, workdir)))
            return
        for line in sweep.claim(_command()):
            print(line)
        if flag.claim or flag.only:
            stopped, failed = sweep.train_free(flag.only, flag.claim_seconds, flag.discard_weights)
        else:
            stopped, failed = sweep.train(shard, discard_weights=flag.discard_weights)
        if stopped:
            raise SystemExit(128 + stopped)
        if not flag.only:
            _report(sweep, whole=shard[1] == 1)
        if failed:
            mine = [] if flag.only else sweep.share(shard)
            title = f"{len(failed)} of {len(mine)} runs failed:" if mine else "not every run is finished:"
            fail("\n  ".join([title, *failed]), status=1)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(str(error))


def _refuse_two_ways() -> None:
    """Raise a ValueError unless the flags say in at most one way which runs to train."""
    flag = flags.FLAGS
    given = [f"--{name}" for name in ("list", "claim", "only", "shard") if flag[name].value != flag[name].default]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; give one of them.")
    if flag.claim_seconds <= 0:
        raise ValueError(f"--claim_seconds={flag.claim_seconds} must be above 0; 300 suits most file systems.")


def _commands(planned: Planned, workdir: Path) -> list[str]:
    """A command for every run, which another machine may run in the same folder of the same checkout."""
    given = iter(sys.argv[1:])
    kept = []
    for argument in given:
        name, equals, _ = argument.lstrip("-").partition("=")
        if name == "workdir" and not equals:
            next(given)
        if name not in ("workdir", "list"):
            kept.append(argument)
    words = ["python", "-m", __spec__.name, *kept, f"--workdir={workdir.absolute()}"]
    return [shlex.join([*words, f"--only={name}"]) for name in planned.jobs()]


def _report(planned: Planned, whole: bool) -> None:
    """Print the table of what is finished, and write the page unless other shards do the rest."""
    from . import report

    if planned.parts:
        branched = report.read_branched(planned.folder)
        report.print_branched(branched)
        if whole and branched.runs:
            print(f"report: {report.write_branched(branched)}")
    else:
        sweep = report.read_sweep(planned.folder)
        report.print_table(sweep)
        if whole and sweep.finished:
            print(f"report: {report.write(sweep)}")


def _command() -> str:
    return " ".join([f"python -m {__spec__.name}", *sys.argv[1:]])


if __name__ == "__main__":
    define_config_flag("A file with get_config() and get_hyper(h).")
    flags.DEFINE_string("workdir", None, "The folder for the runs and the report; created if it does not exist.")
    flags.DEFINE_string("shard", "0/1", "i/n: train every n-th run, from the i-th (0-based).")
    flags.DEFINE_bool("claim", False, "Train any run that no other process has, until all are finished.")
    flags.DEFINE_float(
        "claim_seconds", 300.0, "Seconds without a sign of life after which a process is dead and its run is free."
    )
    flags.DEFINE_string("only", "", "Train this run alone, named as --list does.")
    flags.DEFINE_bool("list", False, "Print a command for every run, and train none.")
    flags.DEFINE_bool("discard_weights", False, "Branched sweeps: remove the checkpoints of finished branches.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
