"""Ends a run that is stuck: a peer that is alive and does nothing holds all the others, and no heartbeat sees it."""

import collections
import faulthandler
import sys
import threading
import time
from typing import Any

from moe_jax import distributed


class Work:
    """Something the devices were told to do; `result` is an array of it, once there is one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.monotonic()
        self.result: Any = None

    def finished(self) -> bool:
        """Never waits."""
        return self.result is not None and self.result.is_ready()


class Watchdog:
    """Looks, from a thread of its own, whether the work under way gets finished.

    The devices run behind the program that feeds them, so what counts is when results become ready, and the
    oldest work without one is what is stuck.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Args: timeout_seconds: the longest that one piece of work may take; 0 watches nothing."""
        self.doing = "the start"
        self._timeout = timeout_seconds
        self._kinds: set[str] = set()
        self._under_way: collections.deque[Work] = collections.deque()
        self._stop = threading.Event()
        if timeout_seconds:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def watch(self, kind: str, number: int) -> Work:
        """Call before the work is begun, and set `result` of what is returned when it is.

        The first work of a kind is not timed: it compiles, and takes as long as it takes.
        """
        work = Work(f"{kind} {number}")
        self.doing = work.name
        if self._timeout and kind in self._kinds:
            self._under_way.append(work)
        self._kinds.add(kind)
        return work

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()

    def _look(self) -> None:
        progress = time.monotonic()
        while not self._stop.wait(min(1.0, self._timeout / 10)):
            while self._under_way and self._under_way[0].finished():
                self._under_way.popleft()
                progress = time.monotonic()
            if self._under_way and time.monotonic() - max(progress, self._under_way[0].began) > self._timeout:
                return self._end(self._under_way[0].name)

    def _end(self, name: str) -> None:
        print("where this process is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        distributed.end(
            f"{name} has not finished within step_timeout_seconds={self._timeout} (process {distributed.index()} of "
            f"{distributed.count()}): a process, a device or the network is stuck. The same command on all hosts "
            "goes on from the newest checkpoint; raise the limit if the step is only slow."
        )
