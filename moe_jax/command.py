"""The command line: flags for a config file and its keys, and one sentence for whatever is wrong with them.

Imports no jax, as `config`: a mistake is told in well under a second.
"""

import ast
import io
import re
import sys
import typing
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from moe_jax.config import article, complete, did_you_mean, flatten, named


def define_config_flag(help_text: str) -> None:
    """The flag `--config=FILE` with `--config.key=value` for every key of the schema.

    Keys that the file leaves out are added with their defaults, so that each can be overridden.
    """
    config_flags.DEFINE_config_file("config", None, help_text)
    parser: Any = flags.FLAGS["config"].parser
    parse = parser.parse
    parser.parse = lambda path: complete(parse(path))
    config_flags.register_flag_parser_for_type(ConfigDict, _Dict())


class _Dict(flags.ArgumentParser):
    """A dict on the command line; the library's own takes no names with dots."""

    def parse(self, argument: Any) -> Any:
        """The ConfigDict of a literal; a default is one already."""
        if isinstance(argument, ConfigDict):
            return argument
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError("must be a dict; write it as \"{'name': 2.0}\".")
        return named(value)


def parse_flags(argv: list[str]) -> list[str]:
    """A parser for `absl.app.run(main, flags_parser=parse_flags)` that answers a mistake with one sentence.

    A wrong `--config.key` is told with the closest key; the process ends with status 2 and no traceback.
    """
    print_any_name()
    try:
        rest = flags.FLAGS(argv, known_only=False)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            len(flags.FLAGS.config)  # a file that failed to load raises only when it is used
    except BrokenPipeError:  # whoever read our --help has seen enough
        raise
    except Exception as error:  # a config file is the user's program: it may raise anything
        fail(_explain(argv, error))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries' info lines hide ours
    if rest[1:]:
        fail(f"{rest[1]!r} is not a flag; write --flag=value.")
    return rest


def _explain(argv: list[str], error: BaseException) -> str:
    """One sentence for whatever went wrong while flags and config file were read."""
    source = re.search(r"(?:^| )--?config[= ](\S+)", " ".join(argv))
    file = source[1].partition(":")[0] if source else ""
    if file and not Path(file).is_file():
        return f"--config={file} does not exist; give a Python file with get_config(), as those in configs/."
    if missing := re.search(r"Flag --(\w+) must have a value other than None", str(error)):
        return f"--{missing[1]} is missing; give --{missing[1]}=..."
    if "has no attribute 'get_config'" in str(error):
        return f"--config={file} defines no get_config(); write get_config() that returns moe_jax.config.default(...)."
    overrides = any(re.match(r"--?config\.", a) for a in argv)
    if isinstance(error, (AttributeError, KeyError)) and source and overrides:
        return _wrong_key(argv, source[1])
    while error.__context__ is not None and "Error whilst parsing config file" in str(error):
        error = error.__context__  # ml_collections wraps the sentence in a traceback
    text = " ".join(str(error).split())
    if refused := re.fullmatch(r"flag (--config\.[\w.]+=.*): (must be a .*)", text):
        return f"{refused[1]} {refused[2]}"
    if dotted := re.match(r"ConfigDict does not accept dots in field names .* the key (\S+) ", text):
        return (
            f"--config={file} has the name {dotted[1]!r}, with a dot; put its dict into moe_jax.config.named({{...}})."
        )
    wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    if wrong and source:
        config: Any = flags.FLAGS["config"].parser
        now = flatten(config.parse(source[1]).to_dict()).get(wrong[1])
        kind = article(type(now)) if isinstance(now, (bool, int, float, str)) else "of the type of the default"
        return f"--config.{wrong[1]}={wrong[2]} must be {kind}; it is {now!r} in the config, write it like that."
    if isinstance(error, (ValueError, flags.Error)):
        return text
    return f"--config={file} could not be read: {type(error).__name__}: {text}"


def _wrong_key(argv: list[str], source: str) -> str:
    """A sentence on the first `--config.key` that names no key of the config file at `source`."""
    config: Any = flags.FLAGS["config"].parser
    known = flatten(config.parse(source).to_dict())
    sections = {key.rpartition(".")[0] for key in known}
    for argument in argv:
        key = re.match(r"--?config\.([^=]+)", argument)
        if key and key[1] not in known and key[1] not in sections:
            hint = did_you_mean(key[1], known) or "; the keys are those of the config file and the defaults"
            return f"--config.{key[1]} is not a configuration key{hint}."
    return f"--config={source} and its overrides could not be read together; check the keys after --config."


def print_any_name() -> None:
    """Let standard output escape what its encoding does not have, as standard error does: names may be any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":  # a notebook's is something else
        sys.stdout.reconfigure(errors="backslashreplace")


def fail(message: str) -> typing.NoReturn:
    """End the command with status 2 and one sentence on standard error."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
