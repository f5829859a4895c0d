"""Queries and keys of a head shrunk, so that its logits are a share of what they were; no other head's change.

H heads, G heads of keys, K width of a head.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from moe_jax.model.attention import Attention, LatentAttention

Share = Float32[Array, "*layers heads"]  # with the axis of stacked layers if the weights have it


def shrink_logits(attention: Attention | LatentAttention, share: Share) -> None:
    """Make the logits of every head `share` times what they are, in place.

    What belongs to the head alone shares the factor evenly between query and key. Where heads share a key, the query
    takes all of it: with fewer heads of keys than of queries, and in the part of latent attention that has RoPE.
    """
    root = jnp.sqrt(share)
    if isinstance(attention, LatentAttention):
        c = attention.config
        query = attention.query if attention.query_up is None else attention.query_up
        assert query is not None
        has_rope = jnp.arange(c.qk_nope_head_dim + c.qk_rope_head_dim) >= c.qk_nope_head_dim
        _scale(query, jnp.where(has_rope, share[..., None], root[..., None]))
        _scale(attention.key_up, root[..., None])
        return
    own_key = attention.config.num_heads == attention.config.num_kv_heads
    _scale(attention.query, (root if own_key else share)[..., None], attention.query_bias)
    if own_key:
        _scale(attention.key, root[..., None], attention.key_bias)


def _scale(weight: nnx.Param, factor: Float32[Array, "*layers heads _"], bias: nnx.Param | None = None) -> None:
    """Scale the heads of a weight [..., H, K], and of the bias [H K] of all of them, in place and in their dtypes."""
    weight[...] = _times(weight[...], factor[..., None, :, :])
    if bias is not None:
        value = bias[...]
        bias[...] = _times(value.reshape(*factor.shape[:-1], -1), factor).reshape(value.shape)


def _times(x: Float[Array, "..."], factor: Float32[Array, "..."]) -> Float[Array, "..."]:
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
