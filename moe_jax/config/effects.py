"""What changing a config key affects: the model, the numbers, the data, the speed, or nothing."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from moe_jax.config.build import as_dict, differences
from moe_jax.config.dispatchers import DISPATCHERS
from moe_jax.config.fields import Effect
from moe_jax.config.schema import Config


def keys_that_change(*effects: Effect) -> set[str]:
    """The dotted keys of `Config` for which a change has one of the effects; `balance` affects numbers.

    A key's declared effect considers that key alone; `free_keys` considers how it depends on others.
    """
    return set(_keys_that_change(effects, Config, "", "numbers"))


def _keys_that_change(effects: tuple[Effect, ...], cls: type, path: str, inherited: Effect) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        effect = f.metadata.get("changes") or inherited
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _keys_that_change(effects, hints[f.name], f"{path}{f.name}.", effect)
        elif effect in effects:
            yield path + f.name


def at_defaults(config: Config, *effects: Effect) -> Config:
    """The config with every key at its default for which a change has one of the effects."""
    keys = keys_that_change(*effects)

    def reset(section: Any, plain: Any, path: str) -> Any:
        values = {}
        for f in fields(section):
            own = getattr(section, f.name)
            default = getattr(plain, f.name)
            if dataclasses.is_dataclass(own):
                values[f.name] = reset(own, default, f"{path}{f.name}.")
            elif path + f.name in keys:
                values[f.name] = default
        return dataclasses.replace(section, **values)

    return reset(config, Config(), "")


def free_keys(config: Config) -> set[str]:
    """The dotted keys that may change while a run is under way: no number of its training depends on them.

    The number of micro-batches is not free where routing, a loss or a random draw depends on the micro-batch.
    """
    free = keys_that_change("speed", "nothing")
    m = config.model
    if not DISPATCHERS[m.dispatch].dropless:
        free -= {"model.dispatch", "model.capacity_factor"}
    draws = m.router_jitter > 0 or m.random_second
    if draws or any(e.options.by_micro_batch for e in config.balance):
        free -= {"micro_batches"}
    return free


def changed_numbers(there: Config, here: Config) -> list[str]:
    """Lines `key: there -> here` for every key that makes two configs train to different numbers."""
    free = free_keys(there) & free_keys(here)
    lines = differences(as_dict(there), as_dict(here))
    keys = (line.partition(":")[0] for line in lines)
    return [line for line, key in zip(lines, keys, strict=True) if not any(f"{key}.".startswith(f"{f}.") for f in free)]
