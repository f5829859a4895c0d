"""Turns a `ConfigDict` or mapping into a typed `Config`, or into one clear sentence, and a `Config` into a mapping."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

from moe_jax.config.balance import BALANCE_METHODS, BalanceEntry
from moe_jax.config.balance_rules import check_options, check_together
from moe_jax.config.rules import RULES
from moe_jax.config.schema import Config

T = TypeVar("T")


class SourceGone(ValueError):
    """The workdir from which a config file reads its values, `source`, no longer exists.

    A run that has already started from it keeps its own config, and resumes with that.
    """

    def __init__(self, source: str, sentence: str) -> None:
        super().__init__(sentence)
        self.source = source


def default(**overrides: Any) -> Any:
    """A complete `ConfigDict`, which a config file returns: every key at its default, with `overrides` merged in.

    Because it is complete, every key can be overridden from the command line, including the options of the balancing
    methods in it.

    Args:
        **overrides: top-level keys; `model=dict(num_layers=2)` changes that one key of `model`.

    Returns:
        `ml_collections.ConfigDict`.

    Raises:
        ValueError: an unknown key or a value of the wrong type.
    """
    from ml_collections import ConfigDict

    balance = overrides.pop("balance", {})
    config = _build(Config, {**overrides, "balance": {}}, "")
    plain = {f.name: _plain(getattr(config, f.name)) for f in fields(Config) if f.name != "balance"}
    plain["balance"] = {e.label: _entry_as_dict(e) for e in balance_entries(balance)}
    plain["data"]["weights"] = named(config.data.weights)
    return ConfigDict({k: _with_placeholders(v) for k, v in plain.items()})


def named(values: Mapping[str, Any]) -> Any:
    """A `ConfigDict` of the values, whose names may contain dots, like those of domains: `{"wiki.en": 2.0}`."""
    from ml_collections import ConfigDict

    return ConfigDict(dict(values), allow_dotted_keys=True)


def validate(config: Any) -> Config:
    """Turn a ConfigDict or nested dict into a frozen `Config` that keeps every rule.

    Args:
        config: `ml_collections.ConfigDict` or mapping; absent keys take their defaults.

    Raises:
        ValueError: the first broken rule, with key, value, rule and fix.
    """
    if isinstance(config, Config):
        return config
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ValueError(f"the config is {config!r} and must be a dict of keys; return moe_jax.config.default(...).")
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    entries = balance_entries(plain.pop("balance", {}))
    result = dataclasses.replace(_build(Config, plain, ""), balance=entries)
    for check in RULES:
        check(result)
    return result


def as_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values, the inverse of `validate`."""
    plain = {f.name: _plain(getattr(config, f.name)) for f in fields(Config) if f.name != "balance"}
    plain["balance"] = {e.label: _entry_as_dict(e) for e in config.balance}
    return _with_lists(plain)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys. An empty nested dict leaves no key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every dotted key whose value differs."""
    a = flatten(old)
    b = flatten(new)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def balance_entries(mapping: Mapping[str, Any] | None) -> tuple[BalanceEntry, ...]:
    """Check `config.balance` and return its entries, sorted by label so that their order never matters.

    Args:
        mapping: label -> options; the label is the method's name unless `method=` names another.

    Raises:
        ValueError: unknown method or option, wrong type, or methods that contradict each other.
    """
    if mapping is not None and not isinstance(mapping, Mapping) and not hasattr(mapping, "items"):
        raise ValueError(
            f"balance={mapping!r} must be a mapping from method to options; "
            "write balance=dict(bias_sign=dict(rate=1e-3)), or balance={} for none."
        )
    entries = tuple(_balance_entry(label, options) for label, options in sorted((mapping or {}).items()))
    check_together(entries)
    return entries


def _balance_entry(label: str, options: Any) -> BalanceEntry:
    path = f"balance.{label}"
    if not isinstance(options, Mapping) and not hasattr(options, "items"):
        raise ValueError(f"{path}={options!r} must be a dict of options; write {label}=dict() for its defaults.")
    options = dict(options.items())
    method = options.pop("method", label)
    if not isinstance(method, str) or method not in BALANCE_METHODS:
        hint = did_you_mean(str(method), BALANCE_METHODS)
        raise ValueError(
            f"{path} names the balancing method {method!r}, which does not exist{hint}; "
            f"the methods are {', '.join(sorted(BALANCE_METHODS))}."
        )
    if label in SHARED or not re.fullmatch(r"\w+", label):
        raise ValueError(
            f"{path}: a label must be one word other than 'bias', 'loads' and 'direction', which all methods share; "
            "choose another."
        )
    entry = BalanceEntry(label, method, _build(BALANCE_METHODS[method], options, path + "."))
    check_options(path, entry.options)
    return entry


SHARED = ("bias", "direction", "loads")  # names in a balancer's state and statistics, which no label may use


# --- building typed sections from mappings ------------------------------------------------------------------


def _build(cls: type[T], mapping: Mapping[str, Any], path: str) -> T:
    """An instance of the dataclass `cls` from a mapping; a ValueError for an unknown key, a wrong type or range."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in known:
            raise ValueError(
                f"{path}{key} is not a configuration key{did_you_mean(key, known)}; "
                f"the keys {'of ' + path[:-1] if path else 'at the top'} are {', '.join(known)}."
            )
        if cls is Config and key == "balance":
            continue
        values[key] = _typed(hints[key], value, path + key)
        _check_limits(known[key].metadata, values[key], path + key)
    return cls(**values)


def _typed(hint: Any, value: Any, path: str) -> Any:
    """`value` converted to the annotated type, or a ValueError."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ValueError(f"{path}={value!r} must be a dict of keys; write {path}=dict(...).")
        return _build(hint, dict(value.items()), path + ".")  # type: ignore[arg-type]
    if origin is types.UnionType:
        return None if value is None else _typed(typing.get_args(hint)[0], value, path)
    if origin is Literal:
        choices = typing.get_args(hint)
        if isinstance(value, bool):
            value = FORMER.get(path, {}).get(value, value)
        _check_is_among(choices, value, path)
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{path}={value!r} must be a tuple; write ({value!r},).")
        return tuple(_typed(typing.get_args(hint)[0], v, path) for v in value)
    if origin is dict:
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ValueError(f"{path}={value!r} must be a dict; write {path}=dict(name=number).")
        return {str(k): _typed(typing.get_args(hint)[1], v, f"{path}.{k}") for k, v in value.items()}
    return _scalar(hint, value, path)


FORMER = {"model.qk_norm": {False: "none", True: "head"}}  # keys that were booleans when old workdirs were written


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf  # float() of a longer integer may overflow
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(
            f"{path}={value!r} must be {article(hint)}, not {type(value).__name__}; write it as {hint.__name__}."
        )
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{path}={value!r} must be a finite number; give one.")
    return value


def article(hint: type) -> str:
    """The name of a type in an error message, with its article."""
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    return names.get(hint, hint.__name__)


def _check_is_among(choices: Collection[str], value: Any, path: str) -> None:
    if value not in choices:
        raise ValueError(
            f"{path}={value!r} must be one of {', '.join(map(repr, choices))}{did_you_mean(str(value), choices)}."
        )


def _check_limits(limits: Mapping[str, Any], value: Any, path: str) -> None:
    """Raise a ValueError for a value outside the range or the names that its field declares."""
    if limits.get("among") is not None:
        _check_is_among(limits["among"], value, path)
    if value is None:
        return
    low = limits.get("low")
    high = limits.get("high")
    if low is not None and value < low:
        raise ValueError(f"{path}={value} must be at least {low}; raise it.")
    if high is not None and value > high:
        raise ValueError(f"{path}={value} must be at most {high}; lower it.")


def did_you_mean(word: str, known: Any) -> str:
    """A hint at the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, with tuples kept: the values that a ConfigDict holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _with_lists(value: Any) -> Any:
    """A copy with lists for tuples."""
    if isinstance(value, dict):
        return {key: _with_lists(v) for key, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _entry_as_dict(entry: BalanceEntry) -> dict[str, Any]:
    options = _plain(entry.options)
    return options if entry.label == entry.method else {"method": entry.method, **options}


def _with_placeholders(value: Any) -> Any:
    """Replace None by a typed placeholder, because ConfigDict could not override it otherwise."""
    from ml_collections import config_dict

    if isinstance(value, dict):
        return {k: _with_placeholders(v) for k, v in value.items()}
    return config_dict.placeholder(int) if value is None else value


def complete(config: Any) -> Any:
    """The ConfigDict or dict of a config file, completed with every key; `validate` refuses what is not a mapping."""
    from ml_collections import ConfigDict, FrozenConfigDict

    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        return config
    if isinstance(config, FrozenConfigDict) or not isinstance(config, ConfigDict):
        config = ConfigDict(config.to_dict() if hasattr(config, "to_dict") else config)
    entries = config.get("balance") or {}
    with config.unlocked():
        _fill(config, default(balance=entries.to_dict() if hasattr(entries, "to_dict") else entries))
    return config


def _fill(config: Any, full: Any) -> None:
    """Add the keys of `full` that `config` lacks, in place, so that references between keys stay."""
    for key in full:
        if key not in config:
            config[key] = full.get_ref(key) if full.get(key) is None else full[key]
        elif hasattr(full[key], "to_dict") and hasattr(config[key], "to_dict"):
            _fill(config[key], full[key])
