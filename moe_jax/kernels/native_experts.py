"""Experts on a CPU in C++, `cpp/experts.cc`.

XLA:CPU multiplies a dynamic number of rows only by loops over small products, and moves every copy through memory in
between. Here a single call sorts, multiplies, activates and combines.
T tokens, K slots, N = T K copies, E experts, D embed, F ffw.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32

from moe_jax.kernels import native
from moe_jax.kernels.activation import SWIGLU, Activation
from moe_jax.kernels.weights import ExpertWeights


def experts(
    x: Array,
    expert_ids: Array,
    gates: Array,
    weights: ExpertWeights,
    activation: Activation = SWIGLU,
    keep: bool = False,
) -> Float32[Array, "tokens embed"]:
    """sum over a token's slots of gate x (activation(x gate_e, x up_e) down_e), accumulated in float32.

    With biases, x gate_e + gate_bias_e and so on: the gate weighs that of down, too.

    The cost is proportional to the copies, whatever E and the skew of the routing. Call it only if `native.missing()`
    is None.

    The C++ code reads raw memory, so dtypes are converted and sizes compared here.

    Args:
        x: [T, D], float32 or bfloat16.
        expert_ids: int32 [T, K]; E is an empty slot. Another integer dtype is cast.
        gates: float32 [T, K]; another floating dtype is cast.
        weights: those of E experts, with a gate where the activation has one; cast to x's dtype.
        activation: of the hidden rows.
        keep: name what the backward pass reads "hidden", for `model.remat_keep`.

    Returns:
        float32 [T, D]. An expert without tokens has a gradient of exactly 0.

    Raises:
        ValueError: another dtype, or sizes that do not fit together.
    """
    if x.dtype not in native.DTYPES or not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise ValueError(
            f"experts in C++ take x in float32 or bfloat16 and integer expert_ids, not {x.dtype} and "
            f"{expert_ids.dtype}; cast them."
        )
    if not _fit(x, expert_ids, gates, weights, activation):
        shapes = (str(a.shape) for a in jax.tree.leaves((x, expert_ids, gates, weights)))
        raise ValueError(
            f"x, expert_ids, gates and the weights have the shapes {', '.join(shapes)}, which must be [T, D], [T, K], "
            f"[T, K], {'[E, D, F], ' if activation.gated else ''}[E, D, F] and [E, F, D], and of biases [E, F] and "
            "[E, D]; correct them."
        )
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    return _experts(x, expert_ids.astype(jnp.int32), gates.astype(jnp.float32), weights, activation, keep)


def _fit(x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, activation: Activation) -> bool:
    """Whether the shapes fit together, and the weights have what the activation reads."""
    if [x.ndim, expert_ids.ndim, weights.up.ndim] != [2, 2, 3]:
        return False
    shapes = _shapes(weights)
    same = all(w is None or w.shape == shape for w, shape in zip(weights, shapes, strict=True))
    gated = (weights.gate is not None) == bool(activation.gated)
    return same and gated and x.shape == (len(gates), shapes.up[1]) and expert_ids.shape == gates.shape


def _shapes(weights: ExpertWeights) -> ExpertWeights:
    """The shapes of all arrays that experts of this size can have."""
    experts, embed, ffw = weights.up.shape
    wide: Any = (experts, embed, ffw)
    narrow: Any = (experts, ffw, embed)
    hidden: Any = (experts, ffw)
    return ExpertWeights(wide, wide, narrow, hidden, hidden, (experts, embed))  # type: ignore[arg-type]


def _complete(weights: ExpertWeights, dtype: jnp.dtype) -> list[Array]:
    """The weights as the C++ code takes them: an array of no experts stands for what they do not have."""
    pairs = zip(weights, _shapes(weights), strict=True)
    return [jnp.zeros((0, *shape[1:]), dtype) if w is None else w for w, shape in pairs]  # type: ignore[index]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _experts(
    x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, activation: Activation, keep: bool
) -> Array:
    return _forward(x, expert_ids, gates, weights, activation, keep)[0]


def _forward(
    x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, activation: Activation, keep: bool
) -> tuple[Array, tuple[Any, ...]]:
    (tokens, embed), copies, (num_experts, _, ffw) = x.shape, expert_ids.size, weights.up.shape
    ints = jax.ShapeDtypeStruct((copies,), jnp.int32)
    results = [
        jax.ShapeDtypeStruct((tokens, embed), jnp.float32),
        jax.ShapeDtypeStruct((copies if activation.gated else 0, ffw), x.dtype),
        jax.ShapeDtypeStruct((copies, ffw), x.dtype),
        *(ints, ints, jax.ShapeDtypeStruct((num_experts,), jnp.int32)),
        jax.ShapeDtypeStruct((copies, embed), jnp.float32),
    ]
    arrays = x, expert_ids, gates, *_complete(weights, x.dtype)
    y, *residuals, _ = _call("forward", x.dtype, activation, results, *arrays)
    if keep:
        residuals = [checkpoint_name(a, "hidden") for a in residuals]
    return y, (x, gates, weights, *residuals)


def _backward(
    activation: Activation, keep: bool, residuals: tuple[Any, ...], dy: Array
) -> tuple[Array, None, Array, ExpertWeights]:
    x, gates, weights, *rest = residuals
    arrays = x, gates, *_complete(weights, x.dtype)
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    room = jax.ShapeDtypeStruct((gates.size, x.shape[1]), jnp.float32)
    dx, d_gates, *d_weights, _ = _call("backward", x.dtype, activation, [*like, room], dy, *arrays, *rest)
    of_weights: Any = (None if w is None else d for w, d in zip(weights, d_weights, strict=True))
    return dx, None, d_gates, ExpertWeights(*of_weights)


_experts.defvjp(_forward, _backward)


def _call(
    which: str, dtype: jnp.dtype, activation: Activation, results: list[jax.ShapeDtypeStruct], *arrays: Array
) -> list[Array]:
    numbers = {name: np.float32(value) for name, value in activation._asdict().items()}
    with jax.named_scope("experts"):  # dispatch and combine are in the same call
        return native.call("experts", which, dtype, results, *arrays, **numbers)
