"""One function: rows times the matrix of their group, with the best kernel of each platform.

M rows, E groups (experts), D in, F out. KERNELS is the one place where a platform's kernels are picked.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.mesh import around_kernel

TILE_ROWS = 128  # rows a CPU tile multiplies at once: large enough for GEMM speed, small against an expert's load


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "rows in_dim"],
    w: Float[Array, "experts in_dim out_dim"],
    group_sizes: Int32[Array, "experts"],
) -> Float[Array, "rows out_dim"]:
    """`x[i] @ w[e]` for every row i of group e, where groups are consecutive runs of rows.

    Cost follows the rows, not the number of groups. The platform is that of the devices compiled for.

    Args:
        x: [M, D], rows sorted by group.
        w: [E, D, F].
        group_sizes: int32 [E], rows in each group; their sum may be below M, and the rows after it give 0.

    Returns:
        [M, F] in x's dtype, accumulated in float32. A group of zero rows has a gradient of exactly 0.
    """
    return _best("product", x, w, group_sizes)


def _vjp_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _best("product", x, w, group_sizes), (x, w, group_sizes)


def _vjp_backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = _best("transposed", dy, w, group_sizes)
    return dx, _best("outer", x, dy, group_sizes, dtype=w.dtype), None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)


def rows_multiplied(group_sizes: Int32[Array, "experts"], tile: int = TILE_ROWS) -> Int32[Array, ""]:
    """How many rows pass through the matrix units, each group padded to whole tiles: what empty rows cost."""
    return ((group_sizes + tile - 1) // tile * tile).sum(dtype=jnp.int32)


# --- ragged products, as XLA or tokamax has them ---------------------------------------------------------------

# which dimensions are summed over, which of the left operand is ragged, which of the right is the groups'
PRODUCT = lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])


TRANSPOSED = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])


OUTER = lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


def _ragged_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    return zero_tail(_ragged(x, w, group_sizes, PRODUCT, x.dtype), group_sizes)


def _ragged_transposed(dy: Array, w: Array, group_sizes: Array) -> Array:
    return zero_tail(_ragged(dy, w, group_sizes, TRANSPOSED, dy.dtype), group_sizes)


def _ragged_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    return _ragged(zero_tail(x, group_sizes), zero_tail(dy, group_sizes), group_sizes, OUTER, dtype)


def _ragged(a: Array, b: Array, group_sizes: Array, which: lax.RaggedDotDimensionNumbers, dtype: jnp.dtype) -> Array:
    if not has_tokamax():
        return lax.ragged_dot_general(a, b, group_sizes, which, preferred_element_type=jnp.float32).astype(dtype)
    import tokamax

    def kernel(a: Array, b: Array, group_sizes: Array) -> Array:
        return tokamax.ragged_dot_general(a, b, group_sizes, which, preferred_element_type=dtype)

    return around_kernel(kernel, a, b, group_sizes)


def has_tokamax() -> bool:
    """Whether GPUs multiply with tokamax: XLA multiplies every row with every group there, or so by default.

    It asks the default device for the platform, so it serves where that is a GPU and nowhere else.
    """
    return importlib.util.find_spec("tokamax") is not None and jax.default_backend() == "gpu"


def zero_tail(y: Array, group_sizes: Array) -> Array:
    """Rows after the last group become 0, whatever they held."""
    row = jnp.arange(y.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row < group_sizes.sum(dtype=jnp.int32), y, 0)


# --- TPU: megablox ---------------------------------------------------------------------------------------------


def _tpu_matmul(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False, interpret: Any = False) -> Array:
    """megablox rather than `ragged_dot`, which is grouped too, but reads its rows once for every 128 columns."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, out_dim, narrow = x.shape[0], w.shape[1 if transposed else 2], x.dtype
    x, w = (a.astype(jnp.promote_types(a.dtype, jnp.bfloat16)) for a in (x, w))
    tile = tpu_tile(rows, x.shape[1], out_dim, w.shape[0], max(x.itemsize, w.itemsize))

    def kernel(x: Array, w: Array, group_sizes: Array) -> Array:
        return gmm(x, w, group_sizes, narrow, tile, transpose_rhs=transposed, interpret=interpret)

    if rows == 0:
        return jnp.zeros_like(x, narrow, shape=(0, out_dim))
    return zero_tail(around_kernel(kernel, _whole_tiles(x, tile[0]), w, group_sizes)[:rows], group_sizes)


def tpu_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype, *, interpret: Any = False) -> Array:
    """The groups' x^T dy [E, D, F] by megablox: `Kernels.outer`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows, groups = x.shape[0], group_sizes.shape[0]
    x, dy = (a.astype(jnp.promote_types(a.dtype, jnp.bfloat16)) for a in (x, dy))
    tile = tpu_tile(rows, x.shape[1], dy.shape[1], groups, max(x.itemsize, jnp.dtype(dtype).itemsize))

    def kernel(x: Array, dy: Array, group_sizes: Array) -> Array:
        return tgmm(x.T, dy, group_sizes, dtype, tile, interpret=interpret)

    if rows == 0:
        return jnp.zeros_like(x, dtype, shape=(groups, x.shape[1], dy.shape[1]))
    return around_kernel(kernel, _whole_tiles(x, tile[0]), _whole_tiles(dy, tile[0]), group_sizes)


def tpu_tile(rows: int, in_dim: int, out_dim: int, groups: int, itemsize: int) -> tuple[int, int, int]:
    """How many rows, in and out dimensions the TPU multiplies at once: as many as its vector memory holds.

    A group multiplies whole tiles of rows, so a tile is at most a quarter of the mean group, but for the least.
    """
    row_tile = 128
    while row_tile < 512 and 8 * row_tile * groups <= rows:
        row_tile *= 2
    most = 2048 // itemsize
    return row_tile, _even_part(in_dim, most), _even_part(out_dim, most)


def _even_part(size: int, most: int) -> int:
    """`size` if it is at most `most`, else a multiple of 128 that covers it in as few and even parts as possible."""
    parts = -(-size // most)
    return size if parts == 1 else -(-size // (parts * 128)) * 128


def _whole_tiles(rows: Array, tile: int) -> Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))


# --- CPU: a loop over tiles of rows ----------------------------------------------------------------------------


def _tiles(group_sizes: Array, num_rows: int, tile: int) -> tuple[Array, Array, Array, Array]:
    """For each tile its group, first row and one past its last row; and how many tiles there are.

    Every group has ceil(size / tile) tiles, so at most num_rows / tile + E in all.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tiles_of = (group_sizes + tile - 1) // tile
    tile_ends = jnp.cumsum(tiles_of, dtype=jnp.int32)
    index = jnp.arange(num_rows // tile + num_groups, dtype=jnp.int32)
    group = jnp.searchsorted(tile_ends, index, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    within = index - (tile_ends - tiles_of)[group]
    first = (ends - group_sizes)[group] + within * tile
    return group, first, ends[group], tile_ends[-1]


def _tile_mask(first: Array, end: Array, num_rows: int, tile: int) -> tuple[Array, Array]:
    """Where a tile's slice starts (moved back at the end of the array) and which of its rows are the tile's."""
    start = jnp.clip(first, 0, num_rows - tile)
    row = start + jnp.arange(tile, dtype=jnp.int32)
    return start, ((row >= first) & (row < end))[:, None]


def tiled_matmul(x: Array, w: Array, group_sizes: Array, dtype: jnp.dtype | None = None) -> Array:
    """x w of every row, tile after tile: `Kernels.product`, in x's dtype if no other is given."""
    num_rows, tile = x.shape[0], min(TILE_ROWS, x.shape[0])
    if num_rows == 0:
        return jnp.zeros_like(x, dtype, shape=(0, w.shape[2]))
    group, first, end, num_tiles = _tiles(group_sizes, num_rows, tile)

    def body(i: Array, y: Array) -> Array:
        start, mine = _tile_mask(first[i], end[i], num_rows, tile)
        rows = _operand(lax.dynamic_slice_in_dim(x, start, tile))
        product = _dot(rows, _operand(lax.dynamic_index_in_dim(w, group[i], keepdims=False)))
        kept = jnp.where(mine, product.astype(y.dtype), lax.dynamic_slice_in_dim(y, start, tile))
        return lax.dynamic_update_slice_in_dim(y, kept, start, 0)

    return lax.fori_loop(0, num_tiles, body, jnp.zeros_like(x, dtype, shape=(num_rows, w.shape[2])))


def tiled_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """The groups' x^T dy [E, D, F], tile after tile: `Kernels.outer`."""
    num_rows, tile = x.shape[0], min(TILE_ROWS, x.shape[0])
    dw = jnp.zeros_like(x, jnp.float32, shape=(group_sizes.shape[0], x.shape[1], dy.shape[1]))
    if num_rows == 0:
        return dw.astype(dtype)
    group, first, end, num_tiles = _tiles(group_sizes, num_rows, tile)

    def body(i: Array, dw: Array) -> Array:
        start, mine = _tile_mask(first[i], end[i], num_rows, tile)
        rows = _operand(jnp.where(mine, lax.dynamic_slice_in_dim(x, start, tile), 0))
        grads = _operand(lax.dynamic_slice_in_dim(dy, start, tile))
        sofar = lax.dynamic_index_in_dim(dw, group[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, sofar + _dot(rows.T, grads), group[i], 0)

    return lax.fori_loop(0, num_tiles, body, dw).astype(dtype)


def _operand(a: Array) -> Array:
    """In float32, unless of one byte."""
    return a if a.itemsize == 1 else a.astype(jnp.float32)


def _dot(a: Array, b: Array) -> Array:
    """The product in float32; that of integers is summed in integers."""
    if a.itemsize > 1:
        return a @ b
    total = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else jnp.float32
    return lax.dot(a, b, preferred_element_type=total).astype(jnp.float32)


def _tiled_transposed(dy: Array, w: Array, group_sizes: Array) -> Array:
    return tiled_matmul(dy, w.swapaxes(1, 2), group_sizes)


# --- which is best where ---------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """x w, dy w^T and the groups' x^T dy."""

    product: Callable[..., Array]
    transposed: Callable[..., Array]
    outer: Callable[..., Array]


# by the names of `lax.platform_dependent`
KERNELS = {
    "cpu": Kernels(tiled_matmul, _tiled_transposed, tiled_outer),
    "tpu": Kernels(_tpu_matmul, functools.partial(_tpu_matmul, transposed=True), tpu_outer),
    "default": Kernels(_ragged_matmul, _ragged_transposed, _ragged_outer),
}


def _best(which: str, *arrays: Array, **options: jnp.dtype) -> Array:
    """One of `Kernels` on the devices compiled for. All are traced, TPU's only where its compiler is."""
    names = [name for name in KERNELS if name != "tpu" or has_tpu_compiler()]
    branches = {name: functools.partial(getattr(KERNELS[name], which), **options) for name in names}
    return lax.platform_dependent(*arrays, **branches)


def has_tpu_compiler() -> bool:
    """Whether this process may compile for a TPU, here or somewhere else."""
    return importlib.util.find_spec("libtpu") is not None or jax.default_backend() == "tpu"
