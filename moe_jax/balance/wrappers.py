"""Options that many methods share, implemented as functions from a Balancer to a Balancer."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from moe_jax.balance.protocol import Balancer, Seen, choose, zeros
from moe_jax.routing import Routing, best, count


def factor_at(options: Any, step: Int32[Array, ""] | int) -> Float32[Array, ""]:
    """The factor on a rate or weight at `step`: a linear warmup to 1, then the schedule; 0 from `freeze_step` on."""
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


def smoothed(method: Balancer, ema: float) -> Balancer:
    """A method that owns the bias, with an exponential moving average of the loads, float32, instead of the last loads.

    The average is corrected for its start at 0, as Adam's moments are.
    """

    def own_state(num_experts: int, layer: Any) -> dict[str, Any]:
        own = method.own_state(num_experts, layer)
        return {"sum": zeros(num_experts), "weight": jnp.zeros((), jnp.float32), "own": own}

    def own_update(seen: Seen) -> tuple[Array, Any]:
        total = ema * seen.state["sum"] + (1.0 - ema) * seen.loads.astype(jnp.float32)
        weight = ema * seen.state["weight"] + (1.0 - ema)
        bias, own = method.own_update(_inside(seen)._replace(loads=total / weight))
        return bias, {"sum": total, "weight": weight, "own": own}

    return method._replace(own_state=own_state, own_update=own_update, at_step=_at_step_inside(method))


def scheduled(method: Balancer, options: Any) -> Balancer:
    """A loss whose weight changes over steps; the next step's factor is state, because a loss does not get the step."""

    def own_state(num_experts: int, layer: Any) -> dict[str, Any]:
        return {"factor": factor_at(options, 0), "own": method.own_state(num_experts, layer)}

    def own_loss(routing: Routing, seen: Seen, router_weight: Array) -> Any:
        assert method.own_loss is not None
        losses = method.own_loss(routing, _inside(seen), router_weight)
        return jax.tree.map(lambda loss: seen.state["factor"] * loss, losses)

    def own_update(seen: Seen) -> tuple[Array, dict[str, Any]]:
        bias, own = method.own_update(_inside(seen))
        return bias, {"factor": factor_at(options, seen.step + 1), "own": own}

    def at_step(own: Any, step: Array) -> dict[str, Any]:
        return {"factor": factor_at(options, step), "own": method.at_step(own["own"], step)}

    return method._replace(own_state=own_state, own_loss=own_loss, own_update=own_update, at_step=at_step)


def within(method: Balancer, layers: tuple[int, ...]) -> Balancer:
    """The method in the MoE layers start <= layer < stop; other layers behave as if it did not exist.

    Layers are scanned and run the same program, so the method is computed in every layer and unused where inactive.
    """
    start, stop = layers

    def own_state(num_experts: int, layer: Any) -> dict[str, Any]:
        active = (jnp.asarray(layer) >= start) & (jnp.asarray(layer) < stop)
        return {"active": active, "own": method.own_state(num_experts, layer)}

    def own_update(seen: Seen) -> tuple[Array, Any]:
        inside = _inside(seen)
        bias, own = choose(seen.state["active"], method.own_update(inside), (inside.bias, inside.state))
        return bias, seen.state | {"own": own}

    def router(learned: Array, state: Any) -> Array:
        assert method.router is not None
        return jnp.where(state["active"], method.router(learned, state["own"]), learned)

    def select(scores: Array, biased: Array, *, top_k: int, state: Any = None, **how: Any) -> Array:
        assert method.select is not None
        if state is None:
            return method.select(scores, biased, top_k=top_k, state=None, **how)
        ids = method.select(scores, biased, top_k=top_k, state=state["own"], **how)
        usual = best(biased, top_k)  # not lax.top_k, which would gather the scores of a sharded batch
        slots = max(ids.shape[1], top_k)
        ids, usual = (_with_slots(a, slots, scores.shape[1]) for a in (ids, usual))
        return jnp.where(state["active"], ids, usual)

    def drop(routing: Routing, state: Any, key: Array, train: bool) -> Array:
        assert method.drop is not None
        return method.drop(routing, state["own"], key, train) | ~state["active"]

    def own_loss(routing: Routing, seen: Seen, router_weight: Array) -> Any:
        assert method.own_loss is not None
        losses = method.own_loss(routing, _inside(seen), router_weight)
        return jax.tree.map(lambda loss: jnp.where(seen.state["active"], loss, 0.0), losses)

    def factors(state: Any) -> dict[str, Array]:
        assert method.factors is not None
        return jax.tree.map(lambda factor: jnp.where(state["active"], factor, 1.0), method.factors(state["own"]))

    limited: dict[str, Any] = {f.__name__: f for f in (router, select, drop, own_loss, factors)}
    limited = {name: f for name, f in limited.items() if getattr(method, name) is not None}
    at_step = _at_step_inside(method)
    return method._replace(own_state=own_state, own_update=own_update, at_step=at_step, **limited)


def per_class(method: Balancer, num_classes: int) -> Balancer:
    """A method that owns the bias, with a separate bias (together [C, E]) and state for every class of tokens.

    A class is balanced by its own tokens alone; one without tokens keeps its bias and state. Source: DeepSeek-V4.1.
    """

    def of_every_class(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (num_classes, *a.shape)), tree)

    def own_statistics(routing: Routing) -> dict[str, Any]:
        def of_class(c: Array) -> dict[str, Any]:
            tokens = routing.tokens
            kind = jnp.zeros(len(routing.scores), jnp.int32) if tokens.kind is None else tokens.kind
            mask = kind == c if tokens.mask is None else (kind == c) & tokens.mask
            ids = jnp.where(mask[:, None], routing.expert_ids, routing.loads.shape[0])
            loads = count(ids, routing.loads.shape[0])
            bias = routing.bias[c]
            own = routing._replace(expert_ids=ids, loads=loads, bias=bias, tokens=tokens._replace(mask=mask))
            return {"loads": loads, "own": method.own_statistics(own)}

        return jax.vmap(of_class)(jnp.arange(num_classes, dtype=jnp.int32))

    def own_update(seen: Seen) -> tuple[Array, Any]:
        def of_class(statistics: Any, bias: Array, state: Any) -> tuple[Array, Any]:
            own = Seen(statistics["loads"], statistics["own"], bias, state, seen.step)
            return choose(own.loads.sum() > 0, method.own_update(own), (bias, state))

        return jax.vmap(of_class)(seen.own, seen.bias, seen.state)

    def initial_bias(num_experts: int) -> Array:
        assert method.initial_bias is not None
        return of_every_class(method.initial_bias(num_experts))

    return method._replace(
        own_state=lambda num_experts, layer: of_every_class(method.own_state(num_experts, layer)),
        own_statistics=own_statistics,
        own_update=own_update,
        at_step=lambda own, step: own if own is None else jax.vmap(method.at_step, (0, None))(own, step),
        initial_bias=initial_bias,
    )


# --- a state under other options -------------------------------------------------------------------------------

DERIVED = ("active", "factor")  # entries of a wrapped state that options and step determine, whatever happened before


def taken_over(own: Any, there: Any) -> Any:
    """The own state of a method with everything that a run has learned in the own state `there` of the same method.

    Args:
        own: under this run's options, before step 0.
        there: of the same method and model under other options, so that other wrappers may surround it.
    """
    inner = dict(_entries(there))
    if not _is_wrapped(own):
        return inner[""] if _alike(own, inner[""]) else own
    kept = {key: inner.get(key, old) if key not in DERIVED else old for key, old in own.items() if key != "own"}
    return kept | {"own": taken_over(own["own"], inner[""])}


def is_whole(own: Any, there: Any) -> bool:
    """Whether `taken_over` finds all that `own` has learned in `there`."""
    mine, theirs = dict(_entries(own)), dict(_entries(there))
    return mine.keys() - DERIVED <= theirs.keys() and _alike(mine[""], theirs[""])


def _entries(own: Any) -> Iterator[tuple[str, Any]]:
    """The entries of all wrappers around an own state by name, and the state of the method itself as ""."""
    while _is_wrapped(own):
        yield from ((key, value) for key, value in own.items() if key != "own")
        own = own["own"]
    yield "", own


def _is_wrapped(own: Any) -> bool:
    return isinstance(own, dict) and set(own) in ({"active", "own"}, {"factor", "own"}, {"sum", "weight", "own"})


def _alike(a: Any, b: Any) -> bool:
    """Whether two trees have the same leaves by name, shape and dtype."""
    trees = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
    one, other = ({str(path): (leaf.shape, leaf.dtype) for path, leaf in leaves} for leaves in trees)
    return one == other


# --- helpers ---------------------------------------------------------------------------------------------------


def _at_step_inside(method: Balancer) -> Callable[[Any, Array], Any]:
    """`at_step` of the wrapped method, for wrappers whose own entries do not depend on the step."""
    return lambda own, step: own | {"own": method.at_step(own["own"], step)}


def _inside(seen: Seen) -> Seen:
    """The inputs of the wrapped method, whose own state is under "own"."""
    return seen._replace(state=seen.state["own"])


def _with_slots(expert_ids: Array, slots: int, empty: int) -> Array:
    return jnp.pad(expert_ids, ((0, 0), (0, slots - expert_ids.shape[1])), constant_values=empty)
