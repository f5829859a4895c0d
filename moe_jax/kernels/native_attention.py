"""Attention on a CPU in C++, `cpp/attention.cc`: no score is ever in memory, and hidden blocks are skipped.

B batch, S sequence, H query heads, G heads of keys and values, K width of queries and keys, V width of values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from moe_jax.kernels import native


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_ids: Int32[Array, "batch seq"],
    scale: float,
) -> Float[Array, "batch seq heads value_dim"]:
    """`kernels.attention.attend` of float32 or bfloat16 arrays on one CPU. Call it only if `native.missing()` is None.

    The backward pass recomputes the scores, and their softmax from the stored logarithm of its sum.
    Source: FlashAttention-2 (arXiv 2307.08691).
    """
    return _forward(query, key, value, segment_ids, scale)[0]


def _forward(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float
) -> tuple[Array, tuple[Array, ...]]:
    batch, length, heads, _ = query.shape
    results = [
        jax.ShapeDtypeStruct((batch, length, heads, value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    inputs = query, key.astype(query.dtype), value.astype(query.dtype), segment_ids.astype(jnp.int32)
    found = native.call("attention", "forward", query.dtype, results, *inputs, scale=np.float32(scale))
    y, logarithms = (checkpoint_name(a, "attention") for a in found)
    return y, (*inputs, y, logarithms)


def _backward(scale: float, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in residuals[:3]]
    dtype = residuals[0].dtype
    d_query, d_key, d_value = native.call("attention", "backward", dtype, like, *residuals, dy, scale=np.float32(scale))
    return d_query, d_key, d_value, None


attend.defvjp(_forward, _backward)
