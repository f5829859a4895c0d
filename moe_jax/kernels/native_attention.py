"""Attention on a CPU in C++, `cpp/attention.cc`: no score is ever in memory, and hidden blocks are skipped.

B batch, S sequence, H query heads, G heads of keys and values, K width of queries and keys, V width of values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from moe_jax.kernels import native
from moe_jax.kernels.sinks import beside_sinks, gradient_of_sinks


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_ids: Int32[Array, "batch seq"],
    scale: float,
    window: int = 0,
    sinks: Float32[Array, "heads"] | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """`kernels.attention.attend` of float32 or bfloat16 arrays on one CPU. Call it only if `native.missing()` is None.

    The backward pass recomputes the scores, and their softmax from the stored logarithm of its sum.
    Source: FlashAttention-2 (arXiv 2307.08691).
    """
    return _forward(query, key, value, segment_ids, scale, window, sinks)[0]


def _forward(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float, window: int, sinks: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    batch, length, heads, _ = query.shape
    results = [
        jax.ShapeDtypeStruct((batch, length, heads, value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    inputs = query, key.astype(query.dtype), value.astype(query.dtype), segment_ids.astype(jnp.int32)
    y, logarithms = native.call("attention", "forward", query.dtype, results, *inputs, **_attributes(scale, window))
    y, total = (checkpoint_name(a, "attention") for a in beside_sinks(y, logarithms, sinks))
    return y, ((*inputs, y, total), sinks)


def _backward(scale: float, window: int, residuals: Any, dy: Array) -> tuple[Array | None, ...]:
    arrays, sinks = residuals
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays[:3]]
    attributes = _attributes(scale, window)
    d_query, d_key, d_value = native.call("attention", "backward", arrays[0].dtype, like, *arrays, dy, **attributes)
    *_, y, total = arrays
    return d_query, d_key, d_value, None, gradient_of_sinks(sinks, total, y, dy)


def _attributes(scale: float, window: int) -> dict[str, Any]:
    return dict(scale=np.float32(scale), window=np.int64(window))


attend.defvjp(_forward, _backward)
