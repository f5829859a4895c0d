"""The arms of a simulation, from the text that names them."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.config import BalanceEntry, balance_entries

if TYPE_CHECKING:
    pass


class Arm(NamedTuple):
    """One way of balancing under test: its text in the grammar of `--balance`; a sign of -1 turns it round."""

    name: str
    entries: tuple[BalanceEntry, ...]
    sign: int = 1


# --- the grammar ------------------------------------------------------------------------------------------------


def parse_balance(text: str) -> dict[str, dict[str, Any]]:
    """`config.balance` of `method:option=value,option=value+method`; "none" is empty.

    Raises:
        ValueError: the text is not of that form; methods and options are checked by the config's own rules.
    """
    if text == "none":
        return {}
    mapping: dict[str, dict[str, Any]] = {}
    for part in re.split(r"\+(?=[A-Za-z_]\w*(?:[:+]|$))", text):  # not that of 1e+3
        label, _, options = part.partition(":")
        if not label or label in mapping:
            raise ValueError(
                f"--balance={text} must name each part once, as method or label:method=...; "
                f"{f'{label!r} is there twice' if label else 'a name is missing'}."
            )
        pairs = re.split(r",(?![^()]*\))", options) if options else []  # the commas of (0, 3) stay
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
    """Every text at every rate with every sign; "none" has one only.

    Raises:
        ValueError: a text is wrong, or has not one rate to be set.
    """
    arms = []
    for text in dict.fromkeys(texts):
        mapping = parse_balance(text)
        try:
            versions = [_with_rate(mapping, rate) for rate in rates] or [mapping]
            made = [(write_balance(v), balance_entries(v)) for v in versions]
        except ValueError as error:
            raise ValueError(f"--balance={text}: {error}") from None
        arms += [
            Arm(name + ", turned round" * (sign < 0), entries, sign)
            for name, entries in made
            for sign in signs
            if entries or sign > 0  # of nothing there is nothing to turn
        ]
    return arms


def _with_rate(mapping: dict[str, dict[str, Any]], rate: float) -> dict[str, dict[str, Any]]:
    entries = balance_entries(mapping)
    rated = [e.label for e in entries if hasattr(e.options, "rate")]
    if len(rated) != 1:
        raise ValueError(
            f"--rates sets the rate of one method, and here {' and '.join(rated) or 'none'} has one; "
            "write the rates into --balance instead."
        )
    return {label: {**o, "rate": rate} if label == rated[0] else o for label, o in mapping.items()}
