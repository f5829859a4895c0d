"""Attention block by block of queries, in XLA: scores of one block at a time, computed again for the backward pass.

B batch, G heads of keys, R query heads for each, Q queries of a block, S keys that one of them may see.
Source: arXiv 2205.14135.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from moe_jax.kernels.sinks import beside_sinks, gradient_of_sinks

MOST_BLOCKS = 8  # of queries; few, because the program contains the code of each
LEAST_BLOCK = 64  # queries of a block


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def in_blocks(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    scale: float,
    window: int = 0,
    sinks: Array | None = None,
) -> Array:
    """`kernels.attention.attend` block by block of queries, each with the keys that one of them may see; in float32.

    The backward pass recomputes the scores, and their softmax from the stored logarithm of its sum.
    """
    return _forward(query, key, value, segment_ids, scale, window, sinks)[0]


Residuals = tuple[Array | None, ...]


def _forward(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float, window: int, sinks: Array | None
) -> tuple[Array, Residuals]:
    queries, keys, values = scale * by_head(query, key.shape[2]), by_key_head(key), by_key_head(value)
    outputs = []
    totals = []
    for block in _blocks(query.shape[1], window):
        scores = jnp.einsum("bgrqk,bgsk->bgrqs", queries[..., block.queries, :], keys[:, :, block.keys])
        visible = _visible(segment_ids, block, window)
        scores = jnp.where(visible, scores, -jnp.inf)  # at least a token itself is visible
        top = scores.max(-1, keepdims=True)
        powers = jnp.exp(scores - top)
        total = powers.sum(-1, keepdims=True)
        outputs.append(jnp.einsum("bgrqs,bgsv->bgrqv", powers, values[:, :, block.keys]) / total)
        totals.append(top + jnp.log(total))
    y = as_heads(jnp.concatenate(outputs, 3), query.dtype)
    logarithms = jnp.concatenate(totals, 3).reshape(query.shape[0], query.shape[2], -1)
    y, total = (checkpoint_name(a, "attention") for a in beside_sinks(y, logarithms, sinks))
    return y, (query, key, value, segment_ids, sinks, y, total)


def _backward(scale: float, window: int, residuals: Any, dy: Array) -> tuple[Array | None, ...]:
    query, key, value, segment_ids, sinks, y, total = residuals
    queries, keys, values = scale * by_head(query, key.shape[2]), by_key_head(key), by_key_head(value)
    grads = by_head(dy, key.shape[2])
    mean = (grads * by_head(y, key.shape[2])).sum(-1, keepdims=True)
    totals = total.reshape(mean.shape)
    d_queries, d_keys, d_values = [], jnp.zeros_like(keys), jnp.zeros_like(values)
    for block in _blocks(query.shape[1], window):
        rows = queries[..., block.queries, :]
        d = grads[..., block.queries, :]
        scores = jnp.einsum("bgrqk,bgsk->bgrqs", rows, keys[:, :, block.keys])
        weights = jnp.exp(scores - totals[..., block.queries, :])
        weights = jnp.where(_visible(segment_ids, block, window), weights, 0.0)
        d_scores = jnp.einsum("bgrqv,bgsv->bgrqs", d, values[:, :, block.keys])
        d_scores = weights * (d_scores - mean[..., block.queries, :])
        d_queries.append(jnp.einsum("bgrqs,bgsk->bgrqk", d_scores, keys[:, :, block.keys]) * scale)
        d_keys = d_keys.at[:, :, block.keys].add(jnp.einsum("bgrqs,bgrqk->bgsk", d_scores, rows))
        d_values = d_values.at[:, :, block.keys].add(jnp.einsum("bgrqs,bgrqv->bgsv", weights, d))
    d_query = as_heads(jnp.concatenate(d_queries, 3), query.dtype)
    d_key, d_value = as_heads(d_keys[:, :, None], key.dtype), as_heads(d_values[:, :, None], value.dtype)
    return d_query, d_key, d_value, None, gradient_of_sinks(sinks, total, y, dy)


in_blocks.defvjp(_forward, _backward)


class _Block(NamedTuple):
    """The queries of a block, and the keys that one of them may see."""

    queries: slice
    keys: slice


def _blocks(length: int, window: int) -> list[_Block]:
    """All blocks of a sequence."""
    size = max(LEAST_BLOCK, -(-length // MOST_BLOCKS))
    found = []
    for first in range(0, length, size):
        last = min(first + size, length)
        found.append(_Block(slice(first, last), slice(max(0, first + 1 - window) if window else 0, last)))
    return found


def _visible(segment_ids: Array, block: _Block, window: int) -> Array:
    """bool [B, 1, 1, Q, S]: whether a query of a block sees a key: of its segment, not later, within the window."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    before = places[block.queries, None] - places[None, block.keys]
    near = (before >= 0) & (before < window) if window else before >= 0
    same = segment_ids[:, block.queries, None] == segment_ids[:, None, block.keys]
    return (near[None] & same)[:, None, None]


# --- heads in front -------------------------------------------------------------------------------------------


def by_head(x: Array, groups: int) -> Array:
    """[B, S, H, K] to float32 [B, G, R, S, K]."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4).astype(jnp.float32)


def by_key_head(x: Array) -> Array:
    """[B, S, G, K] to float32 [B, G, S, K]."""
    return x.swapaxes(1, 2).astype(jnp.float32)


def as_heads(x: Array, dtype: jnp.dtype) -> Array:
    """[B, G, R, S, K] to [B, S, G R, K]."""
    batch, groups, heads, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * heads, width).astype(dtype)
