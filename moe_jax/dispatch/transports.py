"""How a round ships rows: padded to equal parts, or exactly; and the dispatchers that do so."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moe_jax.dispatch.rounds import Copies, Round, Rounds, in_rounds
from moe_jax.dispatch.sorting import sum_before
from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.mesh import BATCH


@register("rounds")
def rounds(work: Work) -> tuple[Array, Traffic]:
    """At most C copies per pair of devices by `all_to_all`, as many times as it takes."""
    return in_rounds(work, padded)


@register("ragged")
def ragged(work: Work) -> tuple[Array, Traffic]:
    """Exact amounts by `ragged_all_to_all`, which XLA:CPU does not have, in rounds too."""
    return in_rounds(work, exact)


def padded(copies: Copies, capacity_factor: float, devices: int) -> Rounds:
    """Rounds of `all_to_all`, of at most C = factor x mean copies from each device to each; runs anywhere."""
    num_copies = copies.copy.shape[0]
    capacity = min(num_copies, math.ceil(capacity_factor * num_copies / devices))
    needed = lax.pmax(-(-copies.send.max() // capacity), BATCH)
    upto = jnp.cumsum(copies.received, axis=1, dtype=jnp.int32)
    inside = jnp.arange(capacity, dtype=jnp.int32)[None]

    def make(number: Array | int) -> Round:
        first = number * capacity
        filled = first + inside < copies.send[:, None]
        at = jnp.where(filled, copies.start[:, None] + first + inside, num_copies).ravel()
        token, copy = (m.at[at].get(mode="fill", fill_value=num_copies) for m in (copies.token, copies.copy))
        wanted = copies.place - copies.start.at[copies.device].get(mode="fill", fill_value=0) - first
        here = (wanted >= 0) & (wanted < capacity) & (copies.device < devices)
        slot = jnp.where(here, copies.device * capacity + wanted, devices * capacity)
        # a source's copies for this device are sorted by expert: place c of the round is of the first expert
        # whose copies, with those of all experts before it, are more than that
        expert = (upto[:, :, None] <= first + inside[None]).sum(1, dtype=jnp.int32).ravel()

        def exchange(buffer: Array) -> Array:
            return lax.all_to_all(buffer.reshape(devices, capacity, -1), "expert", 0, 0, tiled=True).reshape(
                buffer.shape
            )

        return Round(token, copy, slot, expert, exchange, exchange)

    return math.ceil(num_copies / capacity), needed, make


def exact(copies: Copies, capacity_factor: float, devices: int) -> Rounds:
    """Rounds of `ragged_all_to_all`, in which a device takes in at most factor x mean copies from all others.

    The copies for one device, source after source, are one list; round n ships its n-th piece.
    """
    num_copies = copies.copy.shape[0]
    capacity = math.ceil(min(capacity_factor, devices) * num_copies)
    sent = lax.all_gather(copies.send, "expert")  # [source, destination]
    needed = lax.pmax(-(-sent.sum(0, dtype=jnp.int32).max() // capacity), BATCH)
    here = lax.axis_index("expert")
    offset = sum_before(sent)  # where a source's copies lie in the destination's list
    start = sum_before(sent.T)[here]  # where the copies for this device lie at every source
    upto = jnp.cumsum(copies.received.ravel(), dtype=jnp.int32)
    local_experts = copies.received.shape[1]

    def make(number: Array | int) -> Round:
        first = number * capacity
        begin, end = (jnp.clip(bound - offset, 0, sent) for bound in (first, first + capacity))
        amount, landing = end - begin, offset + begin - first
        listed = first + jnp.arange(capacity, dtype=jnp.int32)
        # runs are those of `received`: sources, then experts
        run = (upto[:, None] <= listed[None]).sum(0, dtype=jnp.int32)
        expert = jnp.where(run < upto.size, run % local_experts, local_experts)

        def there(buffer: Array) -> Array:
            rows = jnp.zeros_like(buffer, shape=(capacity, buffer.shape[1]))
            places = copies.start + begin[here], amount[here], landing[here], amount[:, here]
            return lax.ragged_all_to_all(buffer, rows, *places, axis_name="expert")

        def home(rows: Array) -> Array:
            buffer = jnp.zeros_like(rows, shape=(num_copies, rows.shape[1]))
            places = landing[:, here], amount[:, here], start + begin[:, here], amount[here]
            return lax.ragged_all_to_all(rows, buffer, *places, axis_name="expert")

        # copies of other rounds lie in the buffer too: they are not shipped, and come home as 0
        return Round(copies.token, copies.copy, copies.place, expert, there, home)

    return math.ceil(devices * num_copies / capacity), needed, make
