"""The balancing protocol: a method is five pure functions, composed by label, as optax composes transforms.

A method sees one MoE layer. Inside a composition its statistics and state live under its label; `loads`
and `bias` are shared. Balancing has no other home: nothing is mutated in the forward pass.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from moe_jax.config import BALANCE_METHODS, BalanceEntry, balance_entries
from moe_jax.routing import Routing

State = dict[str, Any]  # {"bias": float32[E], <label>: ...}
Statistics = dict[str, Any]  # {"loads": int32[E], <label>: ...}


class Balancer(NamedTuple):
    """How one way of balancing experts acts on one MoE layer.

    init: (num_experts) -> State. The bias starts at 0.
    select: None, or (scores, bias, *, top_k, tokens, key, train) -> int32 [T, S]; replaces biased top-k.
    observe: (Routing) -> Statistics. ADDITIVE over micro-batches and shards; always has `loads` int32 [E].
    loss: (Routing, Statistics, State, router_weight [D, E]) -> float32 []. Differentiable, averaged over the
        valid tokens of the Routing; the Statistics are those of the whole optimizer step. 0 for bias methods.
    update: (Statistics, State, step) -> State. Once per optimizer step; identity for loss methods.
    """

    init: Callable[[int], State]
    select: Callable[..., Array] | None
    observe: Callable[[Routing], Statistics]
    loss: Callable[[Routing, Statistics, State, Array], Float32[Array, ""]]
    update: Callable[[Statistics, State, Array], State]


class Method(NamedTuple):
    """What one method adds to a composition; each function sees only the method's own state and statistics.

    init: (num_experts) -> own state, a pytree (None for none).
    select: as in Balancer.
    observe: (Routing) -> own additive statistics (None for none).
    loss: (Routing, loads of the step, own statistics of the step, own state, router_weight) -> float32 [].
    update: (loads, own statistics, bias, own state, step) -> (bias, own state).
    """

    init: Callable[[int], Any] = lambda num_experts: None
    select: Callable[..., Array] | None = None
    observe: Callable[[Routing], Any] = lambda routing: None
    loss: Callable[..., Float32[Array, ""]] | None = None
    update: Callable[..., tuple[Array, Any]] | None = None


REGISTRY: dict[str, Callable[[Any], Method]] = {}


def register(name: str) -> Callable[[Callable[[Any], Method]], Callable[[Any], Method]]:
    """Decorator: `name` in a config builds its Method by the decorated function of the options."""
    assert name in BALANCE_METHODS, f"{name} needs an options dataclass in moe_jax.config.BALANCE_METHODS"

    def add(build: Callable[[Any], Method]) -> Callable[[Any], Method]:
        REGISTRY[name] = build
        return build

    return add


def names() -> tuple[str, ...]:
    """Every registered method, sorted."""
    return tuple(sorted(REGISTRY))


def make(mapping: Mapping[str, Any] | tuple[BalanceEntry, ...] | None = None) -> Balancer:
    """A Balancer from `config.balance`; `make({})` does not balance, but counts loads.

    Args:
        mapping: label -> options, as `dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4))`; the
            label is the method's name, or any word with `method=` when one kind appears twice.

    Raises:
        ValueError: an unknown method or option, or two methods that both own the bias or both select.
    """
    entries = mapping if isinstance(mapping, tuple) else balance_entries(mapping)
    methods = {e.label: REGISTRY[e.method](e.options) for e in entries}
    return Balancer(
        init=functools.partial(_init, methods),
        select=_only_selector(methods),
        observe=functools.partial(_observe, methods),
        loss=functools.partial(_loss, methods),
        update=functools.partial(_update, methods),
    )


def needs_step_statistics(entries: tuple[BalanceEntry, ...]) -> bool:
    """True if a loss reads the statistics of the whole optimizer step, so that accumulation must count first."""
    return any(getattr(e.options, "scope", None) == "global" for e in entries)


def _only_selector(methods: Mapping[str, Method]) -> Callable[..., Array] | None:
    selectors = [label for label, m in methods.items() if m.select is not None]
    if len(selectors) > 1:
        raise ValueError(
            f"balance has {' and '.join(selectors)}, but only one method may select experts; remove all but one."
        )
    return methods[selectors[0]].select if selectors else None


def _init(methods: Mapping[str, Method], num_experts: int) -> State:
    own = {label: m.init(num_experts) for label, m in methods.items()}
    return {"bias": jnp.zeros(num_experts, jnp.float32)} | _present(own)


def _observe(methods: Mapping[str, Method], routing: Routing) -> Statistics:
    own = {label: m.observe(routing) for label, m in methods.items()}
    return jax.lax.stop_gradient({"loads": routing.loads} | _present(own))


def _loss(
    methods: Mapping[str, Method],
    routing: Routing,
    statistics: Statistics,
    state: State,
    router_weight: Float32[Array, "embed experts"],
) -> Float32[Array, ""]:
    total = jnp.zeros((), jnp.float32)
    for label, m in methods.items():
        if m.loss is not None:
            own = statistics.get(label), state.get(label)
            total += m.loss(routing, statistics["loads"], *own, router_weight)
    return total


def _update(methods: Mapping[str, Method], statistics: Statistics, state: State, step: Array) -> State:
    new = dict(state)
    for label, m in methods.items():
        if m.update is not None:
            own = statistics.get(label), new["bias"], new.get(label)
            new["bias"], own_state = m.update(statistics["loads"], *own, step)
            if own_state is not None:
                new[label] = own_state
    return new


def _present(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the methods that keep nothing, so that a pytree holds arrays only."""
    return {label: value for label, value in tree.items() if value is not None}
