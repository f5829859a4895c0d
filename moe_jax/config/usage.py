"""The text of `--help`: what a command does, and its own flags; `--helpfull` adds those of the libraries."""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

from absl import flags

WORDS = ("--help", "-help", "-h", "-?")
OURS = re.compile(r"(moe_jax|experiments)\b")  # modules whose flags are the command's
INDENT = 28  # columns before the sentence of a flag
WIDTH = 112  # columns of a line
VALUES = {"int": "N", "float": "X", "string": "TEXT", "comma separated list of strings": "A,B", "multi string": "TEXT"}


def is_wanted(argv: Sequence[str]) -> bool:
    """Whether a command line has a help flag."""
    return any(word in WORDS for word in argv[1:])


def text(values: flags.FlagValues, script: str) -> str:
    """The main module's docstring, and a line or more for every flag of the command, `--config` first.

    Args:
        values: all defined flags, not yet parsed.
        script: the file of the main module, by which absl groups its flags.
    """
    by_module = values.flags_by_module_dict()
    own = [flag for module, defined in by_module.items() if module == script or OURS.match(module) for flag in defined]
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "flags:"]
    for flag in sorted(own, key=lambda flag: flag.name != "config"):
        lines += _lines(flag)
    return "\n".join(lines)


def _lines(flag: flags.Flag) -> Iterator[str]:
    head = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}={_value(flag)}"
    sentence = textwrap.wrap(f"{_about(flag)} {_default(flag)}", WIDTH - INDENT, break_on_hyphens=False)
    if len(head) >= INDENT - 1:
        yield head
        head = ""
    yield head.ljust(INDENT) + sentence[0]
    for line in sentence[1:]:
        yield " " * INDENT + line


def _value(flag: flags.Flag) -> str:
    """The placeholder for a flag's value."""
    if values := getattr(flag.parser, "enum_values", None):
        return "|".join(values)
    return "FILE" if flag.name == "config" else VALUES.get(flag.flag_type(), "VALUE")


def _about(flag: flags.Flag) -> str:
    """A flag's sentence, without the parts that absl adds."""
    about = " ".join((flag.help or "").split())
    return re.sub(r"^<[^>]*>: |; repeat this option to specify a list of values$", "", about)


def _default(flag: flags.Flag) -> str:
    if any("must have a value" in validator.message for validator in flag.validators):
        return "(required)"
    if flag.boolean or flag.default in (None, "", []):
        return ""
    value = ", ".join(flag.default) if isinstance(flag.default, list) else flag.default
    return f"(default: {value})"
