"""The largest logit of attention, by head, which no kernel of attention reports.

B batch, S sequence, H query heads, G heads of keys, R query heads for each, K width of a head, Q tokens of a block.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

BLOCK = 512  # queries, and keys, whose logits are in memory at once, at most


def largest_logits(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    segment_ids: Int32[Array, "batch seq"],
    scale: float,
    window: int = 0,
) -> Float32[Array, "heads"]:
    """The largest `scale query . key` of every head, over the keys that a query sees; of padding none counts.

    Block by block of queries and keys, [B, H, Q, Q] logits at a time, of which those that no query sees are left out.
    It costs the product of queries and keys once more, and nothing is differentiated.

    Args:
        query, key, segment_ids, scale, window: as `kernels.attention.attend` has them.

    Returns:
        float32 [H]; -inf for a batch of padding.
    """
    query, key = jax.lax.stop_gradient((query, key))
    batch, length, heads, _ = query.shape
    groups = key.shape[2]
    count = -(-length // BLOCK)
    size = -(-length // count)
    rest = count * size - length  # filled with padding
    query, key = (jnp.pad(a, ((0, 0), (0, rest), (0, 0), (0, 0))) for a in (query, key))
    query = query.reshape(batch, count * size, groups, heads // groups, -1)
    segments = jnp.pad(segment_ids, ((0, 0), (0, rest)))
    places = jnp.arange(size, dtype=jnp.int32)

    def block(a: Array, number: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, number * size, size, 1)

    def one(top: Array, pair: Array) -> tuple[Array, None]:
        rows, columns = pair
        logits = jnp.einsum(
            "bqgrk,bsgk->bgrqs", block(query, rows), block(key, columns), preferred_element_type=jnp.float32
        )
        before = (rows - columns) * size + places[:, None] - places[None]
        near = (before >= 0) & (before < window) if window else before >= 0
        of_rows, of_columns = block(segments, rows)[:, :, None], block(segments, columns)[:, None]
        visible = near & (of_rows == of_columns) & (of_rows > 0)
        return jnp.maximum(top, jnp.where(visible[:, None, None], scale * logits, -jnp.inf).max((-2, -1))), None

    lowest = jnp.full((batch, groups, heads // groups), -jnp.inf, jnp.float32)
    with jax.named_scope("max_logits"):
        top, _ = jax.lax.scan(one, lowest, jnp.asarray(_visible_blocks(count, size, window)))
        return top.max(0).reshape(heads)


def _visible_blocks(count: int, size: int, window: int) -> np.ndarray:
    """int32 [pairs, 2]: the numbers of a block of queries and of a block of keys of which one of them may see one."""
    pairs = []
    for rows in range(count):
        first = max(0, rows * size + 1 - window) // size if window else 0
        pairs += [(rows, columns) for columns in range(first, rows + 1)]
    return np.array(pairs, np.int32)
