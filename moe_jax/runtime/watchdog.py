"""Ends a run that is stuck: a peer that is alive and does nothing holds all the others, and no heartbeat sees it."""

import collections
import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_jax.runtime import processes


class Awake:
    """Splits time into what this process ran and what it was stopped for: SIGSTOP, a suspended job, a paused container.

    A process does not see that it is stopped. But a thread that looks at the clock every `interval` seconds does not
    look then: of the time between two looks, twice the interval counts as running at most.
    """

    def __init__(self, interval: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most, self._now = 2 * interval, now
        self._seen, self._ran, self._stopped = now(), 0.0, 0.0
        self._lock = threading.Lock()

    def look(self) -> tuple[float, float]:
        """(seconds run, seconds stopped) so far."""
        with self._lock:
            now = self._now()
            passed, self._seen = now - self._seen, now
            self._ran += min(passed, self._most)
            self._stopped += max(0.0, passed - self._most)
            return self._ran, self._stopped


class Work:
    """Something that the devices are to do; `began` is a time of `Awake`, `result` an array of it once there is one."""

    def __init__(self, name: str, began: float) -> None:
        self.name = name
        self.began = began
        self.result: Any = None

    def finished(self) -> bool:
        """Never waits."""
        return self.result is not None and self.result.is_ready()


class Watchdog:
    """Looks, from a thread of its own, whether the work under way gets finished.

    The devices run behind the program that feeds them, so what counts is when results become ready, and the
    oldest work without one is what is stuck. Time in which this process was stopped does not count.
    """

    def __init__(self, timeout_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        """Args: timeout_seconds: the longest that one piece of work may take; 0 watches nothing."""
        self.doing = "the start"
        self._timeout = timeout_seconds
        self._interval = min(1.0, timeout_seconds / 10)
        self._awake = Awake(self._interval, now)
        self._progress = 0.0
        self._kinds: set[str] = set()
        self._under_way: collections.deque[Work] = collections.deque()
        self._stop = threading.Event()
        if timeout_seconds:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def watch(self, kind: str, number: int) -> Work:
        """Call before the work is begun, and set `result` of what is returned when it is.

        The first work of a kind is not timed: it compiles, and takes as long as it takes.
        """
        work = Work(f"{kind} {number}", self._awake.look()[0])
        self.doing = work.name
        if self._timeout and kind in self._kinds:
            self._under_way.append(work)
        self._kinds.add(kind)
        return work

    def stopped_seconds(self) -> float:
        """For how long this process was stopped so far; 0 where nothing is watched."""
        return self._awake.look()[1] if self._timeout else 0.0

    def overdue(self) -> str | None:
        """The name of the oldest work under way if it has taken too long; to be called every interval."""
        ran, _ = self._awake.look()
        while self._under_way and self._under_way[0].finished():
            self._under_way.popleft()
            self._progress = ran
        oldest = self._under_way[0] if self._under_way else None
        late = oldest is not None and ran - max(self._progress, oldest.began) > self._timeout
        return oldest.name if oldest is not None and late else None

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()

    def _look(self) -> None:
        while not self._stop.wait(self._interval):
            if name := self.overdue():
                return self._end(name)

    def _end(self, name: str) -> None:
        print("where this process is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        processes.end(
            f"{name} has not finished within step_timeout_seconds={self._timeout} (process {processes.index()} of "
            f"{processes.count()}): a process, a device or the network is stuck. The same command on all hosts "
            "goes on from the newest checkpoint; raise the limit if the step is only slow."
        )
