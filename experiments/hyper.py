"""How a sweep config says which runs it wants: `get_hyper(h)` gets this module and returns a list of settings.

A setting is a dict from dotted config key to value, with "arm" naming the arm it belongs to.
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
    """Every combination, the first list slowest."""
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*settings)]
