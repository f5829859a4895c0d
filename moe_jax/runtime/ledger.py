"""Where a run's wall-clock time goes: every second of all its attempts is charged to one kind of work."""

import time
from collections.abc import Callable, Mapping
from typing import Any

KINDS = ("init", "compile", "data", "step", "evaluation", "checkpoint", "lost")


class Ledger:
    """Charges time as it passes, so that the kinds always add up to the wall time.

    The devices lag behind the program that feeds them. So time is charged where the program waits for them anyway: at a
    logged step, before an evaluation, before a save. A compilation, or a wait of the program alone, is charged where it
    happens.

    init: until the first batch is loaded. compile: until the first step of an attempt is done. data: waiting for a
    batch while no device works. step: the other steps. evaluation: on held-out text, and measurements beside steps.
    checkpoint: the part of a save that delays steps. lost: steps that had to be repeated, time in which the process was
    stopped, and everything else.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, stopped_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Start the clock.

        Args:
            now: the time in seconds.
            stopped_seconds: for how long the process has been stopped so far.
        """
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._now, self._stopped_seconds = now, stopped_seconds
        self._since = now()
        self._stopped = stopped_seconds()
        self._tokens = 0
        self._before = dict(self.seconds)

    def charge(self, kind: str) -> None:
        """Charge the time since the last call to a kind; time in which the process was stopped is lost."""
        now = self._now()
        stopped = self._stopped_seconds()
        lost = min(stopped - self._stopped, now - self._since)
        self.seconds[kind] += now - self._since - lost
        self.seconds["lost"] += lost
        self._since = now
        self._stopped = stopped

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of earlier attempts."""
        for kind, spent in seconds.items():
            self.seconds[kind] += spent

    def count(self, tokens: int) -> int:
        """Add to the tokens trained on since `restart`; returns its argument."""
        self._tokens += tokens
        return tokens

    def restart(self) -> None:
        """Measure speed from here on."""
        self._tokens = 0
        self._before = dict(self.seconds)

    def speed(self) -> tuple[float | None, float | None]:
        """(tokens a second, share of the time in which devices waited for data) of the steps since `restart`.

        Evaluation, saves and compilation do not count. Both are None where nothing has been timed.
        """
        data, step = (self.seconds[kind] - self._before[kind] for kind in ("data", "step"))
        if self._tokens == 0 or data + step <= 0:
            return None, None
        return self._tokens / (data + step), data / (data + step)

    @property
    def goodput(self) -> float | None:
        """The share of all time that was spent on steps that count."""
        total = sum(self.seconds.values())
        return self.seconds["step"] / total if total else None

    def columns(self) -> dict[str, float | None]:
        """Columns of the log: the seconds of each kind so far, as time/<kind>, and goodput."""
        return {f"time/{kind}": round(spent, 3) for kind, spent in self.seconds.items()} | {"goodput": self.goodput}

    def summary(self, step: int) -> dict[str, Any]:
        """The entries of run.json: steps done, seconds in all and by kind, and goodput."""
        time = {kind: round(spent, 3) for kind, spent in self.seconds.items()}
        return {"step": step, "seconds": round(sum(time.values()), 3), "time": time, "goodput": self.goodput}


def of_earlier_attempts(
    step: int, saved: Mapping[str, float], ended: Mapping[str, Any], logged: Mapping[str, Any]
) -> dict[str, float]:
    """The seconds of the attempts before this one, as far as their files record them; work to be repeated is lost.

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
