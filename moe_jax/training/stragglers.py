"""Which host delays the others: the seconds that each process spends alone, compared at every logged step.

The steps of a run are collective, so that one slow host slows all of them equally and no speed shows which it is. What
differs is the time that a process spends on its own while the others wait for it.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence

from moe_jax.runtime import processes
from moe_jax.runtime.ledger import Ledger

# what a process spends time on -> how a sentence says so
KINDS = {"data": "waiting for data", "dispatch": "before dispatching steps", "save": "saving"}
CLEAR_SHARE = 0.1  # a process is clearly late by more than this share of the time since the last logged step ...
CLEAR_RATIO = 2.0  # ... if it also spent this many times as long as the median process


class Stragglers:
    """Compares the processes of a run; all of them call the same methods at the same steps."""

    def __init__(self, ledger: Ledger, before_dispatch: Callable[[], float]) -> None:
        """Gather the names of the hosts.

        Args:
            ledger: of this process.
            before_dispatch: returns this process's seconds so far between the arrival of a batch and its dispatch.
        """
        self._ledger = ledger
        self._before_dispatch = before_dispatch
        self._hosts = processes.gather_json(platform.node())
        self._before = self._spent()
        self._since = time.perf_counter()

    def compare(self) -> tuple[dict[str, float | str], str]:
        """(columns of the log, a sentence if one process is clearly late), of the time since the last comparison.

        One all-gather of three numbers; nothing in a run of one process.
        """
        if len(self._hosts) == 1:
            return {}, ""
        before, self._before = self._before, self._spent()
        since, self._since = self._since, time.perf_counter()
        own = [now - then for now, then in zip(self._before, before, strict=True)]
        return compare(processes.gather_floats(own), self._hosts, self._since - since)

    def _spent(self) -> list[float]:
        """The seconds of this process so far, in the order of KINDS."""
        seconds = self._ledger.seconds
        return [seconds["data"], self._before_dispatch(), seconds["checkpoint"]]


def compare(
    seconds: Sequence[Sequence[float]], hosts: Sequence[str], elapsed: float
) -> tuple[dict[str, float | str], str]:
    """The comparison of gathered numbers.

    Args:
        seconds: of each process, of each of KINDS.
        hosts: the name of each process's host.
        elapsed: the seconds in which these were spent.

    Returns:
        for each kind the seconds of the worst and of the median process (the lower of two middle ones), and the host
        with the largest difference between the two; and a sentence about it if the difference is clear, or "".
    """
    columns: dict[str, float | str] = {}
    found = []
    for kind, of_each in zip(KINDS, zip(*seconds, strict=True), strict=True):
        worst, median = max(of_each), statistics.median_low(of_each)
        columns |= {f"hosts/{kind}": worst, f"hosts/{kind}_median": median}
        found.append((worst - median, worst, median, kind, of_each.index(worst)))
    excess, worst, median, kind, late = max(found)
    columns["hosts/slowest"] = hosts[late]
    if excess <= CLEAR_SHARE * elapsed or worst < CLEAR_RATIO * median:
        return columns, ""
    return columns, (
        f"{hosts[late]} (process {late}) delays the others: {worst:.1f} s {KINDS[kind]} in the last {elapsed:.1f} s, "
        f"the median process {median:.1f} s"
    )
