"""Which process trains which run of a sweep: claims in a folder that any number of processes share.

    CLAIMS/<run>/1.json, 2.json, ...        the newest one counts

A process claims a run by creating the next file, which a file system without locks, too, grants to one process only. No
claim is ever removed, so that a late process cannot remove another's. While its owner trains, a claim changes
again and again; one that has not changed for long enough was a dead owner's, and the next one may be created. Each
process observes that with a clock of its own, so that the clocks of hosts may differ.
"""

import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moe_jax.runtime.files import write_json
from moe_jax.runtime.processes import end

BEATS = 10  # changes of a claim in the time after which it counts as dead
UNREADABLE = {"state": "unreadable"}  # a claim that is being written, or whose owner died before it was


class Claims:
    """The claims of a sweep, as one process sees them."""

    def __init__(
        self,
        folder: Path,
        dead_seconds: float,
        now: Callable[[], float] = time.monotonic,
        superseded: Callable[[str], Any] = end,
    ) -> None:
        """Args: dead_seconds: when an unchanged claim is dead; superseded: ends a process that lost its claim."""
        self._folder = folder
        self._dead_seconds = dead_seconds
        self._now = now
        self._superseded = superseded
        self._seen: dict[Path, tuple[str, float]] = {}  # the newest claim of each run, and since when it is like that

    @contextmanager
    def taken(self, run: str) -> Iterator[bool]:
        """Hold the claim of a run while the block runs; yields whether this process got it.

        Args:
            run: a name, which may contain slashes.
        """
        folder = self._folder / run
        number = self._free(folder)
        path = folder / f"{number}.json"
        if number is None or not _created(path):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, stop), name="claim", daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            if not _next(path).exists():
                _write(path, "released", 0)

    def owner(self, run: str) -> str:
        """Who holds the newest claim of a run: `node7, process 1234`; "" if nobody does."""
        number = _newest(self._folder / run)
        claim = _read(self._folder / run / f"{number}.json") if number else {}
        return f"{claim['host']}, process {claim['pid']}" if claim.get("state") == "running" else ""

    def _free(self, folder: Path) -> int | None:
        """The number of the next claim of a run that nobody has; None while somebody has it."""
        number = _newest(folder)
        path = folder / f"{number}.json"
        claim = _read(path) if number else {}
        if not number or claim["state"] == "released":
            return number + 1
        text = json.dumps(claim)
        before, since = self._seen.get(path, ("", 0.0))
        if text != before:
            self._seen[path] = text, self._now()
            return None
        return number + 1 if self._now() - since >= self._dead_seconds else None

    def _beat(self, path: Path, stop: threading.Event) -> None:
        """Change a claim again and again; end this process if another one has taken it for dead."""
        beats = 0
        while not _next(path).exists():
            with suppress(OSError):  # of a disk that is full for a while
                _write(path, "running", beats)
            beats += 1
            if stop.wait(self._dead_seconds / BEATS):
                return
        self._superseded(
            f"{_next(path)} is another process's claim, made while this one stood still for "
            f"{self._dead_seconds:.0f} s; that process trains the run. Repeat the command for the other runs."
        )


def _newest(folder: Path) -> int:
    """The number of the newest claim in a folder; 0 if there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(found[1]) for name in names if (found := re.fullmatch(r"(\d+)\.json", name))), default=0)


def _next(path: Path) -> Path:
    return path.with_name(f"{int(path.stem) + 1}.json")


def _created(path: Path) -> bool:
    """Create a file unless it exists; whether this process did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _write(path: Path, state: str, beats: int) -> None:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(path, {"host": platform.node(), "pid": os.getpid(), "at": at, "state": state, "beats": beats})


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return UNREADABLE
    return value if isinstance(value, dict) and "state" in value else UNREADABLE
