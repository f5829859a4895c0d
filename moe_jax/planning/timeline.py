"""The schedule of a compiled program, run on a model of its chip: how long a step takes, and what it waits for.

The text of a program for a TPU lists instructions in the order in which they run. The model has one core, which runs
them one after another; its memory, which moves the bytes of one instruction after another, of copies beside the core
too; and the links of each dimension of the torus, which carry one exchange after another. An exchange during which the
core does nothing else passes those beside it, as if links shared their time between a short and a long one.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.planning.collectives import Collective
from moe_jax.planning.cost import Cost, Program
from moe_jax.planning.hlo import Computation, Instruction, called
from moe_jax.planning.topology import Place, Topology, exchange

COMPUTE = "compute"
MEMORY = "memory"


class Schedule(NamedTuple):
    """How long a computation takes, and the same by cause.

    causes: seconds of "compute"; of "memory", beyond the products of an instruction, for bytes that it reads and writes
    or for a copy that is not there yet; of "synchronous KIND", an exchange during which the core does nothing else; of
    "asynchronous KIND", the rest of an exchange that was started earlier.
    """

    seconds: float
    causes: dict[str, float]

    def times(self, n: float) -> "Schedule":
        """The schedule of `n` runs."""
        return Schedule(n * self.seconds, {cause: n * seconds for cause, seconds in self.causes.items()})


def simulate(program: Program, places: Sequence[Place], topology: Topology) -> Schedule:
    """Run a scheduled program once.

    An instruction ends when its products, its bytes and its exchanges have ended, and an asynchronous one is waited for
    where the program does. Loops run as often as in `program`, each time with free links; what a body starts has ended
    when the body ends.

    Args:
        program: a program for `topology.chip`.
        places: of the devices, in the order of the mesh.
        topology: with a chip.
    """
    known: dict[str, Schedule] = {}

    def computation(name: str) -> Schedule:
        if name not in known:
            here = program.module.computations[name]
            core = _Core(places, topology)
            for i in here.instructions.values():
                parts = control(i, here)
                if parts is None:
                    core.run(i, program.instruction(i, here), _is_end(i, program))
                else:
                    core.spend(parts)
            known[name] = core.finish()
        return known[name]

    def control(i: Instruction, here: Computation) -> list[Schedule] | None:
        """The schedules of what an instruction runs on the core, one after another; None if it is one operation."""
        if i.opcode == "while":
            length = program.length(i, here)
            return [computation(called(i)["body"][0]).times(1 if length is None else length)]
        if i.opcode == "conditional":
            return [computation(name).times(share) for name, share in program.branches(i)]
        return [computation(name) for name in called(i)["call"]] if i.opcode == "call" else None

    return computation(program.module.entry)


def _is_end(i: Instruction, program: Program) -> bool:
    """Whether an instruction waits for something that was started earlier."""
    if i.opcode.endswith("-done"):
        return True
    bodies = called(i)["call"] if i.opcode == "fusion" else []
    inside = (j for name in bodies for j in program.module.computations[name].instructions.values())
    return any('custom_call_target="AsyncCollectiveDone"' in j.attributes for j in inside)


@dataclasses.dataclass
class _Pending:
    """Something that runs beside the core: when it ends, what a wait for it is called, the links that it uses."""

    end: float
    cause: str
    links: frozenset[str] = frozenset()


class _Core:
    """The clock of one computation: when its core, its memory and its links are free, and what has not ended."""

    def __init__(self, places: Sequence[Place], topology: Topology) -> None:
        assert topology.chip
        self.chip = topology.chip
        self.places = places
        self.topology = topology
        self.now = 0.0
        self.memory = 0.0  # free from then on
        self.links: dict[str, float] = {}
        self.pending: dict[str, _Pending] = {}  # by the name of a value that is not there yet
        self.causes: defaultdict[str, float] = defaultdict(float)

    def run(self, i: Instruction, cost: Cost, end: bool) -> None:
        """Issue an instruction, and wait for it unless it runs beside the next ones."""
        waited = [self.pending[name] for name in i.operands if name in self.pending]
        if end:
            for one in waited:
                self._wait(one)
        elif waited:  # a tuple of it, or a fusion that continues it
            self.pending[i.name] = max(waited, key=lambda one: one.end)
        products = _Pending(self.now + cost.flops.total() / self.chip.flops, COMPUTE)
        parts = [*(self._exchange(c) for c in cost.collectives.elements()), self._move(cost.hbm)]
        self._wait(products)
        if i.opcode.endswith("-start") or any(c.asynchronous for c in cost.collectives):
            self.pending[i.name] = max(parts, key=lambda one: one.end)
        else:
            for one in parts:
                self._wait(one)

    def spend(self, parts: Sequence[Schedule]) -> None:
        """Run a loop, a branch or a called computation."""
        for part in parts:
            for cause, seconds in part.causes.items():
                self._wait(_Pending(self.now + seconds, cause))

    def finish(self) -> Schedule:
        """The schedule so far, when all that was started has ended."""
        for one in self.pending.values():
            self._wait(one)
        return Schedule(self.now, dict(self.causes))

    def _wait(self, one: _Pending) -> None:
        if one.end > self.now:
            self.causes[one.cause] += one.end - self.now
            self.now = one.end

    def _move(self, size: float) -> _Pending:
        """Bytes that the memory moves after those before them."""
        if size:
            self.memory = max(self.memory, self.now) + size / self.chip.hbm_bandwidth
        return _Pending(self.memory if size else self.now, MEMORY)

    def _exchange(self, c: Collective) -> _Pending:
        """An exchange, which follows those on its links; but one that stops the core passes them, and delays them."""
        one = exchange(c, self.places, self.topology)
        assert one
        free = max([self.now, *(self.links.get(dimension, 0.0) for dimension in one.busy)])
        self.links |= dict.fromkeys(one.busy, free + one.seconds)
        links = frozenset(one.busy)
        if c.asynchronous:
            return _Pending(free + one.seconds, f"asynchronous {c.kind}", links)
        for other in {id(other): other for other in self.pending.values()}.values():
            if other.end > self.now and other.links & links:
                other.end += one.seconds
        return _Pending(self.now + one.seconds, f"synchronous {c.kind}")
