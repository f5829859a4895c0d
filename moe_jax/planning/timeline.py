"""The schedule of a compiled program, run on a model of its chip: how long a step takes, and what it waits for.

The text of a program for a TPU lists instructions in the order in which they run. The model has one core, which runs
them one after another; its memory, which moves the bytes of one instruction after another, of copies beside the core
too; and the links of each dimension of the torus, which carry one exchange after another.
"""

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

    def times(self, n: int) -> "Schedule":
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
            return [computation(program.branch(i))]
        return [computation(name) for name in called(i)["call"]] if i.opcode == "call" else None

    return computation(program.module.entry)


def _is_end(i: Instruction, program: Program) -> bool:
    """Whether an instruction waits for something that was started earlier."""
    if i.opcode.endswith("-done"):
        return True
    bodies = called(i)["call"] if i.opcode == "fusion" else []
    inside = (j for name in bodies for j in program.module.computations[name].instructions.values())
    return any('custom_call_target="AsyncCollectiveDone"' in j.attributes for j in inside)


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
        self.pending: dict[str, tuple[float, str]] = {}  # by the name of a value: when it is there, what it waits for
        self.causes: defaultdict[str, float] = defaultdict(float)

    def run(self, i: Instruction, cost: Cost, end: bool) -> None:
        """Issue an instruction, and wait for it unless it runs beside the next ones."""
        waited = [self.pending[name] for name in i.operands if name in self.pending]
        if end:
            for until, cause in waited:
                self._wait(until, cause)
        elif waited:  # a tuple of it, or a fusion that goes on with it
            self.pending[i.name] = max(waited)
        products = self.now + cost.flops.total() / self.chip.flops
        ends = [*(self._exchange(c) for c in cost.collectives.elements()), (self._move(cost.hbm), MEMORY)]
        self._wait(products, COMPUTE)
        if i.opcode.endswith("-start") or any(c.asynchronous for c in cost.collectives):
            self.pending[i.name] = max(ends)
        else:
            for until, cause in ends:
                self._wait(until, cause)

    def spend(self, parts: Sequence[Schedule]) -> None:
        """Run a loop, a branch or a called computation."""
        for part in parts:
            for cause, seconds in part.causes.items():
                self._wait(self.now + seconds, cause)

    def finish(self) -> Schedule:
        """The schedule so far, when all that was started has ended."""
        for until, cause in self.pending.values():
            self._wait(until, cause)
        return Schedule(self.now, dict(self.causes))

    def _wait(self, until: float, cause: str) -> None:
        if until > self.now:
            self.causes[cause] += until - self.now
            self.now = until

    def _move(self, size: float) -> float:
        """When the memory has moved some bytes."""
        if size:
            self.memory = max(self.memory, self.now) + size / self.chip.hbm_bandwidth
        return self.memory if size else self.now

    def _exchange(self, c: Collective) -> tuple[float, str]:
        """When an exchange that starts now has ended, and its name as a cause."""
        one = exchange(c, self.places, self.topology)
        assert one
        start = max([self.now, *(self.links.get(dimension, 0.0) for dimension in one.busy)])
        self.links |= dict.fromkeys(one.busy, start + one.seconds)
        return start + one.seconds, f"{'a' * c.asynchronous}synchronous {c.kind}"
