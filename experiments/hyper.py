"""Functions with which a sweep config lists its runs: `get_hyper(h)` gets this module and returns a list of settings.

A setting is a dict from dotted config key to value; its key "arm" names the arm to which it belongs.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

Setting = dict[str, Any]


def arms(**named: Mapping[str, Any]) -> list[Setting]:
    """One setting per arm: `arms(none={"balance": {}}, bias={"balance": dict(bias_sign={})})`."""
    return [{"arm": name, **overrides} for name, overrides in named.items()]


def sweep(key: str, values: Iterable[Any]) -> list[Setting]:
    """One setting per value of one key: `sweep("seed", range(3))`."""
    return [{key: value} for value in values]


def product(*settings: list[Setting]) -> list[Setting]:
    """Every combination of the settings; the first list varies slowest."""
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*settings)]
