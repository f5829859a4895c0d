"""Times contestants against each other: interleaved rounds, ratios within a round, a table and a JSON file.

Other work on the machine slows all contestants equally only if they run at about the same time. So each round runs
every contestant once, and a ratio is the median over rounds of the ratio in one round. Imports neither jax nor torch.
"""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.command import fail
from moe_jax.data.workers import cores
from moe_jax.runtime.files import output_of, write_json

PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "torchtitan", "maxtext")
PAUSE_SECONDS = 0.01  # threads of the previous contestant may still spin, waiting for work
BUSY = 0.5  # load per thread above which the heading warns

Times = dict[str, list[float]]  # contestant -> seconds in each round


class Spread(NamedTuple):
    """The median of all rounds, and the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """`0.61 (0.55-0.66)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def order(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: each round begins with the next contestant, so that none always follows the same one."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def interleave(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Times:
    """Time every contestant in every round, after one uncounted round.

    Args:
        contestants: name -> function, which returns when its work is done, not when it is queued.
        rounds: counted rounds, at least 1.
        clock: returns seconds.

    Returns:
        name -> seconds of each of the `rounds`, in the contestants' order.
    """
    times: Times = {name: [] for name in contestants}
    for turn in range(-1, rounds):
        for name in order(list(contestants), turn):
            seconds = _seconds(contestants[name], clock)
            if turn >= 0:
                times[name].append(seconds)
    return times


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """The seconds of one call; its result is freed after the clock is read."""
    time.sleep(PAUSE_SECONDS)
    start = clock()
    result = run()
    seconds = clock() - start
    del result
    return seconds


def ratio(times: Times, ours: str, theirs: str) -> Spread:
    """Our speed over theirs, which is above 1 if ours is faster."""
    return Spread.of([b / a for a, b in zip(times[ours], times[theirs], strict=True)])


def best_rates(times: Times, work: Mapping[str, float]) -> list[float]:
    """Work per second of the fastest contestant of each round; `work` is the work of each contestant to consider."""
    rates = ([amount / seconds for seconds in times[name]] for name, amount in work.items())
    return [max(several) for several in zip(*rates, strict=True)]


def ratio_to_limit(times: Times, name: str, work: float, limit: Sequence[float]) -> Spread:
    """A contestant's useful work per second over the limit of the machine in the same round."""
    return Spread.of([work / seconds / best for seconds, best in zip(times[name], limit, strict=True)])


# --- output -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A text table with columns of minimal width; the first is aligned left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def one(line: list[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([line[0].ljust(len(first)), *rest]).rstrip()

    return "\n".join(map(one, lines))


def about(rounds: int) -> dict[str, Any]:
    """The facts without which a figure means nothing: command, machine, versions, rounds."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "rounds": rounds,
    }


def versions() -> dict[str, str]:
    """The versions of Python and of every installed package in `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor's name, the number of threads for jax and torch, and the load of the machine.

    load: mean number of processes running or waiting over the last minute; near 0 at the start on an idle machine.
    """
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"cpu": _cpu_model(), "threads": num_threads(), "load": load}


def num_threads() -> int:
    """The number of processors that this process may use, which is the number of threads of every contestant."""
    return cores()


def _cpu_model() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def heading(facts: Mapping[str, Any]) -> str:
    """The facts of `about` as two lines of text, and a third as a warning if the machine is busy."""
    here = facts["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{here['cpu']}, {here['threads']} threads, {facts['rounds']} rounds", packages]
    if here["load"] and here["load"] > BUSY * here["threads"]:
        lines.append(f"the machine is busy (load {here['load']}), which slows threads that wait for each other most")
    return "\n".join(lines)


def command(measure: Callable[[Any], None]) -> Callable[[list[str]], None]:
    """Decorator for the `main` of a benchmark: checks `--json` first, and ends on bad input with one sentence.

    Args:
        measure: takes the flags; measures, prints and writes.
    """

    def main(_: list[str]) -> None:
        from absl import flags

        try:
            if flags.FLAGS.json:
                output_of(flags.FLAGS.json, "--json")
            measure(flags.FLAGS)
        except (ValueError, OSError) as error:
            fail(str(error))

    return main


def save(path: str, content: Mapping[str, Any]) -> None:
    """Write the figures as JSON, if there is a path."""
    if path:
        write_json(Path(path), content)


def define_flags(rounds: int = 8, least: int = 1) -> None:
    """Define `--rounds` and `--json`, which every benchmark has."""
    from absl import flags

    flags.DEFINE_integer("rounds", rounds, "The number of times that each contestant is timed.", lower_bound=least)
    flags.DEFINE_string("json", "", "A file to write the figures to.")
