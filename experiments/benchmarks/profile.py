"""Where the wall time of our train step goes, by part and by operation, from the profiler's trace of the compiled step.

An operation is an instruction of the compiled program. At every moment the wall time is shared equally by the
operations that run at that moment, on whatever threads; a moment at which none runs is idle. The part of an operation
follows from the named scopes of the code that it comes from. So the parts add up to the step, and none is timed alone.
"""

import collections
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config import Config

# part -> the words of scopes that belong to it; the first that occurs in the name of an operation counts
PARTS = {
    "head": ("head",),
    "optimizer": ("optimizer",),
    "attention": ("attention",),
    "router": ("router",),
    "experts": ("experts", "dispatch", "combine"),
}
REST, IDLE = "rest", "idle"
# a part -> the kinds of `moe_jax.model.cost.parts` whose FLOPs it has
FLOPS_OF = {
    "attention": ("attention", "attention scores"),
    "experts": ("routed experts", "shared experts", "dense feed-forward"),
    "head": ("head",),
    "router": ("router",),
}
FORWARD_AND_BACKWARD = 3  # times the FLOPs of a forward pass
CONTAINERS = ("while", "call", "conditional", "ThunkExecutor", "end: ")  # events that contain other operations


class Event(NamedTuple):
    """An operation on a thread, in seconds of the trace."""

    name: str
    start: float
    stop: float


class Profile(NamedTuple):
    """Seconds of a step: in all, by part with the idle rest, by operation; and how many processors were at work."""

    step: float
    parts: dict[str, float]
    operations: dict[tuple[str, str], float]  # (part, operation)
    processors: float


def profile(step: Callable[[], Any], part_of: Mapping[str, str], steps: int) -> Profile:
    """Trace `steps` steps after two that are not traced.

    Args:
        step: takes one step and waits for it.
        part_of: operation -> part, see `parts_of`.
        steps: at least 1.
    """
    import jax

    for _ in range(2):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started, worked = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            wall, work = time.perf_counter() - started, time.process_time() - worked
        (trace,) = Path(folder).rglob("*.xplane.pb")
        events = list(_operations(jax.profiler.ProfileData.from_file(str(trace)), part_of))
    operations: dict[tuple[str, str], float] = collections.defaultdict(float)
    for name, seconds in shares(events).items():
        operations[part_of[name], name] += seconds / steps
    parts = dict.fromkeys([*PARTS, REST], 0.0)
    for (part, _), seconds in operations.items():
        parts[part] += seconds
    parts[IDLE] = wall / steps - sum(parts.values())
    return Profile(wall / steps, parts, dict(operations), work / wall)


def _operations(data: Any, known: Mapping[str, str]) -> Iterator[Event]:
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in known and not event.name.startswith(CONTAINERS):
                    yield Event(event.name, 1e-9 * event.start_ns, 1e-9 * (event.start_ns + event.duration_ns))


def shares(events: list[Event]) -> dict[str, float]:
    """The wall time of every operation: each moment is shared equally by the events that run at that moment."""
    moments = sorted([(e.start, True, e.name) for e in events] + [(e.stop, False, e.name) for e in events])
    running: collections.Counter[str] = collections.Counter()
    total: dict[str, float] = collections.defaultdict(float)
    before = 0.0
    for moment, begins, name in moments:
        for other, times in running.items():
            total[other] += (moment - before) * times / running.total()
        before = moment
        running[name] += 1 if begins else -1
        running += collections.Counter()  # drops those that no longer run
    return dict(total)


def parts_of(program: str) -> dict[str, str]:
    """Operation -> part, from the text of a compiled program."""
    found = {}
    for line in program.splitlines():
        if instruction := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            scope = re.search(r'op_name="([^"]*)"', line)
            words = set(re.findall(r"\w+", scope[1])) if scope else set()
            fits = (part for part, scopes in PARTS.items() if words.intersection(scopes))
            found[instruction[1]] = next(fits, REST)
    return found


def flops_of_parts(config: Config) -> dict[str, float]:
    """The model FLOPs of a step, forward and backward, of the parts that multiply matrices."""
    from moe_jax.model.cost import parts

    of_kind = {part.name: part.flops for part in parts(config)}
    tokens = config.batch_size * config.sequence_length
    return {
        part: float(FORWARD_AND_BACKWARD * tokens * sum(of_kind.get(kind, 0) for kind in kinds))
        for part, kinds in FLOPS_OF.items()
    }
