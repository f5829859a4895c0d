"""The command line: flags for a config file and its keys, with one sentence for every mistake in them.

Imports no jax, so that a mistake is reported in well under a second.
"""

import ast
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from moe_jax.config import usage
from moe_jax.config.build import SourceGone, article, complete, default, did_you_mean, named
from moe_jax.config.paths import path_of
from moe_jax.config.schema import Config, Weights

T = TypeVar("T")


def define_config_flag(help_text: str) -> None:
    """Define the flag `--config=FILE`, and `--config.key=value` for every key of the schema.

    FILE is a path, or the name of a config that comes with this package, such as `tiny`. `FILE:ARGUMENT` passes the
    argument to its get_config. Keys that the file omits have their defaults, so that each can be overridden.
    """
    example = "Its keys are flags, such as --config.optimizer.learning_rate=1e-3."
    config_flags.DEFINE_config_file("config", None, f"{help_text} {example}")
    flags.FLAGS["config"].parser = _Reader()
    config_flags.register_flag_parser_for_type(int, _IntegerOrNone())
    config_flags.register_flag_parser_for_type(ConfigDict, _Dict())


class _Reader(flags.ArgumentParser):
    """Reads a config file once, and keeps its values, to which errors about overrides refer."""

    text = ""  # the flag's value
    argument: Sequence[str] = ()  # of get_config: one string, or none
    file = Path()
    module = types.ModuleType("none")
    values: Mapping[str, Any] | None = None  # dotted key -> value, sections included

    def parse(self, path: str) -> Any:
        """The complete, locked ConfigDict of the file; ends the command if the file is wrong."""
        self.text = path
        self.file, self.argument = locate(path)
        self.module = run_own(self.file, lambda: load(self.file))
        config = run_own(self.file, lambda: complete(self._get_config(self.argument)))
        if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
            fail(
                f"--config={path} returned {config!r} from get_config() and must return a dict of keys; return "
                "moe_jax.config.default(...)."
            )
        self.values = dict(_nodes(config.to_dict()))
        config.lock()
        return config

    def _get_config(self, argument: Sequence[str]) -> Any:
        """The config that the file returns, or that of the run in --workdir if it started from weights now gone."""
        try:
            return self.module.get_config(*argument)
        except SourceGone as gone:
            workdir = re.search(r"(?:^| )--?workdir[= ](\S+)", " ".join(sys.argv))
            file = Path(os.path.expanduser(workdir[1])) / "config.json" if workdir else Path()
            there = json.loads(file.read_text()) if file.is_file() else {}
            if there.get("init_from") != gone.source:
                raise
            print(f"--config={self.text}: {gone.source} is gone; the config is that of the run in {file.parent}")
            return default(**there)


class _IntegerOrNone(flags.IntegerParser):
    """Parses an int or None; `validate` refuses None for a key that does not allow it."""

    def parse(self, argument: Any) -> Any:
        """The integer, or None."""
        return None if argument in (None, "None") else super().parse(argument)


class _Dict(flags.ArgumentParser):
    """Parses a dict on the command line; the library's own parser refuses names with dots."""

    def parse(self, argument: Any) -> Any:
        """The ConfigDict of a literal; a default is already a ConfigDict."""
        if isinstance(argument, ConfigDict):
            return argument
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError("must be a dict; write it as \"{'name': 2.0}\".")
        return named(value)


def define_weights_flag() -> None:
    """Define --weights, for the commands that read a checkpoint."""
    flags.DEFINE_enum("weights", "last", typing.get_args(Weights), "The last weights, or their moving average.")


def check_weights(config: Config, weights: Weights) -> None:
    """Raise a ValueError if the average is wanted of a run that keeps none."""
    if weights == "ema" and not config.ema.decay:
        raise ValueError("--weights=ema reads an average, but the run has ema.decay=0.0 and keeps none; leave it out.")


def _nodes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested dicts with its value, including the keys whose values are dicts."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _nodes(value, f"{prefix}{key}.")


# --- config files ---------------------------------------------------------------------------------------------


def locate(text: str) -> tuple[Path, list[str]]:
    """The file named by `--config=FILE[:ARGUMENT]`, and a list with the argument if there is one.

    An existing path has precedence over the name of a config of this package. Ends the command if neither exists.
    """
    colons = [n for n, letter in enumerate(text) if letter == ":"]
    ours = shipped()
    for end in (*colons, len(text)):
        name = text[:end]
        argument = [text[end + 1 :]] if end < len(text) else []
        file = Path(os.path.expanduser(name))
        if file.is_file():
            return file, argument
        if name in ours:
            return ours[name], argument
    name = text.partition(":")[0]
    try:
        path_of(text, "--config")
    except ValueError as error:
        fail(str(error))
    close = did_you_mean(name.removeprefix("configs/").removesuffix(".py"), ours)
    fail(
        f"--config={name} does not exist"
        + (close or f"; give a Python file with get_config(), or one of moe_jax's configs: {', '.join(ours)}.")
    )


def config_source() -> tuple[Path, types.ModuleType, Sequence[str]]:
    """The file that `--config` read, its module, and what it passed to get_config: one string, or nothing."""
    reader: Any = flags.FLAGS["config"].parser
    return reader.file, reader.module, reader.argument


def shipped() -> dict[str, Path]:
    """The configs that come with this package, by name: `tiny`, `ablation/demo`."""
    folder = shipped_folder()
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.py"))}


def shipped_folder() -> Path:
    """The folder of the configs that come with this package."""
    here = Path(__file__).parent.parent
    return next(f for f in (here / "configs", here.parent / "configs") if f.is_dir())  # installed, or in a clone


def load(file: Path) -> types.ModuleType:
    """Load a config file as a module. One that comes with this package may import others as `configs.NAME`.

    Raises:
        ValueError: it is not a Python file, or has no get_config().
        Exception: any exception that the file raises.
    """
    ours = shipped_folder()
    if file.resolve().is_relative_to(ours.resolve()):
        # installed, the folder is inside moe_jax, and in a clone not on the path of a command started elsewhere
        package = types.ModuleType("configs")
        package.__path__ = [str(ours)]
        sys.modules["configs"] = package
    loader = importlib.machinery.SourceFileLoader("config_file", str(file))
    spec = importlib.util.spec_from_loader("config_file", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses defined in it look up their module here
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError("get_config() is missing; write one that returns moe_jax.config.default(...).")
    return module


def run_own(file: Path, function: Callable[[], T]) -> T:
    """Call a function of the user's file; any exception ends the command with the file and the line."""
    try:
        return function()
    except Exception as error:  # a config file is the user's program: it may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        text = str(error)
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines = [error.lineno]
            text = error.msg
        text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())  # the text of a KeyError is quoted
        if dotted := re.match(r"ConfigDict does not accept dots in field names .* the key (\S+) ", text):
            text = f"the name {dotted[1]!r} has a dot; put its dict into moe_jax.config.named({{...}})."
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        fail(f"--config={file}{f', line {lines[-1]}' if lines else ''}: {kind}{text}")


# --- flags ----------------------------------------------------------------------------------------------------


def parse_flags(argv: list[str]) -> list[str]:
    """Parse flags for `absl.app.run(main, flags_parser=parse_flags)`, with one sentence for a mistake.

    For a wrong `--config.key` it suggests the closest key. The process ends with status 2 and without a traceback.
    """
    print_any_name()
    if usage.is_wanted(argv):
        print(usage.text(flags.FLAGS, argv[0]))
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(argv, known_only=False)
    except BrokenPipeError:  # the reader of --helpfull closed the pipe early, as `head` does
        raise
    except Exception as error:
        fail(_explain(argv, error))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries' info lines would hide ours
    if rest[1:]:
        fail(f"{rest[1]!r} is not a flag; write --flag=value.")
    return rest


def _explain(argv: list[str], error: Exception) -> str:
    """One sentence for an error in parsing flags; by then the config file has been read, unless none was named."""
    text = " ".join(str(error).split())
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing[1]} is missing; give --{missing[1]}=..."
    reader: Any = flags.FLAGS["config"].parser if "config" in flags.FLAGS else None
    given = list(_overrides(argv))
    if reader is None or reader.values is None:
        missing_config = "--config is missing; give --config=FILE before its keys."
        return missing_config if given and reader else text
    for key, _ in given:
        if key not in reader.values:
            close = did_you_mean(key, reader.values) or "; the keys are those of the config file and the defaults."
            return f"--config.{key} is not a configuration key{close}"
    for key, value in given:
        if str(error).startswith(f"flag --config.{key}={value}: "):
            reason = str(error).removeprefix(f"flag --config.{key}={value}: ")
            return f"--config.{key}={value} {reason if reason.startswith('must be') else _rule(reader.values[key])}"
    if isinstance(error, (flags.Error, ValueError)):
        return text
    return f"--config={reader.text} and its overrides could not be read together; check the keys after --config."


def _rule(now: Any) -> str:
    """The rule for the type of a key whose value in the config is `now`."""
    kind = article(type(now)) if isinstance(now, (bool, int, float, str)) else "of the type of the default"
    return f"must be {kind}; it is {now!r} in the config, write it like that."


def _overrides(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Key and value of every `--config.key=value` or `--config.key value`."""
    for number, argument in enumerate(argv):
        if found := re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL):
            following = argv[number + 1] if number + 1 < len(argv) else ""
            yield found[1], following if found[2] is None else found[2]


def print_any_name() -> None:
    """Make standard output escape characters outside its encoding, as standard error does: names may be any bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":  # a notebook replaces sys.stdout
        sys.stdout.reconfigure(errors="backslashreplace")


def fail(message: str, status: int = 2) -> typing.NoReturn:
    """End the command with one sentence on standard error; status 2 means that the input is wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
