"""Finished runs that the archives have and a workdir has not: a study continues where its workdir is lost.

A whole run is restored as it is. A branch is restored once its trunk, whose weights no archive has, was trained again
to the same numbers: training the branch would give what is archived.
"""

from pathlib import Path

from moe_jax.runtime.log import METRICS

from ..branched import Job, branches_in
from ..planned import Planned
from ..runs import Run, folder_of
from .archive import archived_run, check_trunk


def restore_whole_runs(table: Planned, results: Path) -> None:
    """Restore the runs of a plain table that its archive has with the same settings; nothing of a branched table.

    Raises:
        SweepError: the archive is damaged.
    """
    for run in table.runs:
        _restore(run, table.folder, table.folder, results)


def restore_branch(job: Job, table: Path, results: Path) -> None:
    """Restore a branch that the archive has with the same settings.

    Args:
        job: a branch whose trunk is finished.
        table: the folder of its table in the workdir.
        results: the folder of the archives.

    Raises:
        SweepError: the archives have branches of a trunk with other numbers; an archive is damaged.
    """
    assert job.part is not None
    trunk = job.part.trunk
    check_trunk(table, trunk.arm, trunk.seed, results)
    _restore(job.run, branches_in(table, trunk.arm, trunk.seed), table, results)


def _restore(run: Run, sweep: Path, table: Path, results: Path) -> None:
    """Write a run's files from its archive, the log last, unless the workdir has begun it."""
    folder = folder_of(sweep, run)
    if (folder / METRICS).exists():
        return
    files = archived_run(run, sweep, table, results)
    for name in sorted(files, key=lambda name: name == METRICS):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(files[name])
    if files:
        print(f"{folder}: restored from the archives", flush=True)
