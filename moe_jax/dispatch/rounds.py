"""The dispatcher `rounds`: every pair of devices exchanges blocks padded to one size; runs on any platform."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moe_jax.dispatch.exchange import Copies, Round, Rounds, in_rounds
from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.mesh import axes


@register("rounds")
def rounds(work: Work) -> tuple[Array, Traffic]:
    """At most C copies from each device to each other by `all_to_all`, in as many rounds as it takes."""
    return in_rounds(work, padded)


def padded(copies: Copies, capacity_factor: float, devices: int) -> Rounds:
    """Rounds of `all_to_all`, with at most C = factor x mean copies from each device to each.

    Args:
        copies: this device's, N of them.
        capacity_factor: room over the balanced load of a pair of devices, N / devices.
        devices: X.
    """
    num_copies = copies.copy.shape[0]
    capacity = min(num_copies, math.ceil(capacity_factor * num_copies / devices))
    needed = lax.pmax(-(-copies.sent.max() // capacity), axes("tokens"))
    ends = jnp.cumsum(copies.received, axis=1, dtype=jnp.int32)  # [X, E / X], of every expert's copies in its source
    index = jnp.arange(capacity, dtype=jnp.int32)[None]

    def make(number: Array | int) -> Round:
        first = number * capacity
        # the outgoing buffer has C slots for each device, filled from the copies sorted by device
        filled = first + index < copies.sent[:, None]
        place = jnp.where(filled, copies.start[:, None] + first + index, num_copies).ravel()
        token, copy = (m.at[place].get(mode="fill", fill_value=num_copies) for m in (copies.token, copies.copy))
        # the same seen from a copy: its slot, if this round ships it
        offset = copies.place - copies.start.at[copies.device].get(mode="fill", fill_value=0) - first
        shipped = (offset >= 0) & (offset < capacity) & (copies.device < devices)
        slot = jnp.where(shipped, copies.device * capacity + offset, devices * capacity)
        # a source's copies for this device are sorted by expert, so the expert of the i-th one is the number of
        # experts whose copies end at or before i
        expert = (ends[:, :, None] <= first + index[None]).sum(1, dtype=jnp.int32).ravel()

        def exchange(buffer: Array) -> Array:
            blocks = buffer.reshape(devices, capacity, -1)
            return lax.all_to_all(blocks, axes("experts"), 0, 0, tiled=True).reshape(buffer.shape)

        return Round(token, copy, slot, expert, exchange, exchange)

    return needed, make
