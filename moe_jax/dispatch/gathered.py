"""The dispatcher `gathered`: all devices of a small group of experts get all tokens of the group.

T tokens, K slots, X devices on the mesh's expert axis, G = X T tokens of the group, N = G K copies of them, E experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int32

from moe_jax.dispatch.experts import Multiply
from moe_jax.dispatch.local import local
from moe_jax.dispatch.repeated import Inputs, Repeated, sum_of_rounds
from moe_jax.dispatch.sorting import sum_before, sum_of_runs, take, to_runs
from moe_jax.dispatch.work import Traffic, Work, register
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.mesh import axes, part_index
from moe_jax.routing import count


class Own(NamedTuple):
    """The group's copies that are for this device's experts, in the order of tokens.

    number: how many there are.
    expert [G, K]: the expert of each copy, counted from this device's first; E / X if the copy is not for this device.
    place [G, K]: how many of this device's copies are before each copy.
    copy [N]: the copy at each place; N where there is none.
    """

    number: Int32[Array, ""]
    expert: Int32[Array, "tokens slots"]
    place: Int32[Array, "tokens slots"]
    copy: Int32[Array, "copies"]


@register("gathered")
def gathered(work: Work) -> tuple[Array, Traffic]:
    """Gather the group's tokens, ids and gates, multiply the copies for this device's experts, scatter the sums.

    Tokens travel once and not once a copy, to all devices of the group and not only to those of their experts. The
    outputs are summed over a token's experts before they travel, and over devices on the way, in x's dtype. In between
    a device exchanges nothing: it takes its copies in rounds of C = factor x mean copies, as many as it needs itself.

    Source: Megatron-LM's "allgather" token dispatcher, MaxText's `use_ring_of_experts`.
    """
    if work.devices == 1:
        return local(work)
    with jax.named_scope("dispatch"):
        x, gates, ids = (_of_group(a) for a in (work.x, work.gates, work.expert_ids))
    capacity = math.ceil(min(work.capacity_factor, work.devices) * work.expert_ids.size)
    multiply = work.multiply

    def plan(own: Own) -> Repeated:
        needed = -(-own.number // capacity)
        return Repeated(needed, lambda number, inputs: _one_round(own, number * capacity, capacity, inputs, multiply))

    own = _own_copies(ids, work.weights.num_experts)
    y, needed, rows = sum_of_rounds(plan, Inputs(x, gates, work.weights), own)
    with jax.named_scope("combine"):
        y = lax.psum_scatter(y.astype(x.dtype), axes("experts"), tiled=True)
    return y.astype(jnp.float32), Traffic.of(rounds=needed, rows=rows, visits=work.visits())


def _of_group(a: Array) -> Array:
    """The arrays of all devices of the group, one after the other; named for `model.remat_keep`."""
    return checkpoint_name(lax.all_gather(a, axes("experts"), tiled=True), "rows")


def _own_copies(expert_ids: Array, local_experts: int) -> Own:
    """The copies for this device, of the group's expert_ids [G, K]."""
    expert = expert_ids - part_index(axes("experts")) * local_experts
    mine = (expert >= 0) & (expert < local_experts)
    place = sum_before(mine.ravel().astype(jnp.int32))
    none = jnp.full_like(place, place.size)
    copy = none.at[jnp.where(mine.ravel(), place, none)].set(jnp.arange(place.size, dtype=jnp.int32), mode="drop")
    return Own(mine.sum(dtype=jnp.int32), jnp.where(mine, expert, local_experts), place.reshape(mine.shape), copy)


def _one_round(own: Own, first: Array | int, capacity: int, inputs: Inputs, multiply: Multiply) -> tuple[Array, Array]:
    """What the copies of `capacity` places from `first` on add to the output of the group, and the rows multiplied."""
    x, gates, weights = inputs
    local_experts, slots = weights.num_experts, own.expert.shape[1]
    place = first + jnp.arange(capacity, dtype=jnp.int32)
    copy = own.copy.at[place].get(mode="fill", fill_value=own.copy.size)
    expert = own.expert.ravel().at[copy].get(mode="fill", fill_value=local_experts)
    # the same seen from a copy: its row, if this round has it; the rows of a token are adjacent
    here = (own.expert < local_experts) & (own.place >= first) & (own.place < first + capacity)
    row = jnp.where(here, own.place - first, capacity)
    runs = copy // slots, row.min(1), slots
    with jax.named_scope("dispatch"):
        incoming = to_runs(x, *runs)
        share = take(gates.reshape(-1, 1), copy[:, None], row.reshape(-1, 1))
        rows = rows_multiplied(count(expert, local_experts), multiply.tile)
    outputs = multiply.routed(incoming, expert[:, None], share, weights)
    with jax.named_scope("combine"):
        return sum_of_runs(outputs, *runs), rows
