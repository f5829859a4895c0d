"""Runs the tables of the study one after the other, and packs what is finished after each."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.runtime.signals import ENDING

from ..branched import trunks_in
from ..planned import Planned
from ..progress import Progress
from ..runs import fit_devices, folder_of
from .archive import collect

REMOVED_FROM = {"arms": "bias"}  # table -> the trunk method from whose models experts are removed


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
    fit_devices([run for table in tables for run in table.every_run])
    collect(workdir, results)  # before hours of work: whether it can be packed
    progress = Progress([tokens for table in tables for tokens in table.work(shard)])
    failed: list[str] = []
    with _signals_raise():
        for table in tables:
            try:
                stopped, sentences = table.train(shard, progress, discard_weights=True)
                failed += sentences
                if stopped:
                    return stopped, failed
                failed += remove_experts(table, shard)
            finally:
                for line in collect(workdir, results):
                    print(line, flush=True)
    return None, failed


def remove_experts(table: Planned, shard: tuple[int, int]) -> list[str]:
    """Measure the loss of trunks without some of their experts, on the held-out text of the run: see `REMOVED_FROM`.

    Returns:
        a sentence for every finished trunk of the shard where that failed.
    """
    from moe_jax import evaluate
    from moe_jax.runtime.workdir import config_of_run
    from moe_jax.training import attempts

    failed = []
    for part in table.parts[shard[0] :: shard[1]]:
        folder = folder_of(trunks_in(table.folder), part.trunk)
        if part.trunk.arm != REMOVED_FROM.get(table.name) or (folder / "ablation.json").is_file():
            continue
        if not attempts.is_finished(part.trunk.config, folder):
            continue  # a failed trunk has a sentence already
        print(f"{table.name}, trunk {part.name}: without some of its experts", flush=True)
        try:
            evaluate.run(config_of_run(folder), folder, ablation=True)
        except (ValueError, OSError) as error:
            failed.append(f"trunk {part.name} ({folder}), without some of its experts: {error}")
    return failed


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
