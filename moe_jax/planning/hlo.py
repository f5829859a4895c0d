"""The text of a compiled XLA program, parsed. Does not import jax.

The costs are computed from it in `cost` because XLA's own `cost_analysis` counts the body of a loop only once.
"""

import functools
import math
import re
from typing import NamedTuple

_TOKAMAX = re.compile(r'tokamax:\{.*?\\"__type\\":\\"[\w.]*?(\w+)\\".*\}')  # a kernel's whole call, in JSON


class Leaf(NamedTuple):
    """One array of an instruction's type; `space` 0 is main memory (HBM), others are on the chip."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        return math.prod(self.dims) * bits(self.dtype) // 8

    @property
    def hbm(self) -> int:
        """Its size if it is in main memory, else 0."""
        return 0 if self.space else self.bytes


class Instruction(NamedTuple):
    """One line of a computation. `literal` is the text between the brackets, `attributes` the text after them."""

    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Its origin in the Python program."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return _TOKAMAX.sub(r"\1", found[1]) if found else ""


class Computation(NamedTuple):
    """Instructions in the order in which they run (the text of a compiled module is scheduled)."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the computation's."""
        return next((i for i in self.instructions.values() if i.root), list(self.instructions.values())[-1])

    def parameter(self, index: int) -> Instruction | None:
        """The instruction for argument `index`."""
        wanted = (i for i in self.instructions.values() if i.opcode == "parameter" and i.literal == str(index))
        return next(wanted, None)


class Module(NamedTuple):
    """A compiled program, and the number of devices that run it."""

    computations: dict[str, Computation]
    entry: str
    devices: int


# --- text -> Module -------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_LINE_BREAK_INSIDE = re.compile(
    r"\n(?=\"|\}\})"
)  # within an instruction: the metadata of a Pallas kernel has several lines
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Module:
    """The computations of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = ""
    current = None
    for line in _LINE_BREAK_INSIDE.sub(" ", text).splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text().")
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind = rest[:end]
    rest = rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    literal = rest[start + 1 : stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, rest[:start], _leaves(kind), operands, literal, rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")


@functools.lru_cache(maxsize=65536)
def _leaves(kind: str) -> tuple[Leaf, ...]:
    leaves = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        if dtype == "token":
            continue
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        leaves.append(Leaf(dtype, sizes, int(space[1]) if space else 0))
    return tuple(leaves)


@functools.cache
def bits(dtype: str) -> int:
    """The width of an element type by its name: bf16 16, f8e4m3fn 8, pred 8, s4 4."""
    if dtype in ("pred", "opaque", "token"):
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8


def called(i: Instruction) -> dict[str, list[str]]:
    """The computations that an instruction calls, by role."""

    def names(key: str) -> list[str]:
        found = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", i.attributes)
        return re.findall(r"[\w.\-]+", found[1] or found[2]) if found else []

    branches = names("branch_computations") or names("true_computation") + names("false_computation")
    applied = names("to_apply") if i.opcode in ("call", "call-start") else []  # elsewhere it is a reduction
    calls = names("calls") or names("called_computations") or applied
    return {"body": names("body"), "condition": names("condition"), "branch": branches, "call": calls}


def tuple_index(i: Instruction) -> int | None:
    """The element that a get-tuple-element returns; None for other instructions."""
    found = re.search(r"\bindex=(\d+)", i.attributes)
    return int(found[1]) if i.opcode == "get-tuple-element" and found else None
