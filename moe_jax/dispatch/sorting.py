"""Token copies sorted by expert: where each stands, and the linear map that takes rows there and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.custom_vjp
def take(rows: Array, index: Array, back: Array) -> Array:
    """out[i] = sum_k rows[index[i, k]], 0 out of range. `back` says the same from the other side:

    j in index[i] exactly as often as i in back[j], so the transpose is a gather too, never a scatter.
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
    """(which element comes i-th, at which place element j comes), int32, stable."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))


def sum_before(sizes: Array) -> Array:
    """The sum of all earlier entries, along the first axis."""
    return jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
