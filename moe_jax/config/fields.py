"""Declares a field of a config: its default, its range, and what changing it affects."""

from collections.abc import Collection
from dataclasses import field
from typing import Any, Literal

# What changing a key affects: the model; the numbers of the training; its numbers, but only through other inputs to the
# same compiled step; the speed, with numbers equal up to rounding; or nothing that the training depends on.
Effect = Literal["model", "numbers", "data", "speed", "nothing"]

DType = Literal["float32", "bfloat16"]


def number(default: Any, low: float | None = None, high: float | None = None, changes: Effect | None = None) -> Any:
    """A numeric field with an inclusive range, and what changing it affects (None: as declared for its section)."""
    return field(default=default, metadata={"low": low, "high": high, "changes": changes})


def choice(default: Any, changes: Effect, among: Collection[str] | None = None) -> Any:
    """A field of any other type, what changing it affects, and its allowed names where its type does not list them."""
    return field(default=default, metadata={"changes": changes, "among": among})


def section(options: type, changes: Effect) -> Any:
    """A nested dataclass, and what changing its keys affects where they declare nothing else."""
    return field(default_factory=options, metadata={"changes": changes})
