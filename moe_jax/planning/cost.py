"""What a compiled program costs: FLOPs, bytes and collectives of an HLO module."""

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from moe_jax.planning.collectives import Collective, collective, is_one_ring
from moe_jax.planning.hlo import Computation, Instruction, called, parse
from moe_jax.planning.kernels import kernel_flops, kernel_name
from moe_jax.planning.loops import trip_count
from moe_jax.planning.products import flops
from moe_jax.planning.traffic import traffic


class Cost(NamedTuple):
    """What running a computation once costs a device.

    flops: by op_name, of matrix products only (a multiply and an add are two). hbm: bytes read and written by
    every scheduled instruction; an upper estimate, because data that stays on the chip is left out only where the text
    shows it. collectives, kernels: how often each runs. untaken: FLOPs and bytes sent of conditional branches that are
    assumed not to run. unknown_loops: op_names of loops whose length is not in the text, counted once. uncosted:
    kernels whose FLOPs are not known. overlapped: by kind of collective, the FLOPs that are scheduled between
    its start and its end, and so run at the same time.
    """

    flops: Counter[str]
    hbm: float
    collectives: Counter[Collective]
    kernels: Counter[str]
    untaken: tuple[float, float]
    unknown_loops: frozenset[str]
    uncosted: frozenset[str]
    overlapped: Counter[str]

    @property
    def sent(self) -> float:
        """Bytes sent to other devices."""
        return sum(c.sent * n for c, n in self.collectives.items())


NOTHING = Cost(Counter(), 0.0, Counter(), Counter(), (0.0, 0.0), frozenset(), frozenset(), Counter())

Trips = Callable[[Instruction, Computation], int | None]  # an estimate for a loop whose length is not in the text


class Program:
    """A compiled program, and what each of its parts costs.

    A conditional counts as its cheapest branch: in this repository a branch that costs more is one more round of
    dispatch, which balanced routing does not need. `untaken` has the difference. Or it is one of `shares`, of which the
    dearest branch runs a share of the time.
    """

    def __init__(
        self,
        text: str,
        trips: Trips = lambda loop, body: None,
        rows: int | None = None,
        shares: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Parse a program.

        Args:
            text: `compiled.as_text()`.
            trips: (loop, body) -> length of a loop whose text does not have it, or None.
            rows: rows of a grouped product that belong to a group, on each device; all, if None.
            shares: by a word in the op_name of a conditional, how much of the time its dearest branch runs.
        """
        self.module = parse(text)
        self.trips = trips
        self.rows = rows
        self.shares = shares
        self._known: dict[tuple[str, bool], Cost] = {}

    def computation(self, name: str, fused: bool = False) -> Cost:
        """The cost of one run of a computation; within a fusion, nothing between its instructions is in memory."""
        if (name, fused) not in self._known:
            here = self.module.computations[name]
            costs = {i.name: self.instruction(i, here, fused) for i in here.instructions.values()}
            self._known[name, fused] = _sum([NOTHING._replace(overlapped=_overlapped(here, costs)), *costs.values()])
        return self._known[name, fused]

    def instruction(self, i: Instruction, here: Computation, fused: bool = False) -> Cost:
        """The cost of an instruction with all that it calls, as often as it calls it."""
        if i.opcode == "while":
            length = self.length(i, here)
            inner = _times(self.computation(called(i)["body"][0], fused), 1 if length is None else length)
            return inner if length is not None else inner._replace(unknown_loops=inner.unknown_loops | {i.op_name})
        if i.opcode == "conditional":
            taken = [_times(self.computation(name, fused), share) for name, share in self.branches(i)]
            untaken = [self.computation(name, fused) for name in called(i)["branch"]] if len(taken) == 1 else []
            return _with_untaken(_sum(taken), untaken)
        callees = called(i)["call"] if i.opcode in CALLERS else []
        inside = (self.computation(name, fused or i.opcode == "fusion") for name in callees)
        return _exchanging(i, _sum([self._own(i, here, fused), *inside]))

    def _own(self, i: Instruction, here: Computation, fused: bool) -> Cost:
        kernel = kernel_name(i)
        of_kernel = kernel_flops(i, here, self.rows)
        total = flops(i, here) + (of_kernel or 0)
        return NOTHING._replace(
            flops=Counter({i.op_name: total}) if total else Counter(),
            hbm=0.0 if fused else float(traffic(i, here, self.module)),
            collectives=Counter([c]) if (c := collective(i, here, self.module)) else Counter(),
            kernels=Counter([kernel]) if kernel else Counter(),
            uncosted=frozenset([kernel]) if of_kernel is None else frozenset(),
        )

    def length(self, loop: Instruction, here: Computation) -> int | None:
        """How often a `while` runs, by its text or else by `trips`."""
        length = trip_count(loop, here, self.module)
        return self.trips(loop, self.module.computations[called(loop)["body"][0]]) if length is None else length

    def branches(self, conditional: Instruction) -> list[tuple[str, float]]:
        """The branches that a conditional is assumed to take, and how much of the time; the cheapest comes first."""
        names = sorted(called(conditional)["branch"], key=lambda name: _price(self.computation(name)))
        share = next((share for word, share in self.shares.items() if word in conditional.op_name), None)
        return [(names[0], 1)] if share is None else [(names[0], 1 - share), (names[-1], share)]


def analyze(text: str, trips: Trips = lambda loop, body: None, rows: int | None = None) -> Cost:
    """The cost of one run of a compiled program, on one device; arguments are those of `Program`."""
    program = Program(text, trips, rows)
    return program.computation(program.module.entry)


CALLERS = ("fusion", "call", "async-start", "call-start")  # the last two run beside what follows them, on another core


def _exchanging(i: Instruction, cost: Cost) -> Cost:
    """The cost of an instruction, which says of the exchanges that it calls whether it waits and by which algorithm."""
    started = i.opcode.endswith("-start")
    one_ring = is_one_ring(i.attributes)
    found: Counter[Collective] = Counter()
    for c, n in cost.collectives.items():
        found[c._replace(asynchronous=c.asynchronous or started, one_ring=c.one_ring or one_ring)] += n
    return cost._replace(collectives=found)


def _overlapped(here: Computation, costs: dict[str, Cost]) -> Counter[str]:
    """By kind of exchange, the FLOPs of all instructions between a start and its end, each counted once."""
    order = list(here.instructions.values())
    inside: dict[str, set[str]] = {}
    for n, start in enumerate(order):
        if not start.opcode.endswith("-start") or not costs[start.name].collectives:
            continue
        ends = (m for m in range(n + 1, len(order)) if order[m].opcode.endswith("-done"))
        end = next((m for m in ends if start.name in order[m].operands), n)
        for c in costs[start.name].collectives:
            inside.setdefault(c.kind, set()).update(i.name for i in order[n + 1 : end])
    return Counter({kind: sum(costs[name].flops.total() for name in names) for kind, names in inside.items()})


def _sum(costs: list[Cost]) -> Cost:
    flops: Counter[str] = Counter()
    collectives: Counter[Collective] = Counter()
    kernels: Counter[str] = Counter()
    overlapped: Counter[str] = Counter()
    for c in costs:
        overlapped.update(c.overlapped)
        flops.update(c.flops)
        collectives.update(c.collectives)
        kernels.update(c.kernels)
    return Cost(
        flops,
        sum(c.hbm for c in costs),
        collectives,
        kernels,
        (sum(c.untaken[0] for c in costs), sum(c.untaken[1] for c in costs)),
        frozenset().union(*(c.unknown_loops for c in costs)),
        frozenset().union(*(c.uncosted for c in costs)),
        overlapped,
    )


def _times(cost: Cost, n: float) -> Cost:
    def scaled(counter: Counter) -> Counter:
        return Counter({k: v * n for k, v in counter.items()})

    return cost._replace(
        flops=scaled(cost.flops),
        hbm=cost.hbm * n,
        collectives=scaled(cost.collectives),
        kernels=scaled(cost.kernels),
        untaken=(cost.untaken[0] * n, cost.untaken[1] * n),
        overlapped=scaled(cost.overlapped),
    )


def _with_untaken(taken: Cost, branches: list[Cost]) -> Cost:
    """The cost of a conditional that runs one of the branches."""
    flops = max((c.flops.total() + c.untaken[0] for c in branches), default=0) - taken.flops.total()
    sent = max((c.sent + c.untaken[1] for c in branches), default=0) - taken.sent
    return taken._replace(untaken=(max(flops, taken.untaken[0]), max(sent, taken.untaken[1])))


def _price(cost: Cost) -> tuple[float, float, float]:
    return cost.flops.total(), cost.sent, cost.hbm
