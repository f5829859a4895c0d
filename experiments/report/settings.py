"""The settings that an arm changes, and the settings common to all arms that differ from the defaults."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from moe_jax.config import default, flatten
from moe_jax.config.balance import BALANCE_METHODS

from .sweep import Sweep


def arm_settings(sweep: Sweep, arm: str) -> dict[str, Any]:
    """The dotted settings in which an arm differs from the sweep's base config.

    Options of a balancing method at their defaults are left out; a method with only such options is
    `balance.<label>: "defaults"`.
    """
    base = flatten(sweep.config)
    own = flatten(sweep.arms_config.get(arm) or {})
    return _without_defaults({key: value for key, value in own.items() if key not in base or base[key] != value})


def changed_settings(sweep: Sweep) -> list[tuple[str, str, str]]:
    """(key, value, default) of every setting of the base config that differs from today's defaults."""
    defaults = {key: text_of(value) for key, value in flatten(default().to_dict()).items()}
    settings = _without_defaults(flatten(sweep.config))
    texts = {key: text_of(value) for key, value in settings.items()}
    return [(key, text, defaults.get(key, "-")) for key, text in texts.items() if text != defaults.get(key)]


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, option = key.rpartition(".")
        options = _method_options(section, settings)
        if option not in options:
            kept[key] = value
        elif text_of(options[option]) != text_of(value):
            kept.pop(section, None)
            kept[key] = value
        elif not any(other.startswith(f"{section}.") for other in kept):
            kept[section] = "defaults"
    return kept


def _method_options(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The default options of a balancing method if the section belongs to one; otherwise empty."""
    parent, _, label = section.rpartition(".")
    method = settings.get(f"{section}.method", label)
    if parent != "balance" or method not in BALANCE_METHODS:
        return {}
    return dataclasses.asdict(BALANCE_METHODS[method]())


def text_of(value: Any) -> str:
    """The text of a setting's value: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)


def settings_text(settings: Mapping[str, Any]) -> str:
    """`key = value, key = value`."""
    return ", ".join(f"{key} = {text_of(value)}" for key, value in settings.items())
