"""The dispatcher `capacity`: a fixed capacity per expert and sequence, beyond which copies are dropped (GShard)."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from moe_jax.dispatch.sorting import sorting_of, sum_before
from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.mesh import axes


def capacity_of(sequence_length: int, slots: int, num_experts: int, capacity_factor: float) -> int:
    """The number of seats that an expert has for one sequence: factor x the balanced load, rounded up, at least 1."""
    return max(1, math.ceil(capacity_factor * sequence_length * slots / num_experts))


@register("capacity")
def capacity(work: Work) -> tuple[Array, Traffic]:
    """GShard's dispatch: the first choices of a whole sequence are seated before its second ones; the rest is dropped.

    This is the order of the original. With K > 1 a later token's first choice can therefore take the seat of an earlier
    token's second choice: capacity dispatch is causal for top-1 only. Source: arXiv 2006.16668 Algorithm 1.
    """
    x = work.x
    num_experts = work.num_experts
    slots = work.expert_ids.shape[1]
    num_sequences = x.shape[0] // work.sequence_length
    seats = capacity_of(work.sequence_length, slots, num_experts, work.capacity_factor)
    ids = work.expert_ids.reshape(num_sequences, work.sequence_length, slots)
    seat = jax.vmap(lambda sequence: seats_of(sequence, num_experts))(ids)
    kept = (ids < num_experts) & (seat < seats)
    dropped = ((ids < num_experts) & ~kept).sum(dtype=jnp.int32)
    # the index of seat (expert, sequence, seat) in a flat buffer; for a copy without a seat, past its end
    position = (ids * num_sequences + jnp.arange(num_sequences, dtype=jnp.int32)[:, None, None]) * seats + seat
    position = jnp.where(kept, position, num_experts * num_sequences * seats).reshape(-1, slots)

    def seated(rows: Array) -> Array:
        """rows [T, 1 or K, N] at their seats, on the devices of their experts: [E, seats of all sequences, N]."""
        empty = jnp.zeros_like(rows, shape=(num_experts * num_sequences * seats, rows.shape[2]))
        buffer = empty.at[position].set(rows, mode="drop").reshape(num_experts, -1, rows.shape[2])
        return lax.all_to_all(buffer, axes("experts"), 0, 1, tiled=True) if work.devices > 1 else buffer

    buffer = seated(x[:, None])
    outputs = work.multiply.each(buffer, seated(work.gates[..., None]), work.weights)
    if work.devices > 1:
        outputs = lax.all_to_all(outputs, axes("experts"), 1, 0, tiled=True)
    back = outputs.reshape(-1, x.shape[1]).at[position].get(mode="fill", fill_value=0)
    visits = work.visits(jnp.where(kept, ids, num_experts).reshape(-1, slots))
    traffic = Traffic.of(dropped=dropped, rows=buffer.shape[0] * buffer.shape[1], visits=visits)
    return back.astype(jnp.float32).sum(1), traffic


def seats_of(ids: Int32[Array, "tokens slots"], num_experts: int) -> Int32[Array, "tokens slots"]:
    """Each copy's place in the queue of its expert: all first choices in token order, then all second ones."""
    queue = ids.T.ravel()
    _, place = sorting_of(queue)
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[queue].add(1)
    starts = sum_before(sizes)
    return (place - starts[queue]).reshape(ids.shape[::-1]).T
