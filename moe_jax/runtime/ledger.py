"""Where a run's wall-clock time goes: every second is charged to one kind of work, over all its attempts."""

import time
from collections.abc import Callable, Mapping
from typing import Any

KINDS = ("init", "compile", "data", "step", "evaluation", "checkpoint", "lost")


class Ledger:
    """Charges time as it passes: the kinds add up to the wall time, whatever is charged when.

    The devices run behind the program that feeds them, so it charges where it waits for them anyway: at a logged
    step, before an evaluation, before a save. A compilation or a wait of the program alone shows where it happens.

    init: until the first batch is there. compile: until the first step of a start has been done. data: waiting for a
    batch while no device works. step: the other steps. evaluation: held out, and measures beside steps.
    checkpoint: of a save, what holds up the steps. lost: steps that had to be done again, time in which the process was
    stopped, and all else.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, stopped_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Time counts from here on.

        Args:
            now: seconds.
            stopped_seconds: of them those in which the process was stopped, so far.
        """
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._now, self._stopped_seconds = now, stopped_seconds
        self._since, self._stopped = now(), stopped_seconds()
        self._tokens, self._before = 0, dict(self.seconds)

    def charge(self, kind: str) -> None:
        """What went by since the last charge was of this kind; time in which the process was stopped is lost."""
        now, stopped = self._now(), self._stopped_seconds()
        lost = min(stopped - self._stopped, now - self._since)
        self.seconds[kind] += now - self._since - lost
        self.seconds["lost"] += lost
        self._since, self._stopped = now, stopped

    def carry(self, seconds: Mapping[str, float]) -> None:
        """Add what earlier attempts spent."""
        for kind, spent in seconds.items():
            self.seconds[kind] += spent

    def count(self, tokens: int) -> int:
        """Add tokens to those trained on since `restart`; gives them back."""
        self._tokens += tokens
        return tokens

    def restart(self) -> None:
        """Measure speed from here on."""
        self._tokens, self._before = 0, dict(self.seconds)

    def speed(self) -> tuple[float | None, float | None]:
        """(tokens a second, share of the time in which devices waited for data) of the steps since `restart`.

        Without evaluation, saves and compilation; None where nothing has been timed.
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
        """For the log: the seconds of each kind so far, as time/<kind>, and goodput."""
        return {f"time/{kind}": round(spent, 3) for kind, spent in self.seconds.items()} | {"goodput": self.goodput}

    def summary(self, step: int) -> dict[str, Any]:
        """For run.json: the steps done, all seconds, those of each kind, and goodput."""
        time = {kind: round(spent, 3) for kind, spent in self.seconds.items()}
        return {"step": step, "seconds": round(sum(time.values()), 3), "time": time, "goodput": self.goodput}


def of_earlier_attempts(
    step: int, saved: Mapping[str, float], ended: Mapping[str, Any], logged: Mapping[str, Any]
) -> dict[str, float]:
    """What the attempts before this one spent, as far as their files tell; what is to be done again is lost.

    Args:
        step: the steps done by the checkpoint this attempt goes on from.
        saved: seconds by kind in that checkpoint.
        ended: run.json, of the last attempt that ended well; it knows of the seconds after its last save.
        logged: the newest line of metrics.jsonl, of the last attempt that got so far.
    """
    at_end = _known(ended.get("time") or {})
    kept = at_end if ended.get("step") == step else _known(saved)
    at_log = _known({kind: logged.get(f"time/{kind}") for kind in KINDS})
    spent = max(sum(at_end.values()), sum(at_log.values()))
    return kept | {"lost": kept["lost"] + max(0.0, spent - sum(kept.values()))}


def _known(seconds: Mapping[str, Any]) -> dict[str, float]:
    return {kind: float(seconds.get(kind) or 0.0) for kind in KINDS}
