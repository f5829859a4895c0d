"""Expert products in eight bits, forward and backward, with the values and scales of qwix's quantised training.

For y = x w with x [M, D] and w [E, D, F], these are quantised, always from values in the compute dtype:
- y = x w: x by row, w by expert and column;
- dx = dy w^T: dy by row, w by expert and row;
- dw[e] = x^T dy over the rows of e: x and dy by column, one scale for all rows, because the sum is over rows.
A scale is the largest magnitude of its values, divided by the format's: 127 (int8) or 448 (float8_e4m3fn, DeepSeek-V3's
choice for all three products). Sums are exact integers (int8) or float32. DeepSeek-V3's tiles of 128 would need a
separate sum for every 128 products: qwix can do that, but no matrix unit is faster for it, so scales span a whole row.

On TPUs dw is multiplied in bfloat16, which holds every value of both formats: XLA's ragged product would multiply every
row with every group. On GPUs it does so in all three products.
"""

import functools
import importlib.util
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.kernels import grouped
from moe_jax.runtime.defaults import jax_defaults

if TYPE_CHECKING:
    from qwix import QArray


FORMATS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
# qwix maps the largest magnitude to 127.5, so every row's largest value would be rounded up or down by chance
CALIBRATION = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_matmul(
    x: Float[Array, "rows in_dim"],
    w: Float[Array, "experts in_dim out_dim"],
    group_sizes: Int32[Array, "experts"],
    quantization: str,
) -> Float[Array, "rows out_dim"]:
    """`grouped_matmul` of quantised operands; so are both products of its gradient (straight-through).

    Args:
        x: [M, D], rows sorted by group; the result of a row of zeros is 0.
        w: [E, D, F].
        group_sizes: int32 [E], rows in each group; the result of the rows after their sum is 0.
        quantization: "int8" or "fp8".

    Returns:
        [M, F] in x's dtype. A group of zero rows has a gradient of exactly 0.

    Source: qwix's `ragged_dot_qt`, whose weights have one scale for all experts; DeepSeek-V3 (2412.19437) section 3.3.
    """
    return _product(x, w, group_sizes, quantization)


def _forward(x: Array, w: Array, group_sizes: Array, quantization: str) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, w, group_sizes, quantization), (x, w, group_sizes)


def _backward(quantization: str, residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = residuals
    dx = _product(dy, w.swapaxes(1, 2), group_sizes, quantization)
    return dx.astype(x.dtype), _outer(x, dy, group_sizes, quantization).astype(w.dtype), None


quantized_matmul.defvjp(_forward, _backward)


def check(quantization: str) -> None:
    """Raise a ValueError if qwix is needed and not installed."""
    if quantization != "none" and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            f"model.quantization={quantization!r} needs qwix, which is not installed: pip install "
            "'moe_jax[quantization]'; or set model.quantization='none'."
        )


def quantized(a: Float[Array, "..."], quantization: str, scaled_axes: tuple[int, ...]) -> "QArray":
    """`a` in eight bits, with a float32 scale for each index of `scaled_axes`; the scale of zeros is 1."""
    import qwix

    values = a.astype(jnp.float32)
    form = FORMATS[quantization]
    calibration = CALIBRATION[quantization]
    with jax_defaults():
        return qwix.quantize(values, form, channelwise_axes=scaled_axes, calibration_method=calibration)


def _product(x: Array, w: Array, group_sizes: Array, quantization: str) -> Array:
    rows = quantized(x, quantization, (0,))
    matrices = quantized(w, quantization, (0, 2))
    y = lax.platform_dependent(rows, matrices, group_sizes, cpu=_tiled_product, default=_ragged_product)
    return grouped.zero_tail(y, group_sizes).astype(x.dtype)


def _outer(x: Array, dy: Array, group_sizes: Array, quantization: str) -> Array:
    if x.shape[0] == 0:
        return jnp.zeros_like(x, shape=(group_sizes.shape[0], x.shape[1], dy.shape[1]))
    # rows after the last group must not affect a scale
    columns = (quantized(grouped.zero_tail(a, group_sizes), quantization, (1,)) for a in (x, dy))
    kernels = {"cpu": _tiled_outer, "default": _ragged_outer}
    if grouped.has_tpu_compiler():
        kernels["tpu"] = _widened_outer
    return lax.platform_dependent(*columns, group_sizes, **kernels)


# --- products of XLA, through qwix -----------------------------------------------------------------------------


def _ragged_product(x: "QArray", w: "QArray", group_sizes: Array) -> Array:
    return _qwix_product(x, w, group_sizes, grouped.PRODUCT)


def _ragged_outer(x: "QArray", dy: "QArray", group_sizes: Array) -> Array:
    return _qwix_product(x, dy, group_sizes, grouped.OUTER)


def _qwix_product(
    a: "QArray", b: "QArray", group_sizes: Array, which: lax.RaggedDotDimensionNumbers
) -> Float[Array, "..."]:
    import qwix

    with jax_defaults():
        return qwix.ragged_dot_general(a, b, group_sizes, which, preferred_element_type=jnp.float32)


# --- our products, in which a row is multiplied with its own group only ----------------------------------------


def _tiled_product(x: "QArray", w: "QArray", group_sizes: Array) -> Array:
    y = grouped.tiled_matmul(x.qvalue, w.qvalue, group_sizes, x.scale.dtype)
    return y * x.scale * jnp.repeat(w.scale[:, 0], group_sizes, axis=0, total_repeat_length=y.shape[0])


def _tiled_outer(x: "QArray", dy: "QArray", group_sizes: Array) -> Array:
    dw = grouped.tiled_outer(x.qvalue, dy.qvalue, group_sizes, x.scale.dtype)
    return dw * x.scale.T[None] * dy.scale[None]


def _widened_outer(x: "QArray", dy: "QArray", group_sizes: Array) -> Array:
    rows, grads = (a.qvalue.astype(jnp.bfloat16) for a in (x, dy))
    return grouped.tpu_outer(rows, grads, group_sizes, x.scale.dtype) * x.scale.T[None] * dy.scale[None]
