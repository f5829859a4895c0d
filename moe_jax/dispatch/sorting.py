"""Sorting token copies by expert, and gathering rows by a map whose transpose is a gather too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.custom_vjp
def take(rows: Array, index: Array, back: Array) -> Array:
    """out[i] = sum_k rows[index[i, k]], where an index out of range adds 0.

    `back` is the inverse map: i occurs in back[j] exactly as often as j occurs in index[i]. The transpose is therefore
    a gather by `back`, never a scatter.

    Args:
        rows: [N, D].
        index: int32 [M, K].
        back: int32 [N, J].

    Returns:
        [M, D], in rows' dtype; for K > 1 summed in float32.
    """
    taken = rows.at[index].get(mode="fill", fill_value=0)
    if index.shape[1] == 1:
        return taken[:, 0]
    return taken.astype(jnp.float32).sum(1).astype(rows.dtype)


take.defvjp(
    lambda rows, index, back: (take(rows, index, back), (index, back)),
    lambda maps, d: (take(d, maps[1], maps[0]), None, None),
)


def sorting_of(keys: Array) -> tuple[Array, Array]:
    """The order that sorts the keys (the element at each place) and its inverse (the place of each), int32, stable."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))


def sum_before(sizes: Array) -> Array:
    """The exclusive cumulative sum along the first axis, int32."""
    return jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
