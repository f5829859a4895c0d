"""Loops of a compiled program: how often they run, and what they save for a later loop."""

import re

from moe_jax.planning.hlo import Computation, Instruction, Module, called, parse, tuple_index


def trip_count(loop: Instruction, here: Computation, module: Module) -> int | None:
    """How often a `while` runs: XLA's own count, or the constant that its counter is compared with; None if neither.

    The counter is assumed to rise by one, as in `lax.scan` and `lax.fori_loop`.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[called(loop)["condition"][0]]
    compare = condition.root
    where = condition  # the computation that `compare` is in
    outer: tuple[str, ...] | None = None
    if compare.opcode == "fusion":
        outer = compare.operands
        where = module.computations[called(compare)["call"][0]]
        compare = where.root
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None

    def resolve(name: str) -> Instruction:
        """The instruction of a name, through the parameters of a fusion."""
        i = where.instructions[name]
        if outer is not None and i.opcode == "parameter":
            return condition.instructions[outer[int(i.literal)]]
        return i

    counter, limit = (resolve(name) for name in compare.operands)
    if tuple_index(counter) is None or counter.leaves[0].dtype not in ("s32", "s64", "u32", "u64"):
        return None
    first = _initial(counter, loop, here)
    last = _constant(limit)
    last = _initial(limit, loop, here) if last is None else last
    return None if last is None else max(0, last - (first or 0))


def _constant(i: Instruction) -> int | None:
    return int(i.literal) if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.literal) else None


def _initial(i: Instruction, loop: Instruction, here: Computation) -> int | None:
    """The constant with which an element of the loop's tuple starts."""
    index = tuple_index(i)
    start = here.instructions[loop.operands[0]]
    if index is None or start.opcode != "tuple":
        return None
    value = here.instructions[start.operands[index]]
    while value.opcode in ("copy", "bitcast", "convert") and value.operands:
        value = here.instructions[value.operands[0]]
    return _constant(value)


def saved_bytes(text: str) -> int:
    """Bytes that one loop writes and a later loop reads, as a scan over layers does for its backward pass.

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
            index = tuple_index(source)
            if index is None:
                continue
            maker = here.instructions[source.operands[0]]
            if maker.opcode == "while" and not _passes(maker, index, module):
                found[maker.name, index] = sum(leaf.bytes for leaf in source.leaves)
    return sum(found.values())


def _passes(loop: Instruction, index: int, module: Module) -> bool:
    """Whether a loop passes an element of its tuple on unchanged."""
    body = module.computations[called(loop)["body"][0]]
    if body.root.opcode != "tuple" or index >= len(body.root.operands):
        return True
    value = body.instructions[body.root.operands[index]]
    return value.opcode == "get-tuple-element" and tuple_index(value) == index
