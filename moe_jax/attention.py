"""One function: what every token takes from the tokens it may see, with the best kernel of each platform.

B batch, S sequence, H query heads, G heads of keys and values, K width of queries and keys, V width of values.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    value: Float[Array, "batch seq kv_heads value_dim"],
    segment_ids: Int32[Array, "batch seq"],
    *,
    scale: float | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """The mean of the values of earlier tokens of the same segment, weighed by softmax(scale query . key).

    Args:
        query: [B, S, H, K].
        key: [B, S, G, K]; H is a multiple of G, and consecutive H / G query heads share one of them.
        value: [B, S, G, V]; V may differ from K.
        segment_ids: int32 [B, S], the document of each token; 0 is padding, which sees padding only.
        scale: 1 / sqrt(K) if None.
        mesh: where the arrays lie, rows over the batch axes and heads over `tensor`; None for one device.

    Returns:
        [B, S, H, V] in the query's dtype, softmax in float32.
    """
    del mesh  # until there are kernels
    return _xla(query, key, value, segment_ids, scale)


def visibility(segment_ids: Int32[Array, "batch seq"]) -> Bool[Array, "batch 1 seq seq"]:
    """Who may attend to whom: earlier or same position, same segment. Padding (0) sees padding only."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones(2 * segment_ids.shape[1:], bool))
    return (same & causal)[:, None]


def _xla(query: Array, key: Array, value: Array, segment_ids: Array, scale: float | None) -> Array:
    return jax.nn.dot_product_attention(query, key, value, mask=visibility(segment_ids), scale=scale)
