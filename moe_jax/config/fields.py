"""How a field of a config says its range, and what another value of it changes."""

from collections.abc import Collection
from dataclasses import field
from typing import Any, Literal

# What another value of a key makes: another model; other numbers of the training; other numbers by other inputs to
# the same compiled step; the same numbers up to rounding, at another speed; or nothing that the training could notice.
Effect = Literal["model", "numbers", "data", "speed", "nothing"]


def number(default: Any, low: float | None = None, high: float | None = None, changes: Effect | None = None) -> Any:
    """A numeric field with an inclusive range, and what another value changes (None: as its section says)."""
    return field(default=default, metadata={"low": low, "high": high, "changes": changes})


def choice(default: Any, changes: Effect, among: Collection[str] | None = None) -> Any:
    """A field of any other type, what another value changes, and the names among which it is, if its type has none."""
    return field(default=default, metadata={"changes": changes, "among": among})


def section(options: type, changes: Effect) -> Any:
    """A nested dataclass, and what its keys change unless they say otherwise."""
    return field(default_factory=options, metadata={"changes": changes})
