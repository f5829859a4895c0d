"""Exchange between devices in rounds: send copies, multiply, send outputs back, repeat; nothing is dropped.

The dispatchers that use it, `rounds` and `ragged`, differ in the transport that plans a round and moves its rows.

T tokens, K slots, N = T K copies, E experts, D embed, X devices on the mesh's expert axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int32

from moe_jax.dispatch.experts import Multiply
from moe_jax.dispatch.local import local
from moe_jax.dispatch.repeated import Inputs, Repeated, sum_of_rounds
from moe_jax.dispatch.sorting import sorting_of, sum_before, take
from moe_jax.dispatch.work import Traffic, Work
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.mesh import axes, is_sharded
from moe_jax.routing import count


class Copies(NamedTuple):
    """This device's token copies, sorted by expert, and thereby by device, since a device's experts are consecutive.

    token, copy [N, 1]: the token and the copy at each place of the sorted order.
    place [T, K]: the place of each copy. device [T, K]: the device that has its expert, X for an empty slot.
    start, sent [X]: the first place and the number of the copies for each device.
    received [X, E / X]: how many copies each source device has for each expert of this device.
    """

    token: Int32[Array, "copies 1"]
    copy: Int32[Array, "copies 1"]
    place: Int32[Array, "tokens slots"]
    device: Int32[Array, "tokens slots"]
    start: Int32[Array, "devices"]
    sent: Int32[Array, "devices"]
    received: Int32[Array, "devices local_experts"]


class Round(NamedTuple):
    """One exchange: which slot of the outgoing buffer holds which copy, and how the buffer travels.

    token, copy [slots, 1]: those of each outgoing slot; out of range if it is empty.
    slot [T, K]: the slot of each copy; out of range if this round does not ship it.
    expert [rows]: the local expert of each incoming row; E / X if the row is empty.
    send: the outgoing buffer [slots, D] -> the incoming rows [rows, D]. send_back: the inverse.
    """

    token: Array
    copy: Array
    slot: Array
    expert: Array
    send: Callable[[Array], Array]
    send_back: Callable[[Array], Array]


# how many rounds are needed, and the function that makes a round from its number
Rounds = tuple[Array, Callable[[Array | int], Round]]
# (this device's copies, capacity factor, X) -> its rounds
Transport = Callable[[Copies, float, int], Rounds]


def in_rounds(work: Work, transport: Transport) -> tuple[Array, Traffic]:
    """Dropless expert parallelism in bounded memory: copies that do not fit into a round wait for the next.

    All devices of the mesh run as many rounds as the busiest one needs.
    """
    if not is_sharded(work.mesh):
        return local(work)  # a single device exchanges nothing
    capacity_factor, devices, multiply = work.capacity_factor, work.devices, work.multiply

    def plan(copies: Copies) -> Repeated:
        needed, make = transport(copies, capacity_factor, devices)
        return Repeated(needed, lambda number, inputs: _one_round(make(number), inputs, multiply))

    copies = _sort_copies(work.expert_ids, work.num_experts, devices)
    y, needed, rows = sum_of_rounds(plan, Inputs(work.x, work.gates, work.weights), copies)
    return y, Traffic.of(rounds=needed, rows=rows, visits=work.visits())


def _one_round(now: Round, inputs: Inputs, multiply: Multiply) -> tuple[Array, Array]:
    """What the round's copies add to the output, float32 [T, D], and how many rows were multiplied.

    Gates travel with their copies, and outputs are weighted before they are sent back, so that the backward pass need
    not repeat the exchange that sends them back. What has arrived is named for `model.remat_keep`, so that it need not
    repeat the other one either.
    """
    x, gates, weights = inputs
    with jax.named_scope("dispatch"):
        incoming = checkpoint_name(now.send(take(x, now.token, now.slot)), "rows")
        share = checkpoint_name(now.send(take(gates.reshape(-1, 1), now.copy, now.slot.reshape(-1, 1))), "rows")
        rows = rows_multiplied(count(now.expert, weights.num_experts), multiply.tile)
    outputs = multiply.routed(incoming, now.expert[:, None], share, weights)
    with jax.named_scope("combine"):
        returned = now.send_back(outputs.astype(x.dtype))
        return take(returned, now.slot, now.token).astype(jnp.float32), rows


def _sort_copies(expert_ids: Array, num_experts: int, devices: int) -> Copies:
    """The copies of expert_ids [T, K], after an exchange of their counts with all other devices."""
    slots = expert_ids.shape[1]
    loads = count(expert_ids, num_experts).reshape(devices, -1)
    order, place = sorting_of(expert_ids.ravel())
    sent = loads.sum(1, dtype=jnp.int32)
    return Copies(
        token=order[:, None] // slots,
        copy=order[:, None],
        place=place.reshape(expert_ids.shape),
        device=expert_ids // (num_experts // devices),
        start=sum_before(sent),
        sent=sent,
        received=lax.all_to_all(loads, axes("experts"), 0, 0, tiled=True),
    )
