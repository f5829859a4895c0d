"""Dispatch: send every token copy to its expert, and combine what comes back, weighed by the gates.

T tokens, K slots (experts per token), N = T K copies, E experts, D embed, F expert ffw, B rows, C capacity.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.grouped import grouped_matmul
from moe_jax.routing import Routing


class ExpertWeights(NamedTuple):
    """SwiGLU experts: gate and up [E, D, F], down [E, F, D]."""

    gate: Float[Array, "experts embed ffw"]
    up: Float[Array, "experts embed ffw"]
    down: Float[Array, "experts ffw embed"]


def apply_experts(
    x: Float[Array, "tokens embed"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    backend: str = "auto",
    num_rows: int = 1,
    capacity_factor: float = 1.25,
) -> tuple[Float[Array, "tokens embed"], Int32[Array, ""]]:
    """sum over a token's experts of gate x expert(x), and how many token copies were dropped.

    Args:
        x: [T, D]; with `num_rows` B, tokens of row b are x[b S : (b + 1) S].
        routing: where the tokens go.
        weights: the experts, in the compute dtype.
        backend: "local" sorts the copies by expert: dropless, exact, cost not growing with E ("auto" is
            this on one device). "dense" runs every expert on every token: the oracle. "capacity" gives each
            expert `capacity` slots per row and drops the rest (GShard, Switch).
        num_rows: B, used by "capacity" only, whose groups are sequences.
        capacity_factor: slots over the balanced load, used by "capacity" only.

    Returns:
        y [T, D] in x's dtype; dropped copies int32 [].
    """
    if backend == "capacity":
        return _capacity(x, routing, weights, num_rows, capacity_factor)
    run = {"auto": _local, "local": _local, "dense": _dense}[backend]
    return run(x, routing, weights), jnp.zeros((), jnp.int32)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """`(silu(x gate) * (x up)) down`. Source: arXiv 2002.05202."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


# --- dense: the oracle ----------------------------------------------------------------------------------------


def _dense(x: Array, routing: Routing, weights: ExpertWeights) -> Array:
    num_experts = weights.gate.shape[0]
    outputs = jax.vmap(swiglu, in_axes=(None, 0, 0, 0))(x, *weights)
    share = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32) * routing.gates[..., None]
    return jnp.einsum("te,etd->td", share.sum(1), outputs).astype(x.dtype)


# --- local: sort by expert, dropless --------------------------------------------------------------------------


def _local(x: Array, routing: Routing, weights: ExpertWeights) -> Array:
    slots = routing.expert_ids.shape[1]
    order = jnp.argsort(routing.expert_ids.ravel(), stable=True).astype(jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    copies = _take_copies(x, order, inverse, slots)
    hidden = jax.nn.silu(grouped_matmul(copies, weights.gate, routing.loads))
    hidden = hidden * grouped_matmul(copies, weights.up, routing.loads)
    outputs = grouped_matmul(hidden, weights.down, routing.loads)
    back = _permute(outputs, inverse, order).reshape(x.shape[0], slots, x.shape[1])
    return jnp.einsum("tk,tkd->td", routing.gates, back).astype(x.dtype)


@jax.custom_vjp
def _permute(rows: Array, index: Array, inverse: Array) -> Array:
    """rows[index] for a permutation: its transpose is a gather by the inverse, not a scatter."""
    return rows[index]


_permute.defvjp(
    lambda rows, index, inverse: (rows[index], inverse),
    lambda inverse, d: (d[inverse], None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take_copies(x: Array, order: Array, inverse: Array, slots: int) -> Array:
    """The copies of the tokens in sorted order, [T K, D]: copy j is of token j // K. Transposed by a gather."""
    return x[order // slots]


def _take_copies_backward(slots: int, inverse: Array, d: Array) -> tuple[Array, None, None]:
    per_token = d[inverse].reshape(-1, slots, d.shape[-1])
    return per_token.astype(jnp.float32).sum(1).astype(d.dtype), None, None


_take_copies.defvjp(
    lambda x, order, inverse, slots: (x[order // slots], inverse),
    _take_copies_backward,
)


# --- capacity: fixed slots per expert and sequence, the rest is dropped ---------------------------------------


def capacity_of(row_tokens: int, slots: int, num_experts: int, capacity_factor: float) -> int:
    """Slots an expert has for one sequence: factor x the balanced load, rounded up, at least 1."""
    return max(1, math.ceil(capacity_factor * row_tokens * slots / num_experts))


def _capacity(
    x: Array, routing: Routing, weights: ExpertWeights, num_rows: int, capacity_factor: float
) -> tuple[Array, Array]:
    """GShard's dispatch: first choices of a whole sequence are seated before second choices.

    That order is the original's, and it means that with K > 1 a later token's first choice can unseat an
    earlier token's second: capacity dispatch is causal for top-1 only. Source: arXiv 2006.16668 Algorithm 1.
    """
    num_experts, slots = weights.gate.shape[0], routing.expert_ids.shape[1]
    row_tokens = x.shape[0] // num_rows
    capacity = capacity_of(row_tokens, slots, num_experts, capacity_factor)
    ids = routing.expert_ids.reshape(num_rows, row_tokens, slots)
    seat = jax.vmap(lambda row: _seats(row, num_experts))(ids)
    kept = (ids < num_experts) & (seat < capacity)
    dropped = ((ids < num_experts) & ~kept).sum(dtype=jnp.int32)
    # slot (e, b, c) of one flat buffer; a copy without a seat points past its end
    position = (ids * num_rows + jnp.arange(num_rows)[:, None, None]) * capacity + seat
    position = jnp.where(kept, position, num_experts * num_rows * capacity).reshape(-1, slots)
    buffer = jnp.zeros((num_experts * num_rows * capacity, x.shape[1]), x.dtype)
    buffer = buffer.at[position].set(x[:, None, :], mode="drop")
    outputs = jax.vmap(swiglu)(buffer.reshape(num_experts, -1, x.shape[1]), *weights)
    back = outputs.reshape(-1, x.shape[1]).at[position].get(mode="fill", fill_value=0)
    return jnp.einsum("tk,tkd->td", routing.gates, back).astype(x.dtype), dropped


def _seats(ids: Int32[Array, "tokens slots"], num_experts: int) -> Int32[Array, "tokens slots"]:
    """The place of every copy in its expert's queue: all first choices in token order, then all second ones."""
    queue = ids.T.ravel()
    order = jnp.argsort(queue, stable=True)
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[queue].add(1)
    starts = jnp.cumsum(sizes) - sizes
    place = jnp.zeros_like(queue).at[order].set(jnp.arange(queue.size, dtype=jnp.int32))
    return (place - starts[queue]).reshape(ids.shape[::-1]).T
