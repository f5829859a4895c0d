"""Sorting token copies by expert, and gathering rows by maps whose transposes are gathers too."""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def to_runs(rows: Array, source: Array, first: Array, longest: int) -> Array:
    """out[i] = rows[source[i]], where an index out of range is 0; the transpose of `sum_of_runs`.

    Equal sources are adjacent, a run of at most `longest`, which `take` would sum by a table of N x `longest` rows.

    Args:
        rows: [N, D].
        source: int32 [R].
        first: int32 [N], where each row's run begins; out of range if it has none.
        longest: at least 1.

    Returns:
        [R, D], in rows' dtype.
    """
    return rows.at[source].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sum_of_runs(runs: Array, source: Array, first: Array, longest: int) -> Array:
    """out[n] = the sum of runs[i] over the run in which source[i] = n, and 0 without one.

    Neighbours are added, then sums of two, of four, ..., in float32 and in an order that is always the same.

    Args:
        runs: [R, D].
        source, first, longest: as of `to_runs`.

    Returns:
        [N, D], in runs' dtype.
    """
    sums = runs.astype(jnp.float32)
    added = 1  # each row is the sum of this many from itself on, as far as its run goes
    while added < min(longest, len(source)):
        same = source == jnp.pad(source[added:], (0, added), constant_values=-1)
        sums = sums + jnp.where(same[:, None], jnp.pad(sums[added:], ((0, added), (0, 0))), 0.0)
        added *= 2
    return sums.astype(runs.dtype).at[first].get(mode="fill", fill_value=0)


to_runs.defvjp(
    lambda rows, *maps: (to_runs(rows, *maps), maps[:2]),
    lambda longest, maps, d: (sum_of_runs(d, *maps, longest), None, None),
)
sum_of_runs.defvjp(
    lambda runs, *maps: (sum_of_runs(runs, *maps), maps[:2]),
    lambda longest, maps, d: (to_runs(d, *maps, longest), None, None),
)


def sorting_of(keys: Array) -> tuple[Array, Array]:
    """The order that sorts the keys (the element at each place) and its inverse (the place of each), int32, stable."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))


def sum_before(sizes: Array) -> Array:
    """The exclusive cumulative sum along the first axis, int32."""
    return jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
