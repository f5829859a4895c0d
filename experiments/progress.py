"""How many runs of a sweep are done, and how long the others will take."""

import time
from collections.abc import Callable


class Progress:
    """Prints how many runs are done, and the time that the others will take at the rate so far.

    The rate is the wall-clock time of this command over the steps of the runs that it ended, with compilation. A run
    that failed or was resumed counts as whole, so the time left is then too short.
    """

    def __init__(self, steps: list[int], clock: Callable[[], float] = time.monotonic) -> None:
        """Args: steps: of each run in order, or tokens, 0 for those that are done; clock: seconds."""
        self._steps, self._clock = steps, clock
        self._start = clock()
        self._done = 0  # runs

    def next(self) -> str:
        """Count the next run as done, and print and return a line, "" if the run was not trained or was the last."""
        trained = self._steps[self._done]
        self._done += 1
        left = sum(self._steps[self._done :])
        if not trained or not left:
            return ""
        rate = (self._clock() - self._start) / sum(self._steps[: self._done])
        line = f"{self._done} of {len(self._steps)} runs done, about {time_text(rate * left)} left"
        print(line, flush=True)
        return line


def time_text(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
