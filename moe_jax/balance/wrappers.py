"""Options that many methods share, as functions from a Method to a Method."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.method import Method
from moe_jax.routing import Routing, best, count


def factor_at(options: Any, step: Int32[Array, ""] | int) -> Float32[Array, ""]:
    """What shapes a rate or weight at `step`: a linear warm-up, then 1, or falling to 0 at `freeze_step`; 0 after."""
    step = jnp.asarray(step, jnp.float32)
    factor = jnp.minimum(1.0, (step + 1.0) / max(1, options.warmup_steps))
    if options.freeze_step is not None:
        span = max(1, options.freeze_step - options.warmup_steps)
        progress = jnp.clip((step - options.warmup_steps) / span, 0.0, 1.0)
        if options.schedule == "linear":
            factor *= 1.0 - progress
        if options.schedule == "cosine":
            factor *= 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        factor *= step < options.freeze_step
    return factor


def smoothed(method: Method, ema: float) -> Method:
    """A method that owns the bias and sees a moving average of the loads, float32, in place of the last ones.

    The average is of the steps so far, without the pull to 0 that starting from nothing would have.
    """

    def init(num_experts: int, layer: Any) -> dict[str, Any]:
        nothing = jnp.zeros(num_experts, jnp.float32), jnp.zeros((), jnp.float32)
        return {"sum": nothing[0], "weight": nothing[1], "own": method.init(num_experts, layer)}

    def update_bias(loads: Array, own: Any, bias: Array, state: Any, step: Array) -> tuple[Array, Any]:
        assert method.update_bias is not None
        total = ema * state["sum"] + (1.0 - ema) * loads.astype(jnp.float32)
        weight = ema * state["weight"] + (1.0 - ema)
        bias, inner = method.update_bias(total / weight, own, bias, state["own"], step)
        return bias, {"sum": total, "weight": weight, "own": inner}

    return method._replace(init=init, update_bias=update_bias)


def scheduled(method: Method, options: Any) -> Method:
    """A loss whose weight changes over steps: the factor of the next step is state, for a loss knows no step."""

    def init(num_experts: int, layer: Any) -> dict[str, Any]:
        return {"factor": factor_at(options, 0), "own": method.init(num_experts, layer)}

    def loss(routing: Routing, loads: Array, own: Any, state: Any, router_weight: Array) -> Array:
        assert method.loss is not None
        return state["factor"] * method.loss(routing, loads, own, state["own"], router_weight)

    def update(loads: Array, own: Any, state: Any, step: Array) -> dict[str, Any]:
        inner = state["own"] if method.update is None else method.update(loads, own, state["own"], step)
        return {"factor": factor_at(options, step + 1), "own": inner}

    return method._replace(init=init, loss=loss, update=update)


def within(method: Method, layers: tuple[int, ...]) -> Method:
    """The method in the MoE layers start <= layer < stop; the others are as if it did not exist.

    Layers are scanned, so all run the same program: what is inactive computes, and is not used.
    """
    start, stop = layers

    def init(num_experts: int, layer: Any) -> dict[str, Any]:
        active = (jnp.asarray(layer) >= start) & (jnp.asarray(layer) < stop)
        return {"active": active, "own": method.init(num_experts, layer)}

    def update(loads: Array, own: Any, state: Any, step: Array) -> dict[str, Any]:
        assert method.update is not None
        return state | {"own": choose(state["active"], method.update(loads, own, state["own"], step), state["own"])}

    def update_bias(loads: Array, own: Any, bias: Array, state: Any, step: Array) -> tuple[Array, Any]:
        assert method.update_bias is not None
        moved = method.update_bias(loads, own, bias, state["own"], step)
        new_bias, new_own = choose(state["active"], moved, (bias, state["own"]))
        return new_bias, state | {"own": new_own}

    def select(scores: Array, biased: Array, *, top_k: int, state: Any = None, **how: Any) -> Array:
        assert method.select is not None
        if state is None:
            return method.select(scores, biased, top_k=top_k, state=None, **how)
        ids = method.select(scores, biased, top_k=top_k, state=state["own"], **how)
        usual = best(biased, top_k)  # no top_k, which would gather the scores of a sharded batch
        slots = max(ids.shape[1], top_k)
        ids, usual = (_with_slots(a, slots, scores.shape[1]) for a in (ids, usual))
        return jnp.where(state["active"], ids, usual)

    def drop(routing: Routing, key: Array, train: bool, state: Any) -> Array:
        assert method.drop is not None
        return method.drop(routing, key, train, state["own"]) | ~state["active"]

    def loss(routing: Routing, loads: Array, own: Any, state: Any, router_weight: Array) -> Array:
        assert method.loss is not None
        return jnp.where(state["active"], method.loss(routing, loads, own, state["own"], router_weight), 0.0)

    def factor(state: Any) -> Array:
        assert method.factor is not None
        return jnp.where(state["active"], method.factor(state["own"]), 1.0)

    limited: dict[str, Any] = {f.__name__: f for f in (update, update_bias, select, drop, loss, factor)}
    return method._replace(init=init, **{n: f for n, f in limited.items() if getattr(method, n) is not None})


def per_class(method: Method, num_classes: int) -> Method:
    """A method that owns the bias, with one bias [C, E] and one state for every class of tokens (DeepSeek-V4.1).

    A class is balanced by its own tokens alone; one without tokens keeps what it has.
    """

    def init(num_experts: int, layer: Any) -> Any:
        own = method.init(num_experts, layer)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (num_classes, *a.shape)), own)

    def observe(routing: Routing) -> dict[str, Any]:
        def of_class(c: Array) -> dict[str, Any]:
            tokens = routing.tokens
            kind = jnp.zeros(len(routing.scores), jnp.int32) if tokens.kind is None else tokens.kind
            mask = kind == c if tokens.mask is None else (kind == c) & tokens.mask
            ids = jnp.where(mask[:, None], routing.expert_ids, routing.loads.shape[0])
            loads = count(ids, routing.loads.shape[0])
            bias = routing.bias[c]
            own = routing._replace(expert_ids=ids, loads=loads, bias=bias, tokens=tokens._replace(mask=mask))
            return {"loads": loads, "own": method.observe(own)}

        return jax.vmap(of_class)(jnp.arange(num_classes, dtype=jnp.int32))

    def update_bias(loads: Array, own: Any, bias: Array, state: Any, step: Array) -> tuple[Array, Any]:
        def of_class(seen: Any, bias: Array, state: Any) -> tuple[Array, Any]:
            assert method.update_bias is not None
            moved = method.update_bias(seen["loads"], seen["own"], bias, state, step)
            return choose(seen["loads"].sum() > 0, moved, (bias, state))

        return jax.vmap(of_class)(own, bias, state)

    return method._replace(init=init, observe=observe, update_bias=update_bias, num_classes=num_classes)


def choose(condition: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf `new` where the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _with_slots(expert_ids: Array, slots: int, empty: int) -> Array:
    return jnp.pad(expert_ids, ((0, 0), (0, slots - expert_ids.shape[1])), constant_values=empty)
