"""The dispatcher `ragged`: devices exchange exact amounts of rows; XLA:CPU does not have the collective for it."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moe_jax.dispatch.exchange import Copies, Round, Rounds, in_rounds
from moe_jax.dispatch.sorting import sum_before
from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.mesh import axes, part_index


@register("ragged")
def ragged(work: Work) -> tuple[Array, Traffic]:
    """Exact amounts by `ragged_all_to_all`, in as many rounds as it takes."""
    return in_rounds(work, exact)


def exact(copies: Copies, capacity_factor: float, devices: int) -> Rounds:
    """Rounds of `ragged_all_to_all`, in each of which a device receives at most C = factor x mean copies in all.

    The copies for one device, source after source, form one list, of which round n ships the n-th piece of C copies.

    Args:
        copies: this device's, N of them.
        capacity_factor: room over the balanced load of a device, N.
        devices: X.
    """
    num_copies = copies.copy.shape[0]
    capacity = math.ceil(min(capacity_factor, devices) * num_copies)
    sent = lax.all_gather(copies.sent, axes("experts"))  # [source, destination]
    needed = lax.pmax(-(-sent.sum(0, dtype=jnp.int32).max() // capacity), axes("tokens"))
    here = part_index(axes("experts"))
    offset = sum_before(sent)  # where a source's copies begin in the destination's list
    start = sum_before(sent.T)[here]  # where the copies for this device begin in each source's sorted copies
    ends = jnp.cumsum(copies.received.ravel(), dtype=jnp.int32)  # of the runs of one source and one expert
    local_experts = copies.received.shape[1]

    def make(number: Array | int) -> Round:
        first = number * capacity
        # of each source's copies for each destination, this round ships those from `begin` to `end`
        begin, end = (jnp.clip(bound - offset, 0, sent) for bound in (first, first + capacity))
        amount = end - begin
        landing = offset + begin - first
        position = first + jnp.arange(capacity, dtype=jnp.int32)
        run = (ends[:, None] <= position[None]).sum(0, dtype=jnp.int32)
        expert = jnp.where(run < ends.size, run % local_experts, local_experts)

        def send(buffer: Array) -> Array:
            rows = jnp.zeros_like(buffer, shape=(capacity, buffer.shape[1]))
            places = copies.start + begin[here], amount[here], landing[here], amount[:, here]
            return lax.ragged_all_to_all(buffer, rows, *places, axis_name=axes("experts"))

        def send_back(rows: Array) -> Array:
            buffer = jnp.zeros_like(rows, shape=(num_copies, rows.shape[1]))
            places = landing[:, here], amount[:, here], start + begin[:, here], amount[here]
            return lax.ragged_all_to_all(rows, buffer, *places, axis_name=axes("experts"))

        # the outgoing buffer also holds the copies of other rounds, which are not shipped and come back as 0
        return Round(copies.token, copies.copy, copies.place, expert, send, send_back)

    return needed, make
