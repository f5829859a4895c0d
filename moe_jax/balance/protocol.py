"""The balancing protocol: a method is a few pure functions, and several methods chained by label are one again.

As in optax, whatever takes a method takes a composition of methods too. A method sees one MoE layer, and in it only
what is its own; `loads` and `bias` are shared. Nothing is mutated in the forward pass.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from moe_jax.config.balance import at_most_one
from moe_jax.routing import Routing

State = dict[str, Any]  # {"bias": float32 [E] or [C, E], <label>: own state}
Statistics = dict[str, Any]  # {"loads": int32 [E], <label>: own statistics}


class Seen(NamedTuple):
    """What a method sees of its layer. E counts zero-computation experts too.

    loads: of the optimizer step; float32 where they are smoothed. own: the method's own statistics of the step.
    bias: the selection bias [E]. state: the method's own state. step: of the optimizer.
    """

    loads: Shaped[Array, "experts"]
    own: Any = None
    bias: Any = None
    state: Any = None
    step: Any = 0

    def by(self, label: str) -> "Seen":
        """What one method of a composition sees."""
        return self._replace(own=self.own.get(label), state=self.state.get(label))


class Balancer(NamedTuple):
    """One way of balancing experts: the functions that a method has, the others left out.

    own_state: (num_experts, layer) -> own state, a pytree of arrays.
    own_statistics: (Routing) -> own statistics, a pytree of arrays, ADDITIVE over micro-batches and shards.
    own_loss: (Routing, Seen, router_weight [D, E]) -> float32 [], or a dict of them; differentiable, averaged over the
        valid tokens of the Routing.
    factors: (own state) -> {label: float32 []}, times the losses of other methods in the composition.
    own_update: (Seen) -> (bias, own state), once per optimizer step; only the method that owns the bias moves it.
    initial_bias: (num_experts) -> the bias before step 0, of the method that owns it.
    combine: (scores, bias) -> biased scores [T, E]; their sum if None.
    select: (scores, biased scores, *, top_k, tokens, key, train, state) -> int32 [T, S]; id == E is an empty slot.
    inference: how a method that selects does so in evaluation: the "same", or by biased "top_k".
    by_token: whether a token's experts in evaluation depend on that token alone, not on which others are with it.
    drop: (Routing, own state, key, train) -> bool [T, S], the copies that travel; loads count the others too.

    A composition's own state, statistics and losses are dicts by label. Its four verbs `init`, `observe`, `losses` and
    `update` put beside them what the methods share, and are what a train step calls.
    """

    own_state: Callable[[int, Any], Any] = lambda num_experts, layer: None
    own_statistics: Callable[[Routing], Any] = lambda routing: None
    own_loss: Callable[[Routing, Seen, Array], Any] | None = None
    factors: Callable[[Any], dict[str, Float32[Array, ""]]] | None = None
    own_update: Callable[[Seen], tuple[Float32[Array, "..."], Any]] = lambda seen: (seen.bias, seen.state)
    initial_bias: Callable[[int], Float32[Array, "..."]] | None = None
    combine: Callable[[Array, Array], Array] | None = None
    select: Callable[..., Int32[Array, "tokens slots"]] | None = None
    inference: Literal["same", "top_k"] = "same"
    by_token: bool = True
    drop: Callable[[Routing, Any, Array, bool], Bool[Array, "tokens slots"]] | None = None

    def init(self, num_experts: int, layer: Any = 0) -> State:
        """A layer's state before step 0; `direction`, the signs of the last move, where a method moves the bias."""
        own = self.own_state(num_experts, layer)
        if self.initial_bias is None:
            return {"bias": zeros(num_experts)} | own
        bias = self.initial_bias(num_experts)
        return {"bias": bias, "direction": jnp.zeros(bias.shape, jnp.int8)} | own

    def observe(self, routing: Routing) -> Statistics:
        """What a forward pass adds to the statistics of the step; always has `loads` int32 [E]."""
        return jax.lax.stop_gradient({"loads": routing.loads} | self.own_statistics(routing))

    def losses(
        self, routing: Routing, statistics: Statistics, state: State, router_weight: Float32[Array, "embed experts"]
    ) -> dict[str, Any]:
        """The losses by label, float32 [] each, from the statistics of the whole optimizer step."""
        assert self.own_loss is not None, "a composition has losses, if none of them"
        return self.own_loss(routing, Seen(statistics["loads"], statistics, state["bias"], state), router_weight)

    def loss(self, routing: Routing, statistics: Statistics, state: State, router_weight: Array) -> Float32[Array, ""]:
        """The sum of all losses; 0 for methods without one."""
        losses = jax.tree.leaves(self.losses(routing, statistics, state, router_weight))
        return sum(losses, jnp.zeros((), jnp.float32))

    def update(self, statistics: Statistics, state: State, step: Array) -> State:
        """A layer's state after an optimizer step; one without tokens teaches nothing."""
        loads = statistics["loads"]
        bias, own = self.own_update(Seen(loads, statistics, state["bias"], state, step))
        new = {**state, **own, "bias": bias}
        if "direction" in state:
            new["direction"] = jnp.sign(bias - state["bias"]).astype(jnp.int8)
        return choose(loads.sum() > 0, new, dict(state))


def chain(methods: Mapping[str, Balancer]) -> Balancer:
    """The methods as one, each with its own state, statistics and loss under its label; their order never matters.

    Raises:
        ValueError: two methods both own the bias, select, drop or combine.
    """
    owner = _only(methods, "initial_bias", "own the bias")
    selector = _only(methods, "select", "select experts")
    dropper = _only(methods, "drop", "drop experts")
    combiner = _only(methods, "combine", "combine experts")
    none = Balancer()
    return Balancer(
        own_state=functools.partial(_own_state, methods),
        own_statistics=functools.partial(_own_statistics, methods),
        own_loss=functools.partial(_own_loss, methods),
        own_update=functools.partial(_own_update, methods),
        initial_bias=methods.get(owner, none).initial_bias,
        combine=methods.get(combiner, none).combine,
        select=functools.partial(_select, selector, methods[selector]) if selector else None,
        inference=methods.get(selector, none).inference,
        by_token=all(m.by_token or m.inference == "top_k" for m in methods.values()),
        drop=functools.partial(_drop, dropper, methods[dropper]) if dropper else None,
    )


def zeros(num_experts: int, layer: Any = 0) -> Float32[Array, "experts"]:
    """Where a bias, or an own state of one number per expert, mostly starts."""
    return jnp.zeros(num_experts, jnp.float32)


def choose(condition: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` where the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _only(methods: Mapping[str, Balancer], function: str, what: str) -> str:
    """The label of the one method that has the function, or ""."""
    found = [label for label, m in methods.items() if getattr(m, function) is not None]
    at_most_one(what, found)
    return "".join(found)


def _own_state(methods: Mapping[str, Balancer], num_experts: int, layer: Any) -> dict[str, Any]:
    return _present({label: m.own_state(num_experts, layer) for label, m in methods.items()})


def _own_statistics(methods: Mapping[str, Balancer], routing: Routing) -> dict[str, Any]:
    return _present({label: m.own_statistics(routing) for label, m in methods.items()})


def _own_update(methods: Mapping[str, Balancer], seen: Seen) -> tuple[Array, dict[str, Any]]:
    bias = seen.bias
    states = {}
    for label, method in methods.items():
        bias, states[label] = method.own_update(seen.by(label)._replace(bias=bias))
    return bias, _present(states)


def _own_loss(methods: Mapping[str, Balancer], routing: Routing, seen: Seen, router_weight: Array) -> dict[str, Any]:
    values = {}
    for label, method in methods.items():
        if method.own_loss is not None:
            values[label] = method.own_loss(routing, seen.by(label), router_weight)
    for label, method in methods.items():
        if method.factors is not None:
            for controlled, factor in method.factors(seen.state[label]).items():
                values[controlled] *= jax.lax.stop_gradient(factor)
    return values


def _select(
    label: str,
    method: Balancer,
    scores: Float32[Array, "tokens experts"],
    biased: Float32[Array, "tokens experts"],
    *,
    top_k: int,
    train: bool,
    state: State | None = None,
    **how: Any,
) -> Int32[Array, "tokens slots"]:
    assert method.select is not None
    if not train and method.inference == "top_k":
        return jax.lax.top_k(biased, top_k)[1]
    own = None if state is None else state.get(label)
    return method.select(scores, biased, top_k=top_k, train=train, state=own, **how)


def _drop(label: str, method: Balancer, routing: Routing, state: State, key: Array, train: bool) -> Array:
    assert method.drop is not None
    return method.drop(routing, state.get(label), key, train)


def _present(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the methods that keep nothing, so that a pytree holds arrays only."""
    return {label: value for label, value in tree.items() if value is not None}
