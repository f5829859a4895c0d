"""Functions with which a sweep config lists its runs: `get_hyper(h)` gets this module and returns a list of settings.

A setting is a dict from dotted config key to value; its key "arm" names the arm to which it belongs. A branched sweep
is `branches(trunks, arms, at=STEP)` of two such lists.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Setting = dict[str, Any]


class Branches(NamedTuple):
    """A branched sweep; made by `branches`."""

    trunks: list[Setting]
    arms: list[Setting]
    at: int
    own_data: bool


def arms(**named: Mapping[str, Any]) -> list[Setting]:
    """One setting per arm: `arms(none={"balance": {}}, bias={"balance": dict(bias_sign={})})`."""
    return [{"arm": name, **overrides} for name, overrides in named.items()]


def sweep(key: str, values: Iterable[Any]) -> list[Setting]:
    """One setting per value of one key: `sweep("seed", range(3))`."""
    return [{key: value} for value in values]


def product(*settings: list[Setting]) -> list[Setting]:
    """Every combination of the settings; the first list varies slowest."""
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*settings)]


def branches(trunks: list[Setting], arms: list[Setting], *, at: int, own_data: bool = True) -> Branches:
    """Every arm, branched from every trunk: the arms train on from the whole state of the trunk after `at` steps.

    Args:
        trunks: trunk methods x trunk seeds, as for a plain sweep; their `num_steps` is `at`.
        arms: arms x data seeds, as for a plain sweep; the first arm is the baseline. An arm on a trunk of its own name
            is on its own trunk. `num_steps` counts from the start of the trunk, so it is above `at`.
        at: step of branching, at least 1.
        own_data: every trunk seed has data seeds of its own, 1000 x trunk seed + the listed seed, so that its branches
            are independent of those of other trunk seeds. False uses the listed seeds on every trunk: then intervals
            over trunk seeds hold only for these orders of the data.
    """
    return Branches(trunks, arms, at, own_data)
