"""The balancing protocol: a method is a few pure functions, composed by label, as optax composes transforms.

A method sees one MoE layer. Inside a composition its statistics and state live under its label; `loads`
and `bias` are shared. Balancing has no other home: nothing is mutated in the forward pass.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from moe_jax.balance import wrappers
from moe_jax.balance.method import Method
from moe_jax.config import BalanceEntry, ModelConfig, balance_entries
from moe_jax.config.balance import BALANCE_METHODS, BiasOptions
from moe_jax.routing import Routing

State = dict[str, Any]  # {"bias": float32 [E] or [C, E], <label>: ...}
Statistics = dict[str, Any]  # {"loads": int32 [E], <label>: ...}


class Balancer(NamedTuple):
    """How one way of balancing experts acts on one MoE layer. E counts zero-computation experts too.

    init: (num_experts, layer=0) -> State. The bias starts at 0, or at 1 where it multiplies. A State also holds
        `direction`, the signs of the last move, where a method moves the bias.
    combine: None, or (scores, bias) -> biased scores [T, E]; replaces their sum.
    select: None, or (scores, bias, *, top_k, tokens, key, train, state=None) -> int32 [T, S]; replaces biased top-k.
    drop: None, or (routing, state, key, train) -> bool [T, S], the copies that travel; loads count the others too.
    observe: (Routing) -> Statistics. ADDITIVE over micro-batches and shards; always has `loads` int32 [E].
    losses: (Routing, Statistics, State, router_weight [D, E]) -> {label: float32 []}. Differentiable, averaged
        over the valid tokens of the Routing; the Statistics are those of the whole optimizer step.
    update: (Statistics, State, step) -> State. Once per optimizer step; identity for methods without state.
    inference: "same", or "top_k" where evaluation selects by biased top-k instead.
    by_token: whether in evaluation a token's experts depend on it alone, so that text can be made token by token.
    """

    init: Callable[..., State]
    combine: Callable[[Array, Array], Array] | None
    select: Callable[..., Array] | None
    drop: Callable[..., Bool[Array, "tokens slots"]] | None
    observe: Callable[[Routing], Statistics]
    losses: Callable[[Routing, Statistics, State, Array], dict[str, Float32[Array, ""]]]
    update: Callable[[Statistics, State, Array], State]
    inference: Literal["same", "top_k"]
    by_token: bool = True

    def loss(self, routing: Routing, statistics: Statistics, state: State, router_weight: Array) -> Float32[Array, ""]:
        """The sum of all losses; 0 for methods without one."""
        return sum(self.losses(routing, statistics, state, router_weight).values(), jnp.zeros((), jnp.float32))


REGISTRY: dict[str, Callable[[Any, ModelConfig], Method]] = {}


def register(name: str) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator: `name` in a config builds its Method by the decorated function of (options, model config)."""
    assert name in BALANCE_METHODS, f"{name} needs an options dataclass in moe_jax.options.BALANCE_METHODS"

    def add(build: Callable[..., Method]) -> Callable[..., Method]:
        REGISTRY[name] = build
        return build

    return add


def names() -> tuple[str, ...]:
    """Every registered method, sorted."""
    return tuple(sorted(REGISTRY))


def make(
    mapping: Mapping[str, Any] | tuple[BalanceEntry, ...] | None = None, model: ModelConfig = ModelConfig()
) -> Balancer:
    """A Balancer from `config.balance`; `make({})` does not balance, but counts loads.

    Args:
        mapping: label -> options, as `dict(bias_sign=dict(rate=1e-3), aux_loss=dict(weight=1e-4))`; the
            label is the method's name, or any word with `method=` when one kind appears twice.
        model: what some methods must know: groups, zero experts, the vocabulary.

    Raises:
        ValueError: an unknown method or option, or two methods that both own the bias or both select.
    """
    entries = mapping if isinstance(mapping, tuple) else balance_entries(mapping)
    methods = {e.label: _wrapped(REGISTRY[e.method](e.options, model), e.options) for e in entries}
    selector, dropper, combiner = (_only(methods, what) for what in ("select", "drop", "combine"))
    combine = None if combiner is None else methods[combiner].combine
    return Balancer(
        init=functools.partial(_init, methods),
        combine=combine,
        select=None if selector is None else functools.partial(_select, selector, methods[selector], combine),
        drop=None if dropper is None else functools.partial(_drop, dropper, methods[dropper]),
        observe=functools.partial(_observe, methods),
        losses=functools.partial(_losses, methods),
        update=functools.partial(_update, methods),
        inference="same" if selector is None else methods[selector].inference,
        by_token=selector is None or methods[selector].inference == "top_k" or methods[selector].by_token,
    )


def needs_step_statistics(entries: tuple[BalanceEntry, ...]) -> bool:
    """True if a loss reads the statistics of the whole optimizer step, so that accumulation must count first."""
    return any(getattr(e.options, "scope", None) == "global" for e in entries)


def needs_running_statistics(entries: tuple[BalanceEntry, ...]) -> bool:
    """True if a loss reads the statistics of the micro-batches so far."""
    return any(getattr(e.options, "scope", None) == "global_running" for e in entries)


def _wrapped(method: Method, options: Any) -> Method:
    """The method under the options that all share."""
    if getattr(options, "ema", 0.0) and isinstance(options, BiasOptions):
        method = wrappers.smoothed(method, options.ema)
    if getattr(options, "num_classes", 1) > 1:
        method = wrappers.per_class(method, options.num_classes)
    if method.loss is not None and (options.warmup_steps or options.freeze_step is not None):
        method = wrappers.scheduled(method, options)
    return wrappers.within(method, options.layers) if options.layers else method


def _only(methods: Mapping[str, Method], what: str) -> str | None:
    """The label of the one method that has the function `what`, if any; two are an error."""
    found = [label for label, m in methods.items() if getattr(m, what) is not None]
    if len(found) > 1:
        raise ValueError(
            f"balance has {' and '.join(found)}, but only one method may {what} experts; remove all but one."
        )
    return found[0] if found else None


def _init(methods: Mapping[str, Method], num_experts: int, layer: Any = 0) -> State:
    own = {label: m.init(num_experts, layer) for label, m in methods.items()}
    owner = next((m for m in methods.values() if m.update_bias is not None), None)
    if owner is None:
        return {"bias": jnp.zeros(num_experts, jnp.float32)} | _present(own)
    shape = (num_experts,) if owner.num_classes == 1 else (owner.num_classes, num_experts)
    bias = jnp.full(shape, owner.initial_bias, jnp.float32)
    return {"bias": bias, "direction": jnp.zeros(shape, jnp.int8)} | _present(own)


def _select(
    label: str,
    method: Method,
    combine: Callable[[Array, Array], Array] | None,
    scores: Float32[Array, "tokens experts"],
    bias: Array,
    *,
    train: bool,
    state: State | None = None,
    top_k: int,
    **how: Any,
) -> Array:
    assert method.select is not None
    biased = scores + bias if combine is None else combine(scores, bias)
    if not train and method.inference == "top_k":
        return jax.lax.top_k(biased, top_k)[1]
    own = None if state is None else state.get(label)
    return method.select(scores, biased, top_k=top_k, train=train, state=own, **how)


def _drop(label: str, method: Method, routing: Routing, state: State, key: Array, train: bool) -> Array:
    assert method.drop is not None
    return method.drop(routing, key, train, state.get(label))


def _observe(methods: Mapping[str, Method], routing: Routing) -> Statistics:
    own = {label: m.observe(routing) for label, m in methods.items()}
    return jax.lax.stop_gradient({"loads": routing.loads} | _present(own))


def _losses(
    methods: Mapping[str, Method],
    routing: Routing,
    statistics: Statistics,
    state: State,
    router_weight: Float32[Array, "embed experts"],
) -> dict[str, Float32[Array, ""]]:
    values = {}
    for label, m in methods.items():
        if m.loss is not None:
            own = statistics.get(label), state.get(label)
            values[label] = m.loss(routing, statistics["loads"], *own, router_weight)
    for label, m in methods.items():
        if m.factor is not None:
            values[m.controls] *= jax.lax.stop_gradient(m.factor(state.get(label)))
    return values


def _update(methods: Mapping[str, Method], statistics: Statistics, state: State, step: Array) -> State:
    new = dict(state)
    for label, m in methods.items():
        seen = statistics["loads"], statistics.get(label)
        if m.update_bias is not None:
            new["bias"], own = m.update_bias(*seen, state["bias"], state.get(label), step)
            if "direction" in state:
                new["direction"] = jnp.sign(new["bias"] - state["bias"]).astype(jnp.int8)
        elif m.update is not None:
            own = m.update(*seen, state.get(label), step)
        else:
            continue
        if own is not None:
            new[label] = own
    return wrappers.choose(statistics["loads"].sum() > 0, new, dict(state))  # a step without tokens teaches nothing


def _present(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the methods that keep nothing, so that a pytree holds arrays only."""
    return {label: value for label, value in tree.items() if value is not None}
