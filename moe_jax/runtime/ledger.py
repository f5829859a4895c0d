"""Account for a run's wall-clock time: every second of all its attempts is charged to one kind of work."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

KINDS = ("init", "compile", "data", "step", "evaluation", "checkpoint", "rolled_back", "lost")
Kind = str | Callable[[], str]  # one of KINDS, or a function that returns one at the end of a block


class Ledger:
    """Charges the time of every block to one kind: `with ledger("evaluation"): ...`.

    The time of a nested block is not charged to the block around it, so the kinds always add up to the wall time. Time
    outside all blocks is charged to `init`. The time of a block that an error cut off is lost.

    The devices lag behind the program that feeds them, so the time of a step passes where the program waits for its
    numbers, at a logged step or before a save. So the whole loop is a block of "step", and all else is nested in it.

    init: until the first batch is loaded. compile: until the first step of a start is done. data: waiting for a batch
    while no device works. step: all other steps. evaluation: on held-out text, and measures beside steps. checkpoint:
    the part of a save that delays the steps. rolled_back: steps, waiting and evaluations that a run went back from.
    lost: repeated steps, time in which the process was stopped, writing the log, and blocks that were cut off.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, stopped_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Start the clock.

        Args:
            now: the time in seconds.
            stopped_seconds: the seconds for which the process has been stopped so far.
        """
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._now = now
        self._stopped_seconds = stopped_seconds
        self._since = now()
        self._stopped = stopped_seconds()
        self._open: list[Kind] = ["init"]  # the kinds of the open blocks, the innermost last
        self._tokens = 0
        self._before = dict(self._seconds)

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        """Charge the time of a block to a kind, without the time of nested blocks."""
        self._charge(self._open[-1])
        self._open.append(kind)
        try:
            yield
        except BaseException:
            self._charge("lost")
            raise
        else:
            self._charge(kind)
        finally:
            self._open.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each kind up to now."""
        self._charge(self._open[-1])
        return dict(self._seconds)

    def _charge(self, kind: Kind) -> None:
        """Charge the time since the last charge to a kind; time in which the process was stopped is lost."""
        now = self._now()
        lost = min(self._stopped_seconds() - self._stopped, now - self._since)
        self._seconds[kind if isinstance(kind, str) else kind()] += now - self._since - lost
        self._seconds["lost"] += lost
        self._since = now
        self._stopped += lost

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of earlier attempts."""
        for kind, spent in seconds.items():
            self._seconds[kind] += spent

    def roll_back(self, before: Mapping[str, float]) -> None:
        """Charge to `rolled_back` what was spent on steps since a checkpoint, whose seconds by kind are given."""
        for kind in ("data", "step", "evaluation"):
            spent = max(0.0, self.seconds[kind] - before.get(kind, 0.0))
            self._seconds[kind] -= spent
            self._seconds["rolled_back"] += spent

    def count(self, tokens: int) -> int:
        """Add to the tokens trained on since `restart`; returns its argument."""
        self._tokens += tokens
        return tokens

    def restart(self) -> None:
        """Begin to measure speed."""
        self._tokens = 0
        self._before = self.seconds

    def speed(self) -> tuple[float | None, float | None]:
        """(tokens a second, share of the time in which devices waited for data) of the steps since `restart`.

        Evaluation, saves and compilation are not counted. Both are None if no step has been timed.
        """
        seconds = self.seconds
        data, step = (seconds[kind] - self._before[kind] for kind in ("data", "step"))
        if self._tokens == 0 or data + step <= 0:
            return None, None
        return self._tokens / (data + step), data / (data + step)

    @property
    def goodput(self) -> float | None:
        """The share of all time that was spent on steps, without those that were lost."""
        return _goodput(self.seconds)

    def columns(self) -> dict[str, float | None]:
        """The columns of the log: the seconds of each kind so far, as time/<kind>, and goodput."""
        seconds = self.seconds
        return {f"time/{kind}": round(spent, 3) for kind, spent in seconds.items()} | {"goodput": _goodput(seconds)}

    def summary(self, step: int) -> dict[str, Any]:
        """The entries of run.json: the steps done, all seconds, the seconds of each kind, and goodput."""
        seconds = self.seconds
        time = {kind: round(spent, 3) for kind, spent in seconds.items()}
        return {"step": step, "seconds": round(sum(time.values()), 3), "time": time, "goodput": _goodput(seconds)}


def _goodput(seconds: Mapping[str, float]) -> float | None:
    total = sum(seconds.values())
    return seconds["step"] / total if total else None


def of_earlier_attempts(
    step: int, saved: Mapping[str, float], ended: Mapping[str, Any], logged: Mapping[str, Any]
) -> dict[str, float]:
    """The seconds of all earlier attempts, as far as their files record them; work to be repeated is lost.

    Args:
        step: the steps done by the checkpoint that this attempt resumes.
        saved: seconds by kind in that checkpoint.
        ended: run.json of the last attempt that ended normally; it includes the seconds after its last save.
        logged: the newest line of metrics.jsonl.
    """
    at_end = _known(ended.get("time") or {})
    counted = at_end if ended.get("step") == step else _known(saved)
    at_log = _known({kind: logged.get(f"time/{kind}") for kind in KINDS})
    spent = max(sum(at_end.values()), sum(at_log.values()))
    return counted | {"lost": counted["lost"] + max(0.0, spent - sum(counted.values()))}


def _known(seconds: Mapping[str, Any]) -> dict[str, float]:
    return {kind: float(seconds.get(kind) or 0.0) for kind in KINDS}
