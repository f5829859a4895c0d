"""Keeps the page of a sweep current while its runs are under way."""

import time
from collections.abc import Callable
from pathlib import Path

from .sweep import SweepError, read_spec


def watch(directory: Path, seconds: int, report: Callable[[], bool]) -> None:
    """Call `report` now and whenever the sweep has changed, until it says that every run is finished.

    A sweep without any finished run is waited for.

    Args:
        directory: of the sweep.
        seconds: between two looks at its files.
        report: writes the page.

    Raises:
        SweepError: the folder holds no sweep.
    """
    read_spec(directory)
    seen = None
    while True:
        now = _state(directory)
        if now != seen:
            seen = now
            try:
                if report():
                    return
            except SweepError as nothing_yet:
                print(nothing_yet, flush=True)
        time.sleep(seconds)


def _state(directory: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every log below the folder; a run without changes there has not advanced."""
    state = {}
    for file in directory.rglob("metrics*.jsonl"):
        about = file.stat()
        state[file] = about.st_size, about.st_mtime_ns
    return state
