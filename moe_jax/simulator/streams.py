"""Streams of router logits to balance: synthetic ones that drift, burst, switch or counteract, and recorded ones.

A stream supplies, for every step, the logits of one MoE layer and the facts about its tokens. Synthetic logits are
`noise x (z + offset)`: z differs from token to token with standard deviation 1, and the offset is how popular an expert
is with all tokens, in the same units.

T tokens, E experts, N recorded steps, R sequences of a batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from moe_jax.routing import Rows, Tokens


class Stream(NamedTuple):
    """init: (key) -> state. next: (state, key, step, loads of the last step) -> (state, logits [T, E], Tokens)."""

    init: Callable[[Array], Any]
    next: Callable[[Any, Array, Array, Array], tuple[Any, Array, Tokens]]


class Offsets(NamedTuple):
    """init: (key) -> state. move: (state, key, step, loads of the last step) -> (state, offset float32 [E])."""

    init: Callable[[Array], Any]
    move: Callable[[Any, Array, Array, Array], tuple[Any, Array]]


BURSTING = 0.02  # share of experts that are in a burst
POOL_STEPS = 4  # size of the pool of normal numbers, in steps ...
SMALLEST_POOL = 2**20  # ... and at least; in a smaller one, the loads' spread would depend on the seed

# --- how popular experts are ------------------------------------------------------------------------------------


def skewed(num_experts: int, skew: float) -> Offsets:
    """Fixed offsets, normal with standard deviation `skew`."""
    return Offsets(lambda key: _drawn(key, (num_experts,), skew), lambda offset, *_: (offset, offset))


def drifting(num_experts: int, skew: float, drift: float) -> Offsets:
    """Offsets that begin as `skewed` and take a normal step of standard deviation `drift` each time."""

    def move(offset: Array, key: Array, step: Array, loads: Array) -> tuple[Array, Array]:
        offset = offset + _drawn(key, (num_experts,), drift)
        return offset, offset

    return Offsets(lambda key: _drawn(key, (num_experts,), skew), move)


def bursty(num_experts: int, skew: float, burst: float, period: int) -> Offsets:
    """Offsets as `skewed`; now and then an expert gets `burst` more for `period` steps, about 2 % of them at a time."""

    def init(key: Array) -> tuple[Array, Array]:
        return _drawn(key, (num_experts,), skew), jnp.zeros(num_experts, jnp.int32)

    def move(state: tuple[Array, Array], key: Array, step: Array, loads: Array) -> tuple[Any, Array]:
        offset, left = state
        begins = jax.random.bernoulli(key, jnp.float32(BURSTING / period), (num_experts,))
        left = jnp.where(begins, period, jnp.maximum(left - 1, 0))
        return (offset, left), offset + burst * (left > 0).astype(jnp.float32)

    return Offsets(init, move)


def domains(num_experts: int, skew: float, domains: int, period: int) -> Offsets:
    """Domains with separate offsets as `skewed`; every `period` steps one domain is drawn for the batches."""

    def init(key: Array) -> tuple[Array, Array]:
        return _drawn(key, (domains, num_experts), skew), key

    def move(state: tuple[Array, Array], key: Array, step: Array, loads: Array) -> tuple[Any, Array]:
        offsets, own_key = state
        drawn = jax.random.randint(jax.random.fold_in(own_key, step // period), (), 0, domains, jnp.int32)
        return state, offsets[drawn]

    return Offsets(init, move)


def shift(num_experts: int, skew: float, at: int) -> Offsets:
    """Offsets as `skewed`, and from step `at` on other ones."""

    def init(key: Array) -> Array:
        return jnp.stack([_drawn(k, (num_experts,), skew) for k in jax.random.split(key)])

    return Offsets(init, lambda offsets, key, step, loads: (offsets, offsets[(step >= at).astype(jnp.int32)]))


def adversarial(num_experts: int, skew: float, drift: float, bound: float) -> Offsets:
    """Offsets that begin as `skewed`; every step raises that of the most loaded expert by `drift`.

    The sum of the offsets is kept by lowering all equally, and each is clipped to `bound`.
    """

    def move(offset: Array, key: Array, step: Array, loads: Array) -> tuple[Array, Array]:
        push = jax.nn.one_hot(loads.argmax(), num_experts, dtype=jnp.float32) - 1.0 / num_experts
        offset = jnp.clip(offset + drift * push * (loads.sum() > 0).astype(jnp.float32), -bound, bound)
        return offset, offset

    return Offsets(lambda key: _drawn(key, (num_experts,), skew), move)


def _drawn(key: Array, shape: tuple[int, ...], deviation: float) -> Array:
    return deviation * jax.random.normal(key, shape, jnp.float32)


# --- logits -----------------------------------------------------------------------------------------------------


def synthetic(
    offsets: Offsets, num_tokens: int, num_experts: int, num_rows: int, noise: float, vocab_size: int
) -> Stream:
    """Logits `noise x (z + offset)` of T tokens in R sequences, with uniform token ids.

    z is the scaled sum of two random windows of a pool of normal numbers, because drawing T x E normal numbers every
    step would take longer than everything else. The windows begin anywhere, so a token has other numbers every step.
    """
    size = num_tokens * num_experts
    room = max(POOL_STEPS * size, SMALLEST_POOL)

    def init(key: Array) -> dict[str, Any]:
        pool_key, own_key = jax.random.split(key)
        return {"pool": jax.random.normal(pool_key, (room,), jnp.float32), "offsets": offsets.init(own_key)}

    def next(state: dict[str, Any], key: Array, step: Array, loads: Array) -> tuple[Any, Array, Tokens]:
        window_key, move_key, id_key = jax.random.split(key, 3)
        own, offset = offsets.move(state["offsets"], move_key, step, loads)
        windows = [
            lax.dynamic_slice(state["pool"], (start,), (size,))
            for start in jax.random.randint(window_key, (2,), 0, room - size, jnp.int32)
        ]
        z = (windows[0] + windows[1]).reshape(num_tokens, num_experts) * 0.5**0.5
        ids = jax.random.randint(id_key, (num_tokens,), 0, vocab_size, jnp.int32)
        return state | {"offsets": own}, noise * (z + offset[None]), rows_of(num_rows, num_tokens)._replace(ids=ids)

    return Stream(init, next)


def recorded(logits: Array, mask: Array, ids: Array, num_rows: int) -> Stream:
    """Replays [N, T, E], [N, T] and [N, T] step after step, and then again from the first."""

    def next(state: tuple[Array, ...], key: Array, step: Array, loads: Array) -> tuple[Any, Array, Tokens]:
        own_logits, own_mask, own_ids = (a[step % len(a)] for a in state)
        tokens = rows_of(num_rows, logits.shape[1])._replace(mask=own_mask, ids=own_ids)
        return state, own_logits.astype(jnp.float32), tokens

    return Stream(lambda key: (logits, mask, ids), next)


def rows_of(num_rows: int, num_tokens: int) -> Tokens:
    """T tokens as R sequences of equal length, one after the other."""
    return Tokens(row=jnp.arange(num_tokens, dtype=jnp.int32) * num_rows // num_tokens, rows=Rows(num_rows))
