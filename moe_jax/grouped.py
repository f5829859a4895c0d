"""One function: rows times the matrix of their group, with the best kernel of each platform.

M rows, E groups (experts), D in, F out.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

TILE_ROWS = 128  # rows a CPU tile multiplies at once: large enough for GEMM speed, small against an expert's load


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "rows in_dim"],
    w: Float[Array, "experts in_dim out_dim"],
    group_sizes: Int32[Array, "experts"],
) -> Float[Array, "rows out_dim"]:
    """`x[i] @ w[e]` for every row i of group e, where groups are consecutive runs of rows.

    Cost follows the rows, not the number of groups: on CPU a loop over row tiles (XLA lowers `ragged_dot`
    densely there), elsewhere `lax.ragged_dot`. The platform is that of the devices compiled for.

    Args:
        x: [M, D], rows sorted by group.
        w: [E, D, F].
        group_sizes: int32 [E], rows in each group; their sum may be below M, and the rows after it give 0.

    Returns:
        [M, F] in x's dtype, accumulated in float32. A group of zero rows has a gradient of exactly 0.
    """
    return _forward(x, w, group_sizes)


def _forward(x: Array, w: Array, group_sizes: Array) -> Array:
    return lax.platform_dependent(x, w, group_sizes, cpu=_tiled_matmul, default=_ragged_matmul)


def _vjp_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _forward(x, w, group_sizes), (x, w, group_sizes)


def _vjp_backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = _forward(dy, w.swapaxes(1, 2), group_sizes)
    dw = lax.platform_dependent(
        x,
        dy,
        group_sizes,
        cpu=functools.partial(_tiled_outer, dtype=w.dtype),
        default=functools.partial(_ragged_outer, dtype=w.dtype),
    )
    return dx, dw, None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)


def rows_multiplied(group_sizes: Int32[Array, "experts"], tile: int = TILE_ROWS) -> Int32[Array, ""]:
    """How many rows pass through the matrix units, each group padded to whole tiles: what empty rows cost."""
    return ((group_sizes + tile - 1) // tile * tile).sum(dtype=jnp.int32)


def _ragged_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    y = lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
    return _zero_tail(y, group_sizes).astype(x.dtype)


def _ragged_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """sum over the rows of each group of x^T dy: the transpose of `ragged_dot` in its weights."""
    w = jnp.zeros_like(x, jnp.float32, shape=(group_sizes.shape[0], x.shape[1], dy.shape[1]))
    _, transpose = jax.vjp(lambda w: lax.ragged_dot(x.astype(jnp.float32), w, group_sizes), w)  # the product is unused
    return transpose(_zero_tail(dy, group_sizes).astype(jnp.float32))[0].astype(dtype)


def _zero_tail(y: Array, group_sizes: Array) -> Array:
    return jnp.where(jnp.arange(y.shape[0])[:, None] < group_sizes.sum(), y, 0)


def _tiles(group_sizes: Array, num_rows: int, tile: int) -> tuple[Array, Array, Array, Array]:
    """For each tile its group, first row and one past its last row; and how many tiles there are.

    Every group has ceil(size / tile) tiles, so at most num_rows / tile + E in all.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    tiles_of = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles_of)
    index = jnp.arange(num_rows // tile + num_groups, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, index, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    within = index - (tile_ends - tiles_of)[group]
    first = (ends - group_sizes)[group] + within * tile
    return group, first, ends[group], tile_ends[-1]


def _tile_mask(first: Array, end: Array, num_rows: int, tile: int) -> tuple[Array, Array]:
    """Where a tile's slice starts (moved back at the end of the array) and which of its rows are the tile's."""
    start = jnp.clip(first, 0, num_rows - tile)
    row = start + jnp.arange(tile)
    return start, ((row >= first) & (row < end))[:, None]


def _tiled_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    num_rows, tile = x.shape[0], min(TILE_ROWS, x.shape[0])
    if num_rows == 0:
        return jnp.zeros_like(x, shape=(0, w.shape[2]))
    group, first, end, num_tiles = _tiles(group_sizes, num_rows, tile)

    def body(i: Array, y: Array) -> Array:
        start, mine = _tile_mask(first[i], end[i], num_rows, tile)
        rows = lax.dynamic_slice_in_dim(x, start, tile).astype(jnp.float32)
        product = rows @ lax.dynamic_index_in_dim(w, group[i], keepdims=False).astype(jnp.float32)
        kept = jnp.where(mine, product.astype(y.dtype), lax.dynamic_slice_in_dim(y, start, tile))
        return lax.dynamic_update_slice_in_dim(y, kept, start, 0)

    return lax.fori_loop(0, num_tiles, body, jnp.zeros_like(x, shape=(num_rows, w.shape[2])))


def _tiled_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    num_rows, tile = x.shape[0], min(TILE_ROWS, x.shape[0])
    dw = jnp.zeros_like(x, jnp.float32, shape=(group_sizes.shape[0], x.shape[1], dy.shape[1]))
    if num_rows == 0:
        return dw.astype(dtype)
    group, first, end, num_tiles = _tiles(group_sizes, num_rows, tile)

    def body(i: Array, dw: Array) -> Array:
        start, mine = _tile_mask(first[i], end[i], num_rows, tile)
        rows = jnp.where(mine, lax.dynamic_slice_in_dim(x, start, tile), 0).astype(jnp.float32)
        grads = lax.dynamic_slice_in_dim(dy, start, tile).astype(jnp.float32)
        sofar = lax.dynamic_index_in_dim(dw, group[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, sofar + rows.T @ grads, group[i], 0)

    return lax.fori_loop(0, num_tiles, body, dw).astype(dtype)
