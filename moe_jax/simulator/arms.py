"""The arms of a simulation, from the text that names them."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.config import BalanceEntry, balance_entries


class Arm(NamedTuple):
    """A balancing method to simulate: its text in the grammar of `--balance`; a sign of -1 reverses it."""

    name: str
    entries: tuple[BalanceEntry, ...]
    sign: int = 1


def parse_balance(text: str) -> dict[str, dict[str, Any]]:
    """`config.balance` from `method:option=value,option=value+method`; "none" is empty.

    Raises:
        ValueError: the text has another form. The config's own rules check methods and options.
    """
    if text == "none":
        return {}
    mapping: dict[str, dict[str, Any]] = {}
    for part in re.split(r"\+(?=[A-Za-z_]\w*(?:[:+]|$))", text):  # but not at that of 1e+3
        label, _, options = part.partition(":")
        if not label or label in mapping:
            raise ValueError(
                f"--balance={text} must name each part once, as method or label:method=...; "
                f"{f'{label!r} occurs twice' if label else 'a name is missing'}."
            )
        pairs = re.split(r",(?![^()]*\))", options) if options else []  # but not at the comma of (0, 3)
        mapping[label] = dict(_option(pair, text) for pair in pairs)
    return mapping


def write_balance(mapping: Mapping[str, Mapping[str, Any]]) -> str:
    """The text that `parse_balance` reads as `mapping`."""
    parts = (
        label + ":" * bool(options) + ",".join(f"{key}={value}" for key, value in options.items())
        for label, options in mapping.items()
    )
    return "+".join(parts) or "none"


def _option(pair: str, text: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not key or not equals:
        raise ValueError(f"--balance={text} must have option=value after its colon, not {pair!r}; write rate=1e-3.")
    try:
        return key.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError):
        return key.strip(), value.strip()  # a word, as in scope=sequence


def arms_of(texts: Sequence[str], rates: Sequence[float] = (), signs: Sequence[int] = (1,)) -> list[Arm]:
    """Every text at every rate with every sign; "none" once.

    Raises:
        ValueError: a text is wrong, or has no rate to set, or several.
    """
    arms = []
    for text in dict.fromkeys(texts):
        mapping = parse_balance(text)
        try:
            versions = [_with_rate(mapping, rate) for rate in rates] or [mapping]
            named = [(write_balance(v), balance_entries(v)) for v in versions]
        except ValueError as error:
            raise ValueError(f"--balance={text}: {error}") from None
        arms += [
            Arm(name + ", reversed" * (sign < 0), entries, sign)
            for name, entries in named
            for sign in signs
            if entries or sign > 0  # "none" has nothing to reverse
        ]
    return arms


def _with_rate(mapping: dict[str, dict[str, Any]], rate: float) -> dict[str, dict[str, Any]]:
    entries = balance_entries(mapping)
    rated = [e.label for e in entries if hasattr(e.options, "rate")]
    if len(rated) != 1:
        raise ValueError(
            f"--rates sets the rate of one method, but the methods with a rate are {', '.join(rated) or 'none'}; "
            "write the rates into --balance instead."
        )
    return {label: {**o, "rate": rate} if label == rated[0] else o for label, o in mapping.items()}
