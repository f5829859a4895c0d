"""Where a run's wall-clock time goes: every second of all its attempts is charged to one kind of work."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

KINDS = ("init", "compile", "data", "step", "evaluation", "checkpoint", "lost")
Kind = str | Callable[[], str]  # one of KINDS, or what says at the end of a block which one it was


class Ledger:
    """Charges the time of every block to one kind: `with ledger("evaluation"): ...`.

    A block inside another takes its time away from the one around it, so the kinds always add up to the wall time.
    Outside all blocks it is `init`. What a block did that an error cut off is lost.

    The devices run behind the program that feeds them: a step takes its time where the program waits for its numbers,
    at a logged step or before a save. So the whole loop is a block of "step", and what is not a step one inside it.

    init: until the first batch is there. compile: until the first step of a start has been done. data: waiting for a
    batch while no device works. step: the other steps. evaluation: held out, and measures beside steps.
    checkpoint: of a save, what holds up the steps. lost: steps that had to be done again, time in which the process was
    stopped, writing the log, and what was cut off.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, stopped_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Start the clock.

        Args:
            now: the time in seconds.
            stopped_seconds: for how long the process has been stopped so far.
        """
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._now = now
        self._stopped_seconds = stopped_seconds
        self._since = now()
        self._stopped = stopped_seconds()
        self._around: list[Kind] = ["init"]  # the blocks that are open, the innermost last
        self._tokens = 0
        self._before = dict(self._seconds)

    @contextmanager
    def __call__(self, kind: Kind) -> Iterator[None]:
        """Charge the time of a block, without that of the blocks in it."""
        self._charge(self._around[-1])
        self._around.append(kind)
        try:
            yield
        except BaseException:
            self._charge("lost")
            raise
        else:
            self._charge(kind)
        finally:
            self._around.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """Those of each kind, up to now."""
        self._charge(self._around[-1])
        return dict(self._seconds)

    def _charge(self, kind: Kind) -> None:
        """Add the time since the last charge to a kind; time in which the process was stopped is lost."""
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

    def count(self, tokens: int) -> int:
        """Add to the tokens trained on since `restart`; returns its argument."""
        self._tokens += tokens
        return tokens

    def restart(self) -> None:
        """Measure speed from here on."""
        self._tokens = 0
        self._before = self.seconds

    def speed(self) -> tuple[float | None, float | None]:
        """(tokens a second, share of the time in which devices waited for data) of the steps since `restart`.

        Evaluation, saves and compilation do not count. Both are None where nothing has been timed.
        """
        seconds = self.seconds
        data, step = (seconds[kind] - self._before[kind] for kind in ("data", "step"))
        if self._tokens == 0 or data + step <= 0:
            return None, None
        return self._tokens / (data + step), data / (data + step)

    @property
    def goodput(self) -> float | None:
        """The share of all time that was spent on steps that count."""
        return _goodput(self.seconds)

    def columns(self) -> dict[str, float | None]:
        """For the log: the seconds of each kind so far, as time/<kind>, and goodput."""
        seconds = self.seconds
        return {f"time/{kind}": round(spent, 3) for kind, spent in seconds.items()} | {"goodput": _goodput(seconds)}

    def summary(self, step: int) -> dict[str, Any]:
        """For run.json: the steps done, all seconds, those of each kind, and goodput."""
        seconds = self.seconds
        time = {kind: round(spent, 3) for kind, spent in seconds.items()}
        return {"step": step, "seconds": round(sum(time.values()), 3), "time": time, "goodput": _goodput(seconds)}


def _goodput(seconds: Mapping[str, float]) -> float | None:
    total = sum(seconds.values())
    return seconds["step"] / total if total else None


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
