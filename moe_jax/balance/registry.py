"""The registry of methods by name, and `make`, which turns `config.balance` into one Balancer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.balance import wrappers
from moe_jax.balance.protocol import Balancer, chain
from moe_jax.config import BalanceEntry, ModelConfig, balance_entries
from moe_jax.config.balance import BALANCE_METHODS, BiasOptions

Build = Callable[[Any, ModelConfig], Balancer]


class Entry(NamedTuple):
    """A method: the function that builds its Balancer, its equations, separated by "; ", and its source."""

    build: Build
    equation: str
    source: str


REGISTRY: dict[str, Entry] = {}


def register(name: str, *, equation: str, source: str) -> Callable[[Build], Build]:
    """Decorator that registers a function (options, model config) -> Balancer as the method `name`."""
    assert name in BALANCE_METHODS, f"{name} needs an options dataclass in moe_jax.config.balance.BALANCE_METHODS"

    def add(build: Build) -> Build:
        REGISTRY[name] = Entry(build, equation, source)
        return build

    return add


def names() -> tuple[str, ...]:
    """Every registered method, sorted."""
    return tuple(sorted(REGISTRY))


def make(
    mapping: Mapping[str, Any] | tuple[BalanceEntry, ...] | None = None, model: ModelConfig = ModelConfig()
) -> Balancer:
    """Build the composition that `config.balance` describes; `make({})` does not balance, but counts loads.

    Args:
        mapping: label -> options, such as `dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4))`; the
            label is the method's name, or any word with `method=`, so that one method can appear twice.
        model: the model's config, from which some methods take groups, zero-computation experts or the vocabulary.

    Raises:
        ValueError: an unknown method or option, or two methods that both do what only one may.
    """
    entries = mapping if isinstance(mapping, tuple) else balance_entries(mapping)
    return chain({e.label: _wrapped(REGISTRY[e.method].build(e.options, model), e.options) for e in entries})


def needs_step_statistics(entries: tuple[BalanceEntry, ...]) -> bool:
    """Whether a loss reads the statistics of the whole optimizer step, so that accumulation must count first."""
    return any(getattr(e.options, "scope", None) == "global" for e in entries)


def needs_running_statistics(entries: tuple[BalanceEntry, ...]) -> bool:
    """Whether a loss reads the statistics of the micro-batches so far."""
    return any(getattr(e.options, "scope", None) == "global_running" for e in entries)


def _wrapped(method: Balancer, options: Any) -> Balancer:
    """The method wrapped according to the options that many methods share."""
    if getattr(options, "ema", 0.0) and isinstance(options, BiasOptions):
        method = wrappers.smoothed(method, options.ema)
    if getattr(options, "num_classes", 1) > 1:
        method = wrappers.per_class(method, options.num_classes)
    if method.own_loss is not None and (options.warmup_steps or options.freeze_step is not None):
        method = wrappers.scheduled(method, options)
    return wrappers.within(method, options.layers) if options.layers else method
