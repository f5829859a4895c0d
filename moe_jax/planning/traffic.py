"""Bytes of main memory that an instruction of a compiled program reads and writes."""

import re
from collections.abc import Iterator

from moe_jax.planning.hlo import Computation, Instruction, Leaf, Module, called

# instructions that neither read nor write memory: other names of a value, or control flow
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "domain"}
FREE |= {
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "async-start",
    "async-update",
    "call-start",
    "call-update",
    "iota",
    "send",  # across slices, by the host: slow beside the memory
    "recv",
}


# --- memory traffic -------------------------------------------------------------------------------------------


def traffic(i: Instruction, here: Computation, module: Module) -> int:
    """Bytes of main memory that an instruction reads and writes; a slice reads only itself, not its whole operand."""
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
    """As `traffic`, of a fusion: operands that are updated in place are neither read nor written as a whole."""
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", i.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", aliased[1]) if aliased else []
    in_place = {int(out or 0) for out, _ in pairs}
    updated = {int(operand) for _, operand in pairs}
    total = 0
    for n, leaves in enumerate(operands):
        total += 0 if n in updated else sum(leaf.hbm and _read(body, n, leaf, module) for leaf in leaves)
    for n, leaf in enumerate(i.leaves):
        total += 0 if n in in_place or leaf.space else _written(body, n, leaf)
    return total


def _read(body: Computation, index: int, leaf: Leaf, module: Module) -> int:
    """Bytes that a fusion reads of one argument; if it reads only slices, their bytes."""
    parameter = body.parameter(index)
    if parameter is None:
        return leaf.bytes
    return min(leaf.bytes, sum(_used(body, parameter.name, leaf, module)))


def _used(body: Computation, name: str, leaf: Leaf, module: Module) -> Iterator[int]:
    """Bytes that each user of a value reads of it."""
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
    """Bytes that a fusion writes of one result; of an update in place, those of the update."""
    value = body.root
    if value.opcode == "tuple" and index < len(value.operands):
        value = body.instructions[value.operands[index]]
    while value.opcode == "bitcast":
        value = body.instructions[value.operands[0]]
    if value.opcode == "dynamic-update-slice":
        return body.instructions[value.operands[1]].leaves[0].bytes
    return leaf.bytes
