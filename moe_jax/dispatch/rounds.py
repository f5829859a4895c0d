"""Dispatch between devices in rounds: as many exchanges as it takes, so that nothing is dropped."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from moe_jax.dispatch.experts import ExpertWeights, Kernel, Traffic, _before, _sorting, _take, _traffic, _visits
from moe_jax.kernels.grouped import rows_multiplied
from moe_jax.routing import count

# --- expert parallel: exchange, multiply, exchange back, in as many rounds as it takes ------------------------


class _Copies(NamedTuple):
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


class _Round(NamedTuple):
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


class _Exchange(NamedTuple):
    """How copies travel: by which transport, with how much room, between how many devices, multiplied by what."""

    transport: Callable
    factor: float
    devices: int
    kernel: Kernel

    def plan(self, copies: _Copies) -> tuple[int, Array, Callable[[Array | int], _Round]]:
        """Rounds that could be needed, that are, and round by number."""
        return self.transport(copies, self.factor, self.devices)


def _in_rounds(
    x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, *, exchange: _Exchange
) -> tuple[Array, Traffic]:
    """Dropless expert parallelism in bounded memory: what does not fit into a round waits for the next.

    All devices do as many rounds as the busiest needs, over every axis: a device that stopped early would leave
    the others waiting. The first round is unconditional, so that a balanced step has no branch on its way and
    shared experts may compute meanwhile; the others run only if somebody needs them.
    """
    num_local, devices = weights.gate.shape[0], exchange.devices
    copies = _sort_copies(expert_ids, num_local * devices, devices)
    _, needed, make = exchange.plan(copies)
    first = jax.checkpoint(lambda x, gates, weights: _one_round(make(0), x, gates, weights, exchange.kernel))
    y, rows = _add(first(x, gates, weights), _further_rounds(exchange, x, gates, weights, copies))
    visits = _visits(expert_ids, num_local, devices)
    return y, _traffic(rounds=needed, rows=rows, visits=visits)


def _one_round(now: _Round, x: Array, gates: Array, weights: ExpertWeights, kernel: Kernel) -> tuple[Array, Array]:
    """What the round's copies add to the output, float32 [T, D], and how many rows were multiplied.

    Gates travel with their copies: weighed here, the way home needs not be gone again in the backward pass.
    """
    with jax.named_scope("dispatch"):
        incoming = now.there(_take(x, now.token, now.slot))
        share = now.there(_take(gates.reshape(-1, 1), now.copy, now.slot.reshape(-1, 1)))
        rows = rows_multiplied(count(now.expert, weights.gate.shape[0]), kernel.tile)
    outputs = kernel.multiply(incoming, now.expert[:, None], share, weights)
    with jax.named_scope("combine"):
        outgoing = now.home(outputs.astype(x.dtype))
        return _take(outgoing, now.slot, now.token).astype(jnp.float32), rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(
    exchange: _Exchange, x: Array, gates: Array, weights: ExpertWeights, copies: _Copies
) -> tuple[Array, Array]:
    """The sum of all rounds after the first. Nothing is kept of them for the backward pass, which does them again,

    whatever the layer around keeps: memory must not grow with the number of rounds that could be needed.
    """
    possible, needed, make = exchange.plan(copies)

    def nothing(_: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(x, jnp.float32), jnp.zeros_like(copies.send, shape=())

    def one(number: Array) -> tuple[Array, Array]:
        # the sum stays outside of the checkpoint, or backward would keep it for every possible round
        run = jax.checkpoint(lambda n: _one_round(make(n), x, gates, weights, exchange.kernel))
        return lax.cond(number < needed, run, nothing, number)

    def all_of_them(numbers: Array) -> tuple[Array, Array]:
        return lax.scan(lambda sofar, n: (_add(sofar, jax.checkpoint(one)(n)), None), nothing(numbers), numbers)[0]

    numbers = jnp.arange(1, possible, dtype=jnp.int32)
    return lax.cond(needed > 1, all_of_them, nothing, numbers) if possible > 1 else nothing(numbers)


def _further_rounds_again(exchange: _Exchange, kept: tuple, d: tuple) -> tuple[Array, Array, ExpertWeights, None]:
    *inputs, copies = kept
    return *jax.vjp(lambda *inputs: _further_rounds.fun(exchange, *inputs, copies), *inputs)[1](d), None


def _add(a: tuple, b: tuple) -> tuple:
    return jax.tree.map(jnp.add, a, b)


def _sort_copies(expert_ids: Array, num_experts: int, devices: int) -> _Copies:
    slots = expert_ids.shape[1]
    loads = count(expert_ids, num_experts).reshape(devices, -1)
    order, place = _sorting(expert_ids.ravel())
    send = loads.sum(1, dtype=jnp.int32)
    return _Copies(
        token=order[:, None] // slots,
        copy=order[:, None],
        place=place.reshape(expert_ids.shape),
        device=expert_ids // (num_experts // devices),
        start=_before(send),
        send=send,
        received=lax.all_to_all(loads, "expert", 0, 0, tiled=True),
    )
