"""Dispatch between devices in rounds: exchange, multiply, exchange back, as often as it takes; nothing is dropped.

T tokens, K slots, N = T K copies, E experts, D embed, X devices on the mesh's expert axis.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from moe_jax.dispatch.experts import ExpertWeights, Multiply
from moe_jax.dispatch.local import local
from moe_jax.dispatch.sorting import sorting_of, sum_before, take
from moe_jax.dispatch.work import Traffic, Work
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.mesh import is_sharded
from moe_jax.routing import count


class Copies(NamedTuple):
    """This device's token copies, sorted by expert, and so by device, for a device's experts are consecutive.

    token, copy [N, 1]: which of them stands at a place. place [T, K]: where each copy stands. start, send [X]:
    the first place and the number of copies for each device. received [X, E / X]: how many copies every source
    has for each expert here.
    """

    token: Int32[Array, "copies 1"]
    copy: Int32[Array, "copies 1"]
    place: Int32[Array, "tokens slots"]
    device: Int32[Array, "tokens slots"]
    start: Int32[Array, "devices"]
    send: Int32[Array, "devices"]
    received: Int32[Array, "devices local_experts"]


class Round(NamedTuple):
    """One exchange: which slot of the outgoing buffer holds which copy, and how the buffer travels.

    token, copy [slots, 1] of every outgoing slot, slot [T, K] of every copy; out of range where there is none.
    expert [rows]: the local expert of every incoming row, E / X for none. there, home: buffer <-> rows.
    """

    token: Array
    copy: Array
    slot: Array
    expert: Array
    there: Callable[[Array], Array]
    home: Callable[[Array], Array]


# how many rounds could be needed, how many are, and a round by its number
Rounds = tuple[int, Array, Callable[[Array | int], Round]]


class _Exchange(NamedTuple):
    """How copies travel: by which transport, with how much room, between how many devices, multiplied how."""

    transport: Callable[[Copies, float, int], Rounds]
    capacity_factor: float
    devices: int
    multiply: Multiply

    def plan(self, copies: Copies) -> Rounds:
        """The rounds of these copies."""
        return self.transport(copies, self.capacity_factor, self.devices)


def in_rounds(work: Work, transport: Callable[[Copies, float, int], Rounds]) -> tuple[Array, Traffic]:
    """Dropless expert parallelism in bounded memory: what does not fit into a round waits for the next.

    All devices do as many rounds as the busiest needs, over every axis: a device that stopped early would leave
    the others waiting. The first round is unconditional, so that a balanced step has no branch on its way and
    shared experts may compute meanwhile; the others run only if somebody needs them.
    """
    if not is_sharded(work.mesh):
        return local(work)  # one device has nobody to exchange with
    x, gates, weights = work.x, work.gates, work.weights
    exchange = _Exchange(transport, work.capacity_factor, work.devices, work.multiply)
    copies = _sort_copies(work.expert_ids, work.num_experts, work.devices)
    _, needed, make = exchange.plan(copies)
    first = jax.checkpoint(lambda x, gates, weights: _one_round(make(0), x, gates, weights, exchange.multiply))
    y, rows = _add(first(x, gates, weights), _further_rounds(exchange, x, gates, weights, copies))
    return y, Traffic.of(rounds=needed, rows=rows, visits=work.visits())


def _one_round(now: Round, x: Array, gates: Array, weights: ExpertWeights, multiply: Multiply) -> tuple[Array, Array]:
    """What the round's copies add to the output, float32 [T, D], and how many rows were multiplied.

    Gates travel with their copies, and outputs are weighted before they return: so the backward pass does not
    repeat the exchange that brings them home.
    """
    with jax.named_scope("dispatch"):
        incoming = now.there(take(x, now.token, now.slot))
        share = now.there(take(gates.reshape(-1, 1), now.copy, now.slot.reshape(-1, 1)))
        rows = rows_multiplied(count(now.expert, weights.gate.shape[0]), multiply.tile)
    outputs = multiply.routed(incoming, now.expert[:, None], share, weights)
    with jax.named_scope("combine"):
        outgoing = now.home(outputs.astype(x.dtype))
        return take(outgoing, now.slot, now.token).astype(jnp.float32), rows


def _sum_of_further_rounds(
    exchange: _Exchange, x: Array, gates: Array, weights: ExpertWeights, copies: Copies
) -> tuple[Array, Array]:
    """What all rounds after the first add to the output, and how many rows they multiplied."""
    possible, needed, make = exchange.plan(copies)

    def nothing(_: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(x, jnp.float32), jnp.zeros_like(copies.send, shape=())

    def one(number: Array) -> tuple[Array, Array]:
        # the sum stays outside of the checkpoint, or backward would keep it for every possible round
        run = jax.checkpoint(lambda n: _one_round(make(n), x, gates, weights, exchange.multiply))
        return lax.cond(number < needed, run, nothing, number)

    def all_of_them(numbers: Array) -> tuple[Array, Array]:
        return lax.scan(lambda sofar, n: (_add(sofar, jax.checkpoint(one)(n)), None), nothing(numbers), numbers)[0]

    numbers = jnp.arange(1, possible, dtype=jnp.int32)
    return lax.cond(needed > 1, all_of_them, nothing, numbers) if possible > 1 else nothing(numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(
    exchange: _Exchange, x: Array, gates: Array, weights: ExpertWeights, copies: Copies
) -> tuple[Array, Array]:
    """`_sum_of_further_rounds`, of which nothing is kept: the backward pass does the rounds again.

    It does so whatever the layer around keeps: memory must not grow with the number of rounds that could be needed.
    """
    return _sum_of_further_rounds(exchange, x, gates, weights, copies)


def _keep_inputs(
    exchange: _Exchange, x: Array, gates: Array, weights: ExpertWeights, copies: Copies
) -> tuple[tuple[Array, Array], tuple]:
    return _sum_of_further_rounds(exchange, x, gates, weights, copies), (x, gates, weights, copies)


def _do_rounds_again(exchange: _Exchange, kept: tuple, d: tuple) -> tuple[Array, Array, ExpertWeights, None]:
    *inputs, copies = kept

    def again(x: Array, gates: Array, weights: ExpertWeights) -> tuple[Array, Array]:
        return _sum_of_further_rounds(exchange, x, gates, weights, copies)

    return *jax.vjp(again, *inputs)[1](d), None


_further_rounds.defvjp(_keep_inputs, _do_rounds_again)


def _add(a: tuple, b: tuple) -> tuple:
    return jax.tree.map(jnp.add, a, b)


def _sort_copies(expert_ids: Array, num_experts: int, devices: int) -> Copies:
    slots = expert_ids.shape[1]
    loads = count(expert_ids, num_experts).reshape(devices, -1)
    order, place = sorting_of(expert_ids.ravel())
    send = loads.sum(1, dtype=jnp.int32)
    return Copies(
        token=order[:, None] // slots,
        copy=order[:, None],
        place=place.reshape(expert_ids.shape),
        device=expert_ids // (num_experts // devices),
        start=sum_before(send),
        send=send,
        received=lax.all_to_all(loads, "expert", 0, 0, tiled=True),
    )
