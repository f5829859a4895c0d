"""The balancing protocol: a method is a few pure functions, and several methods chained by label are again a method.

As in optax, a composition of methods has the type of a method. A method sees one MoE layer, and only its own state and
statistics there; `loads` and `bias` are shared. The forward pass mutates nothing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from moe_jax.config.balance_rules import at_most_one
from moe_jax.routing import Routing

State = dict[str, Any]  # {"bias": float32 [E] or [C, E], <label>: own state}
Statistics = dict[str, Any]  # {"loads": int32 [E], <label>: own statistics}
Responses = Callable[[Float32[Array, "vectors embed"]], Float32[Array, "vectors experts"]]


class Seen(NamedTuple):
    """The inputs of a method, from one layer. E includes zero-computation experts.

    loads: those of the optimizer step; float32 if smoothed. own: the method's own statistics of the step.
    bias: the selection bias [E]. state: the method's own state. step: the optimizer step. For a composition `own` and
    `state` hold those of all its methods, by label.
    responses: for losses, (vectors [V, D]) -> float32 [V, experts that compute], the norm of what the first matrix of
    each expert makes of each vector; None where there are no experts. Computed where they are, and only if called.
    """

    loads: Shaped[Array, "experts"]
    own: Any = None
    bias: Any = None
    state: Any = None
    step: Any = 0
    responses: Responses | None = None

    def by(self, label: str) -> "Seen":
        """The inputs of one method of a composition."""
        return self._replace(own=self.own.get(label), state=self.state.get(label))


class Balancer(NamedTuple):
    """A balancing method as its functions; those that it does not need keep their defaults.

    own_state: (num_experts, layer) -> own state, a pytree of arrays.
    own_statistics: (Routing) -> own statistics, a pytree of arrays, ADDITIVE over micro-batches and shards.
    reads_inputs: whether own_statistics gets what the router read, too: (Routing, float32 [T, D] or None).
    own_loss: (Routing, Seen, router_weight [D, E]) -> float32 [], or a dict of them; differentiable, averaged over the
        valid tokens of the Routing.
    factors: (own state) -> {label: float32 []}, factors on the losses of other methods in the composition.
    own_update: (Seen) -> (bias, own state), once per optimizer step; only the method that owns the bias moves it.
    at_step: (own state before step 0, step) -> own state before that step, for a run that begins there; only what the
        step alone determines may change.
    router: (learned weight [D, E], own state) -> the router's weight [D, E] in place of the learned one.
    initial_bias: (num_experts) -> the bias before step 0; only the method that owns the bias has it.
    combine: (scores, bias) -> biased scores [T, E]; None is their sum.
    select: (scores, biased scores, *, top_k, tokens, key, train, state) -> int32 [T, S]; id == E is an empty slot.
    inference: how a selector routes in evaluation: the "same" way, or by biased "top_k".
    by_token: whether a token's experts in evaluation depend on that token alone, not on the other tokens in the batch.
    drop: (Routing, own state, key, train) -> bool [T, S], False for dropped copies, which loads still count.

    A composition's own state, statistics and losses are dicts by label. A train step calls the methods `init`,
    `observe`, `losses` and `update`, which add the shared entries to those dicts.
    """

    own_state: Callable[[int, Any], Any] = lambda num_experts, layer: None
    own_statistics: Callable[..., Any] = lambda routing: None
    reads_inputs: bool = False
    own_loss: Callable[[Routing, Seen, Array], Any] | None = None
    factors: Callable[[Any], dict[str, Float32[Array, ""]]] | None = None
    own_update: Callable[[Seen], tuple[Float32[Array, "..."], Any]] = lambda seen: (seen.bias, seen.state)
    at_step: Callable[[Any, Array], Any] = lambda own, step: own
    router: Callable[[Array, Any], Float32[Array, "embed experts"]] | None = None
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

    def observe(self, routing: Routing, inputs: Float32[Array, "tokens embed"] | None = None) -> Statistics:
        """The statistics of one forward pass, which are summed over the step; always with `loads`, int32 [E].

        inputs: what the router read; None where only logits are known.
        """
        return jax.lax.stop_gradient({"loads": routing.loads} | self.own_statistics(routing, inputs))

    def losses(
        self,
        routing: Routing,
        statistics: Statistics,
        state: State,
        router_weight: Float32[Array, "embed experts"],
        responses: Responses | None = None,
    ) -> dict[str, Any]:
        """The losses by label, float32 [] each.

        statistics: of this forward pass, or of more of the optimizer step where the scope of a loss says so.
        responses: of the layer's experts, as in `Seen`.
        """
        assert self.own_loss is not None, "a composition always has own_loss, which may return no loss"
        seen = Seen(statistics["loads"], statistics, state["bias"], state, responses=responses)
        return self.own_loss(routing, seen, router_weight)

    def loss(
        self,
        routing: Routing,
        statistics: Statistics,
        state: State,
        router_weight: Float32[Array, "embed experts"],
        responses: Responses | None = None,
    ) -> Float32[Array, ""]:
        """The sum of all losses; 0 for methods without one."""
        losses = jax.tree.leaves(self.losses(routing, statistics, state, router_weight, responses))
        return sum(losses, jnp.zeros((), jnp.float32))

    def update(self, statistics: Statistics, state: State, step: Array) -> State:
        """A layer's state after an optimizer step; a step without tokens leaves it unchanged."""
        loads = statistics["loads"]
        bias, own = self.own_update(Seen(loads, statistics, state["bias"], state, step))
        new = {**state, **own, "bias": bias}
        if "direction" in state:
            new["direction"] = jnp.sign(bias - state["bias"]).astype(jnp.int8)
        return choose(loads.sum() > 0, new, dict(state))


def chain(methods: Mapping[str, Balancer]) -> Balancer:
    """Combine methods into one, each with its own state, statistics and loss under its label, in any order.

    Raises:
        ValueError: more than one method owns the bias, selects, drops, combines or replaces the router.
    """
    replacer = _only(methods, "router", "replace the router")
    owner = _only(methods, "initial_bias", "own the bias")
    selector = _only(methods, "select", "select experts")
    dropper = _only(methods, "drop", "drop experts")
    combiner = _only(methods, "combine", "combine experts")
    none = Balancer()
    return Balancer(
        own_state=functools.partial(_own_state, methods),
        own_statistics=functools.partial(_own_statistics, methods),
        reads_inputs=True,
        own_loss=functools.partial(_own_loss, methods),
        own_update=functools.partial(_own_update, methods),
        at_step=functools.partial(_at_step, methods),
        router=functools.partial(_router, replacer, methods[replacer]) if replacer else None,
        initial_bias=methods.get(owner, none).initial_bias,
        combine=methods.get(combiner, none).combine,
        select=functools.partial(_select, selector, methods[selector]) if selector else None,
        inference=methods.get(selector, none).inference,
        by_token=all(m.by_token or m.inference == "top_k" for m in methods.values()),
        drop=functools.partial(_drop, dropper, methods[dropper]) if dropper else None,
    )


def zeros(num_experts: int, layer: Any = 0) -> Float32[Array, "experts"]:
    """Zeros [E]: the usual initial bias, or initial own state with one number per expert."""
    return jnp.zeros(num_experts, jnp.float32)


def choose(condition: Array, new: Any, old: Any) -> Any:
    """The leaves of `new` if the condition is true, otherwise those of `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _only(methods: Mapping[str, Balancer], function: str, what: str) -> str:
    """The label of the only method that has the function, or ""."""
    found = [label for label, m in methods.items() if getattr(m, function) is not None]
    at_most_one(what, found)
    return "".join(found)


def _own_state(methods: Mapping[str, Balancer], num_experts: int, layer: Any) -> dict[str, Any]:
    return _present({label: m.own_state(num_experts, layer) for label, m in methods.items()})


def _own_statistics(methods: Mapping[str, Balancer], routing: Routing, inputs: Array | None) -> dict[str, Any]:
    def of(method: Balancer) -> Any:
        return method.own_statistics(routing, inputs) if method.reads_inputs else method.own_statistics(routing)

    return _present({label: of(method) for label, method in methods.items()})


def _own_update(methods: Mapping[str, Balancer], seen: Seen) -> tuple[Array, dict[str, Any]]:
    bias = seen.bias
    states = {}
    for label, method in methods.items():
        bias, states[label] = method.own_update(seen.by(label)._replace(bias=bias))
    return bias, _present(states)


def _at_step(methods: Mapping[str, Balancer], state: State, step: Array) -> dict[str, Any]:
    return _present({label: m.at_step(state.get(label), step) for label, m in methods.items()})


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


def _router(label: str, method: Balancer, learned: Array, state: State) -> Float32[Array, "embed experts"]:
    assert method.router is not None
    return method.router(learned, state[label])


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
    """The entries that are not None, so that a pytree contains only arrays."""
    return {label: value for label, value in tree.items() if value is not None}
