"""Attention sinks: for each head a logit in the softmax that belongs to no key, beside kernels that have none.

A softmax over scores s and a sink z gives every key exp(s) / (exp(z) + sum exp(s)): its weight without the sink, times
sum exp(s) / (exp(z) + sum exp(s)). The backward pass of flash attention reads only the result and the logarithm of the
sum, and given those of the softmax that has the sink its gradients are exact.

B batch, S sequence, H query heads, V width of values.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def beside_sinks(
    y: Float[Array, "batch seq heads value_dim"],
    logarithms: Float32[Array, "batch heads seq"],
    sinks: Float32[Array, "heads"] | None,
) -> tuple[Float[Array, "batch seq heads value_dim"], Float32[Array, "batch heads seq"]]:
    """Attention's result, and the logarithms of its softmax's sums, with the sinks in that softmax; None: unchanged.

    Args:
        y: [B, S, H, V], the result without sinks.
        logarithms: [B, H, S] of the sums without them.
        sinks: [H].
    """
    if sinks is None:
        return y, logarithms
    total = jnp.logaddexp(logarithms, sinks[None, :, None])
    share = jnp.exp(logarithms - total).swapaxes(1, 2)[..., None]
    return (y * share).astype(y.dtype), total


def gradient_of_sinks(
    sinks: Float32[Array, "heads"] | None,
    total: Float32[Array, "batch heads seq"],
    y: Float[Array, "batch seq heads value_dim"],
    dy: Float[Array, "batch seq heads value_dim"],
) -> Float32[Array, "heads"] | None:
    """What a gradient of the result [B, S, H, V] is to the sinks, given what `beside_sinks` returned; None for none."""
    if sinks is None:
        return None
    inner = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(-1).swapaxes(1, 2)  # [B, H, S]
    return -(jnp.exp(sinks[None, :, None] - total) * inner).sum((0, 2))
