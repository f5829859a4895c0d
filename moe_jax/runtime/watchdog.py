"""End a run that is stuck: a live process without progress blocks all others, and no heartbeat detects it."""

import collections
import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_jax.runtime import processes


class Awake:
    """Splits time into running and stopped: by SIGSTOP, in a suspended job, in a paused container.

    A process is not notified that it is stopped. But a thread that reads the clock every `interval` seconds does not
    read it while stopped: of the time between two readings, at most twice the interval counts as running.
    """

    def __init__(self, interval: float, now: Callable[[], float] = time.monotonic) -> None:
        self._most = 2 * interval
        self._now = now
        self._seen = now()
        self._ran = 0.0
        self._stopped = 0.0
        self._lock = threading.Lock()

    def look(self) -> tuple[float, float]:
        """(seconds run, seconds stopped) so far."""
        with self._lock:
            now = self._now()
            passed = now - self._seen
            self._seen = now
            self._ran += min(passed, self._most)
            self._stopped += max(0.0, passed - self._most)
            return self._ran, self._stopped


class Watched:
    """Work dispatched to the devices; `began` is a time of `Awake`, `result` an array that the work computes."""

    def __init__(self, name: str, began: float) -> None:
        self.name = name
        self.began = began
        self.result: Any = None

    def finished(self) -> bool:
        """Whether the work is done; never waits."""
        return self.result is not None and self.result.is_ready()


class Watchdog:
    """Checks, in a separate thread, that the work under way is finished in time.

    The devices lag behind the program that feeds them, so the time at which a result becomes ready counts: the oldest
    work without a result is stuck. Time in which this process was stopped does not count.
    """

    def __init__(self, timeout_seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        """Args: timeout_seconds: the longest that one piece of work may take; 0 watches nothing."""
        self.doing = "the start"
        self._timeout = timeout_seconds
        self._interval = min(1.0, timeout_seconds / 10)
        self._awake = Awake(self._interval, now)
        self._progress = 0.0
        self._kinds: set[str] = set()
        self._under_way: collections.deque[Watched] = collections.deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        if timeout_seconds:
            self._thread.start()

    def watch(self, kind: str, number: int) -> Watched:
        """Watch work; to be called before it is dispatched, and the `result` of the returned object set afterwards.

        The first work of a kind is not timed, because it compiles.
        """
        work = Watched(f"{kind} {number}", self._awake.look()[0])
        self.doing = work.name
        if self._timeout and kind in self._kinds:
            self._under_way.append(work)
        self._kinds.add(kind)
        return work

    def stopped_seconds(self) -> float:
        """The seconds for which this process has been stopped so far; 0 if nothing is watched."""
        return self._awake.look()[1] if self._timeout else 0.0

    def overdue(self) -> str | None:
        """The name of the oldest work under way if it takes too long; to be called every interval."""
        ran, _ = self._awake.look()
        while self._under_way and self._under_way[0].finished():
            self._under_way.popleft()
            self._progress = ran
        oldest = self._under_way[0] if self._under_way else None
        if oldest is None or ran - max(self._progress, oldest.began) <= self._timeout:
            return None
        return oldest.name

    def close(self) -> None:
        """Stop watching, and release all results.

        A thread that frees an array while the interpreter shuts down aborts the process, so the thread ends first.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._under_way.clear()

    def _look(self) -> None:
        while not self._stop.wait(self._interval):
            if name := self.overdue():
                return self._end(name)

    def _end(self, name: str) -> None:
        print("stack of every thread of this process:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        processes.end(
            f"{name} has not finished within step_timeout_seconds={self._timeout} (process {processes.index()} of "
            f"{processes.count()}): a process, a device or the network is stuck. The same command on all hosts "
            "resumes from the newest checkpoint; raise the limit if the step is only slow."
        )
