"""Runs the tables of the study one after the other, and packs what is finished after each."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.runtime.signals import ENDING

from ..branched import trunks_in
from ..planned import Planned
from ..progress import Progress
from ..runs import Run, fit_devices, folder_of
from .archive import SPECIALISATION, collect
from .arms import BASELINE
from .arms import TABLE as MAIN
from .excerpts import FILE as EXCERPTS
from .excerpts import write_excerpts
from .restore import restore_branch, restore_whole_runs


def check_corpora(tables: Sequence[Planned]) -> None:
    """Raise a ValueError if the text of a run is not there."""
    for path in sorted({run.config.data.path for table in tables for run in table.every_run}):
        if path and not Path(path).is_dir():
            raise ValueError(f"data.path={path} of the study does not exist; run make corpus.")


def run_study(
    tables: Sequence[Planned], results: Path, shard: tuple[int, int], command: str
) -> tuple[int | None, list[str]]:
    """Train what is not finished of a shard, table by table, and pack the logs after each, or when a signal ends it.

    Args:
        tables: planned, all in one workdir.
        results: the folder of the archives.
        shard: (i, n) as in --shard=i/n.
        command: for sweep.json.

    Returns:
        the signal that stopped a run, or None, and a sentence for every run that failed, now or earlier.

    Raises:
        ValueError: the corpus is missing, a table's folder holds another sweep, a run does not fit the devices, or a
            log cannot be packed.
        OSError: the disk is full or not writable.
        SystemExit: a signal came between two runs.
    """
    workdir = tables[0].folder.parent
    check_corpora(tables)
    for table in tables:
        for line in table.claim(command):
            print(line)
        restore_whole_runs(table, results)
    fit_devices([run for table in tables for run in table.every_run])
    collect(workdir, results)  # before hours of work: whether it can be packed
    progress = Progress([tokens for table in tables for tokens in table.work(shard)])
    failed: list[str] = []
    with _signals_raise():
        for table in tables:
            try:
                restore = partial(restore_branch, table=table.folder, results=results)
                stopped, sentences = table.train(shard, progress, discard_weights=True, restore=restore)
                failed += sentences
                if stopped:
                    return stopped, failed
                failed += measure_trunks(table, shard)
            finally:
                for line in collect(workdir, results):
                    print(line, flush=True)
    return None, failed


def measure_trunks(table: Planned, shard: tuple[int, int]) -> list[str]:
    """Measure what needs the weights of a shard's trunks, where it is not there: see `MEASURES`.

    Returns:
        a sentence for every finished trunk where that failed.
    """
    from moe_jax.training import attempts

    if table.name != MAIN:
        return []
    failed = []
    for part in table.parts[shard[0] :: shard[1]]:
        folder = folder_of(trunks_in(table.folder), part.trunk)
        if not attempts.is_finished(part.trunk.config, folder):
            continue  # a failed trunk has a sentence already
        first_seed = min(other.trunk.seed for other in table.parts if other.trunk.arm == part.trunk.arm)
        for name, measure in MEASURES.items():
            if not measure.concerns(part.trunk, first_seed) or (folder / measure.file).is_file():
                continue
            print(f"{table.name}, trunk {part.name}: {name}", flush=True)
            try:
                measure.run(folder)
            except (ValueError, OSError) as error:
                failed.append(f"trunk {part.name} ({folder}), {name}: {error}")
    return failed


def _evaluate(folder: Path, **measured: Any) -> None:
    """Evaluate a run on its held-out text; `measured` is what else the evaluate command measures, True for each."""
    from moe_jax import evaluate
    from moe_jax.runtime.workdir import config_of_run

    evaluate.run(config_of_run(folder), folder, **measured)


def _is_first(trunk: Run, first_seed: int) -> bool:
    return trunk.seed == first_seed


class Measure(NamedTuple):
    """A measurement on a finished trunk.

    Attributes:
        file: what it leaves in the trunk's folder.
        concerns: of the trunk, and the first trunk seed of its method.
        run: on the trunk's folder.
    """

    file: str
    concerns: Callable[[Run, int], bool]
    run: Callable[[Path], None]


MEASURES = {
    "without some of its experts": Measure(
        "ablation.json", lambda trunk, _: trunk.arm == BASELINE, partial(_evaluate, ablation=True)
    ),
    "experts by domain": Measure(SPECIALISATION, _is_first, partial(_evaluate, specialisation=True)),
    "text by expert": Measure(EXCERPTS, _is_first, write_excerpts),
}


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Signals that arrive between two runs raise SystemExit, so that `finally` is reached; runs handle their own."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    kinds = [kind for kind in ENDING if signal.getsignal(kind) is not signal.SIG_IGN]
    before = {kind: signal.signal(kind, leave) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
