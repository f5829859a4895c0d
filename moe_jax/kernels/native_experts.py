"""Gated experts on a CPU in C++, `cpp/experts.cc`.

XLA:CPU multiplies a dynamic number of rows only by loops over small products, and moves every copy through memory in
between. Here a single call sorts, multiplies, activates and combines.
T tokens, K slots, N = T K copies, E experts, D embed, F ffw.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float32

from moe_jax.kernels import native
from moe_jax.kernels.activation import SWIGLU, Activation


def experts(
    x: Array,
    expert_ids: Array,
    gates: Array,
    weights: Sequence[Array],
    activation: Activation = SWIGLU,
    keep: bool = False,
) -> Float32[Array, "tokens embed"]:
    """sum over a token's slots of gate x activation(x gate_e, x up_e) down_e, accumulated in float32.

    The cost is proportional to the copies, whatever E and the skew of the routing. Call it only if `native.missing()`
    is None.

    The C++ code reads raw memory, so dtypes are converted and sizes compared here.

    Args:
        x: [T, D], float32 or bfloat16.
        expert_ids: int32 [T, K]; E is an empty slot. Another integer dtype is cast.
        gates: float32 [T, K]; another floating dtype is cast.
        weights: gate and up [E, D, F], down [E, F, D]; cast to x's dtype.
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
    shapes = [a.shape for a in (x, expert_ids, gates, *weights)]
    if not _fit(*shapes):
        raise ValueError(
            f"x, expert_ids, gates and the three weights have the shapes {', '.join(map(str, shapes))}, which must be "
            "[T, D], [T, K], [T, K], [E, D, F], [E, D, F] and [E, F, D]; correct them."
        )
    weights = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    return _experts(x, expert_ids.astype(jnp.int32), gates.astype(jnp.float32), weights, activation, keep)


def _fit(x: tuple, ids: tuple, gates: tuple, gate: tuple, up: tuple, down: tuple) -> bool:
    """Whether these shapes fit together."""
    if [len(shape) for shape in (x, ids, gate)] != [2, 2, 3]:
        return False
    (tokens, embed), (experts, _, ffw) = x, gate
    wide = (experts, embed, ffw)
    narrow = (experts, ffw, embed)
    return ids[0] == tokens and gates == ids and (gate, up, down) == (wide, wide, narrow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _experts(
    x: Array, expert_ids: Array, gates: Array, weights: Sequence[Array], activation: Activation, keep: bool
) -> Array:
    return _forward(x, expert_ids, gates, weights, activation, keep)[0]


def _forward(
    x: Array, expert_ids: Array, gates: Array, weights: Sequence[Array], activation: Activation, keep: bool
) -> tuple[Array, tuple[Any, ...]]:
    (tokens, embed), copies, (num_experts, _, ffw) = x.shape, expert_ids.size, weights[0].shape
    hidden = jax.ShapeDtypeStruct((copies, ffw), x.dtype)
    ints = jax.ShapeDtypeStruct((copies,), jnp.int32)
    results = [
        jax.ShapeDtypeStruct((tokens, embed), jnp.float32),
        *(hidden, hidden, ints, ints, jax.ShapeDtypeStruct((num_experts,), jnp.int32)),
        jax.ShapeDtypeStruct((copies, embed), jnp.float32),
    ]
    y, *residuals, _ = _call("forward", x.dtype, activation, results, x, expert_ids, gates, *weights)
    if keep:
        residuals = [checkpoint_name(a, "hidden") for a in residuals]
    return y, (x, gates, weights, *residuals)


def _backward(
    activation: Activation, keep: bool, residuals: tuple[Any, ...], dy: Array
) -> tuple[Array, None, Array, Any]:
    x, gates, weights, *rest = residuals
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, gates, *weights)]
    room = jax.ShapeDtypeStruct((gates.size, x.shape[1]), jnp.float32)
    dx, d_gates, *d_weights, _ = _call("backward", x.dtype, activation, [*like, room], dy, x, gates, *weights, *rest)
    return dx, None, d_gates, jax.tree.unflatten(jax.tree.structure(weights), d_weights)


_experts.defvjp(_forward, _backward)


def _call(
    which: str, dtype: jnp.dtype, activation: Activation, results: list[jax.ShapeDtypeStruct], *arrays: Array
) -> list[Array]:
    numbers = {name: np.float32(value) for name, value in activation._asdict().items()}
    with jax.named_scope("experts"):  # dispatch and combine are in the same call
        return native.call("experts", which, dtype, results, *arrays, **numbers)
