"""What a compiled program costs: FLOPs, bytes and collectives of an HLO module."""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_jax.planning.hlo import Computation, Instruction, Leaf, Module, _index, called, parse

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


# instructions that neither read nor write memory: names for what is there, or control flow
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "domain"}


FREE |= {
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "async-start",
    "async-update",
    "iota",
}


# custom calls that stand for no kernel
BOOKKEEPING = {"AllocateBuffer", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "Sharding"}


BOOKKEEPING |= {"PrepareAsyncCallStart", "PrepareAsyncCallDone", "AssumeGatherIndicesInBound"}


BOOKKEEPING |= {"SPMDFullToShardShape", "SPMDShardToFullShape", "xla.sdy.FuncResultSharding"}


class Collective(NamedTuple):
    """An exchange between devices, as one device sees it.

    bytes: what it puts in (all-gather: what it gets out), once. group: ids of the devices of the first group, in
    the order of the mesh. asynchronous: other work may be scheduled between its start and its end.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    asynchronous: bool
    shape: str
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that leave the device: (n-1)/n of what is gathered, scattered or exchanged, twice for all-reduce."""
        n = len(self.group)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        return self.bytes * (n - 1) / max(n, 1) * (2 if self.kind == "all-reduce" else 1)


class Cost(NamedTuple):
    """What running a computation once costs a device.

    flops: by op_name, of matrix products only (a multiply and an add are two). hbm: bytes read and written by
    every scheduled instruction, an upper estimate, for what a kernel keeps on the chip is counted where XLA says
    so only. collectives, kernels: how often each runs. untaken: FLOPs and bytes sent of conditional branches that
    were taken not to run. unknown_loops: op_names of loops whose length is not in the text, counted once.
    uncosted: kernels that do not tell their FLOPs. beside: by kind of collective, the FLOPs that are scheduled
    between its start and its end, which run while it is under way.
    """

    flops: Counter[str]
    hbm: float
    collectives: Counter[Collective]
    kernels: Counter[str]
    untaken: tuple[float, float]
    unknown_loops: frozenset[str]
    uncosted: frozenset[str]
    beside: Counter[str]

    @property
    def sent(self) -> float:
        """Bytes sent to other devices."""
        return sum(c.sent * n for c, n in self.collectives.items())


NOTHING = Cost(Counter(), 0.0, Counter(), Counter(), (0.0, 0.0), frozenset(), frozenset(), Counter())


Trips = Callable[[Instruction, Computation], int | None]  # a guess at how often a loop runs that the text does not tell


def analyze(text: str, trips: Trips = lambda loop, body: None) -> Cost:
    """The cost of one run of a compiled program, on one device.

    A conditional counts as its cheapest branch: in this repository a branch that costs more is one more round of
    dispatch, which balanced routing does not take. What that leaves out is in `untaken`.

    Args:
        text: `compiled.as_text()`.
        trips: asked for the length of loops whose text does not tell it.
    """
    module = parse(text)
    memo: dict[tuple[str, bool], Cost] = {}

    def cost(name: str, fused: bool) -> Cost:
        if (name, fused) not in memo:
            here = module.computations[name]
            costs = {i.name: one(i, here, fused) for i in here.instructions.values()}
            memo[name, fused] = _sum([NOTHING._replace(beside=_beside(here, costs)), *costs.values()])
        return memo[name, fused]

    def one(i: Instruction, here: Computation, fused: bool) -> Cost:
        own = NOTHING._replace(
            flops=Counter({i.op_name: f}) if (f := flops(i, here)) else Counter(),
            hbm=0.0 if fused else float(traffic(i, here, module)),
            collectives=Counter([c]) if (c := collective(i, here, module)) else Counter(),
        )
        if kernel := kernel_name(i):
            own = own._replace(kernels=Counter([kernel]))
            if "flops" not in kernel_estimate(i):
                own = own._replace(uncosted=frozenset([kernel]))
        if i.opcode == "while":
            length = trip_count(i, here, module)
            body = module.computations[called(i)["body"][0]]
            length = trips(i, body) if length is None else length
            inner = _times(cost(body.name, fused), 1 if length is None else length)
            return inner if length is not None else inner._replace(unknown_loops=inner.unknown_loops | {i.op_name})
        if i.opcode == "conditional":
            return _cheapest([cost(name, fused) for name in called(i)["branch"]])
        callees = called(i)["call"] if i.opcode in CALLERS else []
        return _sum([own, *(cost(n, fused or i.opcode == "fusion") for n in callees)])

    return cost(module.entry, False)


CALLERS = ("fusion", "call", "async-start")


def _beside(here: Computation, costs: dict[str, Cost]) -> Counter[str]:
    """The FLOPs of the instructions between the start and the end of exchanges, each once for a kind."""
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
    beside: Counter[str] = Counter()
    for c in costs:
        beside.update(c.beside)
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
        beside,
    )


def _times(cost: Cost, n: int) -> Cost:
    def scaled(counter: Counter) -> Counter:
        return Counter({k: v * n for k, v in counter.items()})

    return cost._replace(
        flops=scaled(cost.flops),
        hbm=cost.hbm * n,
        collectives=scaled(cost.collectives),
        kernels=scaled(cost.kernels),
        untaken=(cost.untaken[0] * n, cost.untaken[1] * n),
        beside=scaled(cost.beside),
    )


def _cheapest(branches: list[Cost]) -> Cost:
    taken = min(branches, key=lambda c: (c.flops.total(), c.sent, c.hbm))
    flops = max(c.flops.total() + c.untaken[0] for c in branches) - taken.flops.total()
    sent = max(c.sent + c.untaken[1] for c in branches) - taken.sent
    return taken._replace(untaken=(max(flops, taken.untaken[0]), max(sent, taken.untaken[1])))


# --- loops ----------------------------------------------------------------------------------------------------


def trip_count(loop: Instruction, here: Computation, module: Module) -> int | None:
    """How often a `while` runs: what XLA says, or the constant its counter is compared with; None if neither.

    A counter goes up by one, as those of `lax.scan` and `lax.fori_loop` do.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[called(loop)["condition"][0]]
    compare, where = condition.root, condition
    outer: tuple[str, ...] | None = None
    if compare.opcode == "fusion":
        outer, where = compare.operands, module.computations[called(compare)["call"][0]]
        compare = where.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None

    def resolve(name: str) -> Instruction:
        i = where.instructions[name]
        if outer is not None and i.opcode == "parameter":
            return condition.instructions[outer[int(i.literal)]]
        return i

    counter, limit = (resolve(name) for name in compare.operands)
    if _index(counter) is None or counter.leaves[0].dtype not in ("s32", "s64", "u32", "u64"):
        return None
    first = _initial(counter, loop, here)
    last = _constant(limit)
    last = _initial(limit, loop, here) if last is None else last
    return None if last is None else max(0, last - (first or 0))


def _constant(i: Instruction) -> int | None:
    return int(i.literal) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal) else None


def _initial(i: Instruction, loop: Instruction, here: Computation) -> int | None:
    """The constant that an element of the loop's tuple starts from."""
    index, start = _index(i), here.instructions[loop.operands[0]]
    if index is None or start.opcode != "tuple":
        return None
    value = here.instructions[start.operands[index]]
    while value.opcode in ("copy", "bitcast", "convert") and value.operands:
        value = here.instructions[value.operands[0]]
    return _constant(value)


def saved_bytes(text: str) -> int:
    """Bytes that one loop writes and a later loop reads: what a scan over layers keeps for its backward pass.

    The largest sum over the computations, so that an outer loop over micro-batches does not hide it.
    """
    module = parse(text)
    return max(_saved(c, module) for c in module.computations.values())


def _saved(here: Computation, module: Module) -> int:
    found: dict[tuple[str, int], int] = {}
    for loop in here.instructions.values():
        if loop.opcode != "while" or here.instructions[loop.operands[0]].opcode != "tuple":
            continue
        for operand in here.instructions[loop.operands[0]].operands:
            source = here.instructions[operand]
            while source.opcode in ("bitcast", "copy", "copy-done", "copy-start") and source.operands:
                source = here.instructions[source.operands[0]]
            index = _index(source)
            if index is None:
                continue
            maker = here.instructions[source.operands[0]]
            if maker.opcode == "while" and not _passes(maker, index, module):
                found[maker.name, index] = sum(leaf.bytes for leaf in source.leaves)
    return sum(found.values())


def _passes(loop: Instruction, index: int, module: Module) -> bool:
    """Whether a loop hands an element of its tuple on as it got it."""
    body = module.computations[called(loop)["body"][0]]
    if body.root.opcode != "tuple" or index >= len(body.root.operands):
        return True
    value = body.instructions[body.root.operands[index]]
    return value.opcode == "get-tuple-element" and _index(value) == index


# --- FLOPs ----------------------------------------------------------------------------------------------------


def flops(i: Instruction, here: Computation) -> int:
    """Of one dot, convolution, or kernel that tells them; everything else is 0."""
    if i.opcode == "dot":
        left = here.instructions[i.operands[0]].leaves[0].dims
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        sizes = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2 * math.prod(i.leaves[0].dims) * math.prod(sizes)
    if i.opcode == "convolution":
        return _convolution(i, here)
    return kernel_estimate(i).get("flops", 0)


def _convolution(i: Instruction, here: Computation) -> int:
    """2 x outputs x input features x kernel positions that meet an input (TPU writes batched products so)."""
    left, right = (here.instructions[name].leaves[0].dims for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes
    window = _window(i.attributes)
    out = i.leaves[0].dims
    features = right[labels[2].index("i")]
    total = 2 * features * out[labels[3].index("b")] * out[labels[3].index("f")]
    for n in range(len(labels[1]) - 2):
        where = [label.index(str(n)) for label in labels.groups()]
        total *= meetings(left[where[0]], right[where[1]], out[where[2]], **window(n))
    return total


def _window(attributes: str) -> Callable[[int], dict[str, int]]:
    """The window's settings of spatial dimension n."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(p.split("=") for p in found[1].split()) if found else {}

    def of(n: int) -> dict[str, int]:
        def get(key: str, default: str) -> str:
            return parts[key].split("x")[n] if key in parts else default

        return {
            "stride": int(get("stride", "1")),
            "low": int(get("pad", "0_0").split("_")[0]),
            "left_dilation": int(get("lhs_dilate", "1")),
            "right_dilation": int(get("rhs_dilate", "1")),
        }

    return of


@functools.lru_cache(maxsize=4096)
def meetings(
    left: int, right: int, out: int, stride: int = 1, low: int = 0, left_dilation: int = 1, right_dilation: int = 1
) -> int:
    """Pairs (output, kernel position) of one spatial dimension that meet an input element, not padding or a gap."""
    span = (left - 1) * left_dilation + 1

    def meet(at: int) -> bool:
        return 0 <= at < span and at % left_dilation == 0

    if right == 1:
        return sum(meet(o * stride - low) for o in range(out))
    return sum(meet(o * stride + k * right_dilation - low) for o in range(out) for k in range(right))


def kernel_name(i: Instruction) -> str:
    """The name of a kernel that is not XLA's own code, or nothing."""
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    if i.opcode != "custom-call" or not target or target[1] in BOOKKEEPING:
        return ""
    own = re.search(r"(?:^|/)(?:jit\()?([^/()]*)\)?(?:/pallas_call)?$", i.op_name)
    return own[1] if target[1] == "tpu_custom_call" and own and own[1] else target[1]


def kernel_estimate(i: Instruction) -> dict[str, int]:
    """What a kernel says of its own cost."""
    found = re.search(r'"cost_estimate":\{([^}]*)\}', i.attributes) if i.opcode == "custom-call" else None
    return {key: int(value) for key, value in re.findall(r'"(\w+)":"?(\d+)', found[1])} if found else {}


# --- collectives ----------------------------------------------------------------------------------------------


def collective(i: Instruction, here: Computation, module: Module) -> Collective | None:
    """The exchange an instruction starts, or None: a group of one device exchanges nothing.

    TPU writes an asynchronous one as three fusions that each hold the instruction: only the first counts. It
    writes a reduce-scatter as a fusion of an all-reduce and a slice of its result.
    """
    kind = i.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    others = here.instructions.values()
    targets = {t[1] for o in others if (t := re.search(r'custom_call_target="([^"]*)"', o.attributes))}
    chained = "chain_id=" in i.attributes
    if chained and "AsyncCollectiveStart" not in targets:
        return None
    inputs = [leaf for name in i.operands for leaf in here.instructions[name].leaves]
    out = i.leaves[len(inputs) :] if i.opcode.endswith("-start") and len(i.leaves) > len(inputs) else i.leaves
    group = replica_group(i.attributes) or tuple(range(module.devices))
    if len(group) == 1:
        return None
    if kind == "all-reduce" and (scattered := _slice_of(i, here)):
        kind, out = "reduce-scatter", scattered
    moved = [leaf for leaf in (out if kind == "all-gather" else inputs) if leaf.dims or kind != "all-gather"]
    shape = ", ".join(f"{leaf.dtype}{list(leaf.dims)}".replace(" ", "") for leaf in moved)
    started = i.opcode.endswith("-start") or chained or here.name.startswith("async_")
    return Collective(kind, sum(leaf.bytes for leaf in moved), group, started, shape, i.op_name)


def _slice_of(i: Instruction, here: Computation) -> tuple[Leaf, ...]:
    """The slice of an all-reduce that a fusion keeps as its result, if that is all it keeps."""
    root = here.root
    while root.opcode in ("bitcast", "copy", "convert") and root.operands:
        root = here.instructions[root.operands[0]]
    if root.opcode == "dynamic-slice" and root.operands[0] == i.name:
        return root.leaves
    return ()


def replica_group(attributes: str) -> tuple[int, ...]:
    """The ids of the first group: `{{0,1},{2,3}}`, `[2,2]<=[4]`, `mesh['a'=2,'b'=2] {'b'}`, or pairs of a permute.

    Nothing if the instruction names none, which means all devices.
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(d) for d in listed[1].split(","))
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", attributes)
    if iota:
        return tuple(_listed(iota[3], iota[4], n) for n in range(int(iota[2])))
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}", attributes)
    if mesh:
        group = _mesh_group(mesh[1], mesh[4])
        return tuple(_listed(mesh[2], mesh[3], n) for n in group) if mesh[2] else group
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"replica groups are written in a way that is not known here: {attributes[:200]}")
    return ()


_IOTA = r"\[([\d,]*)\](?:T\(([\d,]*)\))?"  # dimensions and their order


def _listed(sizes: str, transposed: str | None, position: int) -> int:
    """Element `position` of a list of devices that is written as dimensions and their order."""
    dims = [int(d) for d in sizes.split(",")]
    order = [int(d) for d in transposed.split(",")] if transposed else list(range(len(dims)))
    return _transposed(dims, order, position)


def _transposed(dims: list[int], order: list[int], position: int) -> int:
    """Element `position` of `iota(prod(dims)).reshape(dims).transpose(order)`, flattened."""
    value = 0
    for axis in reversed(order):
        position, at = divmod(position, dims[axis])
        value += at * math.prod(dims[axis + 1 :])
    return value


def _mesh_group(axes: str, used: str) -> tuple[int, ...]:
    """The first group of a mesh: its ids vary along the named axes, `'x':(m)k` being a part of axis x."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    strides, names = {}, list(sizes)
    for n, name in enumerate(names):
        strides[name] = math.prod(sizes[other] for other in names[n + 1 :])
    group = [0]
    for name, major, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", used):
        count = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(major) * count) if size else 1)
        group = [at + k * step for at in group for k in range(count)]
    return tuple(group)


# --- memory traffic -------------------------------------------------------------------------------------------


def traffic(i: Instruction, here: Computation, module: Module) -> int:
    """Bytes of main memory that an instruction reads and writes; a slice reads only itself, not what it is cut of."""
    if i.opcode in FREE or i.opcode.endswith("-done"):
        return 0
    operands = [here.instructions[name].leaves for name in i.operands if name in here.instructions]
    if i.opcode.endswith("-start") and i.opcode.removesuffix("-start") in ("copy", "slice", "dynamic-slice"):
        moved = i.leaves[0 if i.opcode == "copy-start" else len(operands)] if i.leaves else None
        source = operands[0][0]
        return moved.hbm + (0 if source.space else moved.bytes) if moved else 0
    if i.opcode == "fusion":
        return _fusion_traffic(i, operands, module.computations[called(i)["call"][0]], module)
    written = sum(leaf.hbm for leaf in i.leaves)
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        source = operands[0][0]
        return written + (0 if source.space else sum(leaf.bytes for leaf in i.leaves))
    if i.opcode == "dynamic-update-slice":
        update = operands[1][0]
        return update.hbm + (0 if i.leaves[0].space else update.bytes)
    if i.opcode.endswith("-start"):
        return sum(leaf.hbm for leaf in i.leaves)  # operands and results of a collective
    return written + sum(leaf.hbm for leaves in operands for leaf in leaves)


def _fusion_traffic(i: Instruction, operands: list[tuple[Leaf, ...]], body: Computation, module: Module) -> int:
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", aliased[1]) if aliased else []
    in_place = {int(out or 0) for out, _ in pairs}
    kept = {int(operand) for _, operand in pairs}
    total = 0
    for n, leaves in enumerate(operands):
        total += 0 if n in kept else sum(leaf.hbm and _read(body, n, leaf, module) for leaf in leaves)
    for n, leaf in enumerate(i.leaves):
        total += 0 if n in in_place or leaf.space else _written(body, n, leaf)
    return total


def _read(body: Computation, index: int, leaf: Leaf, module: Module) -> int:
    """Bytes a fusion reads of one argument: of slices of it, if it reads only those."""
    parameter = body.parameter(index)
    if parameter is None:
        return leaf.bytes
    return min(leaf.bytes, sum(_used(body, parameter.name, leaf, module)))


def _used(body: Computation, name: str, leaf: Leaf, module: Module) -> Iterator[int]:
    for user in body.instructions.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            yield sum(out.bytes for out in user.leaves)
        elif user.opcode == "dynamic-update-slice" and first:
            yield 0
        elif user.opcode == "bitcast":
            yield from _used(body, user.name, leaf, module)
        elif user.opcode == "fusion":
            inner = module.computations[called(user)["call"][0]]
            for n, operand in enumerate(user.operands):
                if operand == name:
                    yield _read(inner, n, leaf, module)
        else:
            yield leaf.bytes


def _written(body: Computation, index: int, leaf: Leaf) -> int:
    """Bytes a fusion writes of one result: the update, if the result is an update in place."""
    value = body.root
    if value.opcode == "tuple" and index < len(value.operands):
        value = body.instructions[value.operands[index]]
    while value.opcode == "bitcast":
        value = body.instructions[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
        return body.instructions[value.operands[1]].leaves[0].bytes
    return leaf.bytes
