"""Dispatch with a fixed capacity per expert and sequence, which drops what exceeds it (GShard, Switch)."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from moe_jax.dispatch.experts import ExpertWeights, Traffic, _before, _sorting, _swiglu_of_each, _traffic, _visits

# --- capacity: fixed slots per expert and sequence, the rest is dropped ---------------------------------------


def capacity_of(row_tokens: int, slots: int, num_experts: int, capacity_factor: float) -> int:
    """Slots an expert has for one sequence: factor x the balanced load, rounded up, at least 1."""
    return max(1, math.ceil(capacity_factor * row_tokens * slots / num_experts))


def _capacity(
    x: Array,
    expert_ids: Array,
    gates: Array,
    weights: ExpertWeights,
    *,
    row_tokens: int,
    factor: float,
    devices: int,
    quantization: str,
) -> tuple[Array, Traffic]:
    """GShard's dispatch: first choices of a whole sequence are seated before second choices.

    That order is the original's, and it means that with K > 1 a later token's first choice can unseat an
    earlier token's second: capacity dispatch is causal for top-1 only. Source: arXiv 2006.16668 Algorithm 1.
    """
    num_experts, slots = weights.gate.shape[0] * devices, expert_ids.shape[1]
    num_rows = x.shape[0] // row_tokens
    capacity = capacity_of(row_tokens, slots, num_experts, factor)
    ids = expert_ids.reshape(num_rows, row_tokens, slots)
    seat = jax.vmap(lambda row: _seats(row, num_experts))(ids)
    kept = (ids < num_experts) & (seat < capacity)
    dropped = ((ids < num_experts) & ~kept).sum(dtype=jnp.int32)
    # slot (e, b, c) of one flat buffer; a copy without a seat points past its end
    position = (ids * num_rows + jnp.arange(num_rows, dtype=jnp.int32)[:, None, None]) * capacity + seat
    position = jnp.where(kept, position, num_experts * num_rows * capacity).reshape(-1, slots)
    buffer = jnp.zeros_like(x, shape=(num_experts * num_rows * capacity, x.shape[1]))
    buffer = buffer.at[position].set(x[:, None, :], mode="drop").reshape(num_experts, -1, x.shape[1])
    if devices > 1:
        buffer = lax.all_to_all(buffer, "expert", 0, 1, tiled=True)
    outputs = _swiglu_of_each(buffer, weights, quantization)
    if devices > 1:
        outputs = lax.all_to_all(outputs, "expert", 1, 0, tiled=True)
    back = outputs.reshape(-1, x.shape[1]).at[position].get(mode="fill", fill_value=0)
    rows = buffer.shape[0] * buffer.shape[1]
    seated = jnp.where(kept, ids, num_experts).reshape(-1, slots)
    visits = _visits(seated, num_experts // devices, devices)
    return jnp.einsum("tk,tkd->td", gates, back.astype(jnp.float32)), _traffic(
        dropped, rounds=1, rows=rows, visits=visits
    )


def _seats(ids: Int32[Array, "tokens slots"], num_experts: int) -> Int32[Array, "tokens slots"]:
    """The place of every copy in its expert's queue: all first choices in token order, then all second ones."""
    queue = ids.T.ravel()
    _, place = _sorting(queue)
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[queue].add(1)
    starts = _before(sizes)
    return (place - starts[queue]).reshape(ids.shape[::-1]).T
