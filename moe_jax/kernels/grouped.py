"""One function, `grouped_matmul`: rows times the matrix of their group, with the best kernel of each platform.

M rows, E groups (experts), D in, F out. KERNELS lists the kernels of each platform.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.backend import get_default_device
from jaxtyping import Array, Float, Int32

from moe_jax.mesh import around_kernel

TILE_ROWS = 128  # rows of a tile on a CPU: enough for the speed of a large product, few compared with an expert's load
LANES = 128  # of a TPU's vectors: tiles are multiples of it
TPU_TILE_ROWS = (128, 512)  # the least and the most rows of a TPU's tile
TPU_TILE_BYTES = 2048  # of one row of a TPU's tile, so that tiles fit into its vector memory
TILES_A_GROUP = 4  # at least, in the mean group, because a group multiplies whole tiles


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "rows in_dim"],
    w: Float[Array, "experts in_dim out_dim"],
    group_sizes: Int32[Array, "experts"],
) -> Float[Array, "rows out_dim"]:
    """`x[i] @ w[e]` for every row i of group e, where groups are consecutive runs of rows.

    The cost is proportional to the rows, not to the number of groups. The platform is that of the devices compiled for.

    Args:
        x: [M, D], rows sorted by group.
        w: [E, D, F].
        group_sizes: int32 [E], rows in each group; their sum may be below M, and the result of the rows after it is 0.

    Returns:
        [M, F] in x's dtype, accumulated in float32. A group of zero rows has a gradient of exactly 0.
    """
    return _for_platform("product", x, w, group_sizes)


def _vjp_forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _for_platform("product", x, w, group_sizes), (x, w, group_sizes)


def _vjp_backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = _for_platform("transposed", dy, w, group_sizes)
    return dx, _for_platform("outer", x, dy, group_sizes, dtype=w.dtype), None


grouped_matmul.defvjp(_vjp_forward, _vjp_backward)


def rows_multiplied(group_sizes: Int32[Array, "experts"], tile: int = TILE_ROWS) -> Int32[Array, ""]:
    """The number of rows that are multiplied, with each group padded to whole tiles."""
    return ((group_sizes + tile - 1) // tile * tile).sum(dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bias_of_rows(
    bias: Float[Array, "experts out_dim"], group_sizes: Int32[Array, "experts"], num_rows: int
) -> Float[Array, "rows out_dim"]:
    """The bias of each row's group, `num_rows` of them, and 0 for the rows after the last group.

    Its gradient is a product with rows of zeros and a one, at E / D of the cost of the product that the bias is added
    to: a scatter, the gather's own transpose, is slow on TPUs and on GPUs adds in another order each time.
    """
    return bias.at[_group_of_rows(group_sizes, num_rows)].get(mode="fill", fill_value=0)


def _bias_forward(bias: Array, group_sizes: Array, num_rows: int) -> tuple[Array, Array]:
    return bias_of_rows(bias, group_sizes, num_rows), group_sizes


def _bias_backward(num_rows: int, group_sizes: Array, dy: Array) -> tuple[Array, None]:
    own = jax.nn.one_hot(_group_of_rows(group_sizes, num_rows), group_sizes.shape[0], dtype=dy.dtype)
    return lax.dot(own.T, dy, precision=lax.Precision.HIGHEST), None


bias_of_rows.defvjp(_bias_forward, _bias_backward)


def _group_of_rows(group_sizes: Array, num_rows: int) -> Int32[Array, "rows"]:
    """The group of each row; their number for the rows after the last group."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return (jnp.arange(num_rows, dtype=jnp.int32)[:, None] >= ends[None]).sum(1, dtype=jnp.int32)


# --- ragged products of XLA or tokamax -------------------------------------------------------------------------

# the dimensions to sum over, the ragged dimension of the left operand, the group dimension of the right one
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
    """Whether to multiply with tokamax: on GPUs, where XLA by default multiplies every row with every group.

    tokamax reads the platform from the default device, so it can be used only if that is a GPU; who compiles for one
    that is not present sets it.
    """
    return importlib.util.find_spec("tokamax") is not None and get_default_device().platform == "gpu"


def zero_tail(y: Array, group_sizes: Array) -> Array:
    """Set the rows after the last group to 0."""
    row = jnp.arange(y.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row < group_sizes.sum(dtype=jnp.int32), y, 0)


# --- TPU: megablox ---------------------------------------------------------------------------------------------


def _tpu_matmul(x: Array, w: Array, group_sizes: Array, *, transposed: bool = False, interpret: Any = False) -> Array:
    """By megablox, because XLA's `ragged_dot` reads the rows again for every 128 columns."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows = x.shape[0]
    out_dim = w.shape[1 if transposed else 2]
    dtype = x.dtype
    x, w = (a.astype(jnp.promote_types(a.dtype, jnp.bfloat16)) for a in (x, w))
    tile = tpu_tile(rows, x.shape[1], out_dim, w.shape[0], max(x.itemsize, w.itemsize))

    def kernel(x: Array, w: Array, group_sizes: Array) -> Array:
        return gmm(x, w, group_sizes, dtype, tile, transpose_rhs=transposed, interpret=interpret)

    if rows == 0:
        return jnp.zeros_like(x, dtype, shape=(0, out_dim))
    return zero_tail(around_kernel(kernel, _whole_tiles(x, tile[0]), w, group_sizes)[:rows], group_sizes)


def tpu_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype, *, interpret: Any = False) -> Array:
    """The groups' x^T dy [E, D, F] by megablox: `Kernels.outer`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows = x.shape[0]
    groups = group_sizes.shape[0]
    x, dy = (a.astype(jnp.promote_types(a.dtype, jnp.bfloat16)) for a in (x, dy))
    tile = tpu_tile(rows, x.shape[1], dy.shape[1], groups, max(x.itemsize, jnp.dtype(dtype).itemsize))

    def kernel(x: Array, dy: Array, group_sizes: Array) -> Array:
        return tgmm(x.T, dy, group_sizes, dtype, tile, interpret=interpret)

    if rows == 0:
        return jnp.zeros_like(x, dtype, shape=(groups, x.shape[1], dy.shape[1]))
    return around_kernel(kernel, _whole_tiles(x, tile[0]), _whole_tiles(dy, tile[0]), group_sizes)


def tpu_tile(rows: int, in_dim: int, out_dim: int, groups: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, in and out dimensions of a TPU's tile: as many as its vector memory holds.

    A group multiplies whole tiles of rows, so a tile has at most a quarter of the mean group's rows, if that is not
    less than the smallest tile.
    """
    row_tile, most_rows = TPU_TILE_ROWS
    while row_tile < most_rows and TILES_A_GROUP * 2 * row_tile * groups <= rows:
        row_tile *= 2
    most = TPU_TILE_BYTES // itemsize
    return row_tile, _even_part(in_dim, most), _even_part(out_dim, most)


def _even_part(size: int, most: int) -> int:
    """`size` if it is at most `most`, else a multiple of LANES that covers it in as few and even parts as possible."""
    parts = -(-size // most)
    return size if parts == 1 else -(-size // (parts * LANES)) * LANES


def _whole_tiles(rows: Array, tile: int) -> Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))


# --- CPU: a loop over tiles of rows ----------------------------------------------------------------------------


def _tiles(group_sizes: Array, num_rows: int, tile: int) -> tuple[Array, Array, Array, Array]:
    """For each tile its group, its first row and the end of its group's rows; then the number of tiles.

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
    """The start of a tile's slice (moved back at the end of the array), and which of its rows belong to the tile."""
    start = jnp.clip(first, 0, num_rows - tile)
    row = start + jnp.arange(tile, dtype=jnp.int32)
    return start, ((row >= first) & (row < end))[:, None]


def tiled_matmul(x: Array, w: Array, group_sizes: Array, dtype: jnp.dtype | None = None) -> Array:
    """x w of every row, tile after tile: `Kernels.product`, in x's dtype if no other is given."""
    num_rows = x.shape[0]
    tile = min(TILE_ROWS, num_rows)
    if num_rows == 0:
        return jnp.zeros_like(x, dtype, shape=(0, w.shape[2]))
    group, first, end, num_tiles = _tiles(group_sizes, num_rows, tile)

    def body(i: Array, y: Array) -> Array:
        start, in_tile = _tile_mask(first[i], end[i], num_rows, tile)
        rows = _operand(lax.dynamic_slice_in_dim(x, start, tile))
        product = _dot(rows, _operand(lax.dynamic_index_in_dim(w, group[i], keepdims=False)))
        updated = jnp.where(in_tile, product.astype(y.dtype), lax.dynamic_slice_in_dim(y, start, tile))
        return lax.dynamic_update_slice_in_dim(y, updated, start, 0)

    return lax.fori_loop(0, num_tiles, body, jnp.zeros_like(x, dtype, shape=(num_rows, w.shape[2])))


def tiled_outer(x: Array, dy: Array, group_sizes: Array, dtype: jnp.dtype) -> Array:
    """The groups' x^T dy [E, D, F], tile after tile: `Kernels.outer`."""
    num_rows = x.shape[0]
    tile = min(TILE_ROWS, num_rows)
    dw = jnp.zeros_like(x, jnp.float32, shape=(group_sizes.shape[0], x.shape[1], dy.shape[1]))
    if num_rows == 0:
        return dw.astype(dtype)
    group, first, end, num_tiles = _tiles(group_sizes, num_rows, tile)

    def body(i: Array, dw: Array) -> Array:
        start, in_tile = _tile_mask(first[i], end[i], num_rows, tile)
        rows = _operand(jnp.where(in_tile, lax.dynamic_slice_in_dim(x, start, tile), 0))
        grads = _operand(lax.dynamic_slice_in_dim(dy, start, tile))
        sum_so_far = lax.dynamic_index_in_dim(dw, group[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(dw, sum_so_far + _dot(rows.T, grads), group[i], 0)

    return lax.fori_loop(0, num_tiles, body, dw).astype(dtype)


def _operand(a: Array) -> Array:
    """In float32, unless elements have one byte."""
    return a if a.itemsize == 1 else a.astype(jnp.float32)


def _dot(a: Array, b: Array) -> Array:
    """The product in float32; integers are summed as integers."""
    if a.itemsize > 1:
        return a @ b
    total = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else jnp.float32
    return lax.dot(a, b, preferred_element_type=total).astype(jnp.float32)


def _tiled_transposed(dy: Array, w: Array, group_sizes: Array) -> Array:
    return tiled_matmul(dy, w.swapaxes(1, 2), group_sizes)


# --- the choice by platform ------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """x w, dy w^T and the groups' x^T dy."""

    product: Callable[..., Array]
    transposed: Callable[..., Array]
    outer: Callable[..., Array]


# keys are those of `lax.platform_dependent`
KERNELS = {
    "cpu": Kernels(tiled_matmul, _tiled_transposed, tiled_outer),
    "tpu": Kernels(_tpu_matmul, functools.partial(_tpu_matmul, transposed=True), tpu_outer),
    "default": Kernels(_ragged_matmul, _ragged_transposed, _ragged_outer),
}


def _for_platform(which: str, *arrays: Array, **options: jnp.dtype) -> Array:
    """One of `Kernels`, for the devices compiled for. All are traced, TPU's only if its compiler is installed."""
    names = [name for name in KERNELS if name != "tpu" or has_tpu_compiler()]
    branches = {name: functools.partial(getattr(KERNELS[name], which), **options) for name in names}
    return lax.platform_dependent(*arrays, **branches)


def has_tpu_compiler() -> bool:
    """Whether this process may compile for a TPU, present or not."""
    return importlib.util.find_spec("libtpu") is not None or jax.default_backend() == "tpu"
