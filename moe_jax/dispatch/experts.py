"""The products of rows with experts, in C++, in XLA or in eight bits.

T tokens, K slots, E experts, D embed, F expert ffw, R rows of each expert.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_jax.dispatch.sorting import sorting_of, take
from moe_jax.kernels import native, native_experts, quantize
from moe_jax.kernels.activation import SWIGLU, Activation
from moe_jax.kernels.grouped import TILE_ROWS, bias_of_rows, grouped_matmul
from moe_jax.kernels.weights import ExpertWeights
from moe_jax.mesh import is_sharded, platform
from moe_jax.routing import count


def feed_forward(
    x: Float[Array, "tokens embed"],
    weights: ExpertWeights,
    mesh: Mesh | None = None,
    cpu_kernel: str = "auto",
    activation: Activation = SWIGLU,
) -> Float[Array, "tokens embed"]:
    """`activation(x gate, x up) down` with gate and up [D, F], down [F, D], in x's dtype; without biases.

    On a single CPU in C++, as one expert that gets every token.
    """
    if is_sharded(mesh) or not native.chosen(cpu_kernel, mesh, x.dtype):
        gate = None if weights.gate is None else x @ weights.gate
        return activation(gate, x @ weights.up) @ weights.down
    tokens = x.shape[0]
    one = jax.tree.map(lambda w: w[None], weights)
    all_of_it = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32)
    return native_experts.experts(x, *all_of_it, one, activation).astype(x.dtype)


# --- how rows are multiplied ----------------------------------------------------------------------------------


class Multiply(NamedTuple):
    """One implementation of the products of rows with the matrices of their experts.

    Gates weigh the hidden row and the bias of down, so that their gradient needs no output of an expert; or with
    `gate_on="input"` the row that the expert reads.

    routed: (x [T, D], expert_ids [T, K], gates [T, K], weights) -> float32 [T, D], for every token the sum over its
        slots of gate x expert(x). Ids index the experts in `weights`, and their number is an empty slot. Exact under
        any routing, at a cost proportional to the copies. The hidden activations are named for `model.remat_keep`.
    each: (rows [E, R, D], gates [E, R, 1], weights) -> gate x expert(row) [E, R, D], R rows for each expert; rows
        [R, D] are multiplied by every expert. The result for a gate of 0 is 0.
    tile: `routed` pads the rows of an expert to a multiple of it.
    """

    routed: Callable[[Array, Array, Array, ExpertWeights], Array]
    each: Callable[[Array, Array, ExpertWeights], Array]
    tile: int


def multiply_for(
    cpu_kernel: str,
    mesh: Mesh | None,
    dtype: jnp.dtype,
    quantization: str,
    activation: Activation = SWIGLU,
    gate_on: str = "output",
) -> Multiply:
    """The implementation that a config selects on these devices.

    Raises:
        ValueError: `cpu_kernel="native"` where it cannot run; `quantization` without qwix.
    """
    quantize.check(quantization)
    if quantization != "none":
        multiply = in_format(quantization, activation)
    else:
        multiply = in_cpp(activation) if native.chosen(cpu_kernel, mesh, dtype) else in_xla(activation)
    return on_input(multiply) if gate_on == "input" else multiply


def kernel_note(cpu_kernel: str, mesh: Mesh, dtype: str, quantization: str = "none") -> str | None:
    """A line for the log on how experts multiply, on CPUs or in eight bits; None otherwise."""
    quantize.check(quantization)
    if quantization != "none":
        return f"experts multiply in {quantization}, quantized by qwix, in XLA"
    if platform(mesh) != "cpu":
        return None
    if native.chosen(cpu_kernel, mesh, jnp.dtype(dtype)):
        return "experts multiply in C++"
    return f"experts multiply in XLA: {native.missing() or f'model.cpu_kernel={cpu_kernel!r}, {dtype}'}"


Matmul = Callable[[Array, Array, Array], Array]  # (rows sorted by group, matrices, group sizes) -> rows


def by_sorting(
    x: Array,
    expert_ids: Array,
    gates: Array,
    weights: ExpertWeights,
    matmul: Matmul = grouped_matmul,
    activation: Activation = SWIGLU,
) -> Array:
    """The same as `native_experts.experts`, in XLA, for every platform."""
    num_experts = weights.num_experts
    slots = expert_ids.shape[1]
    with jax.named_scope("dispatch"):
        order, place = sorting_of(expert_ids.ravel())
        copies = take(x, order[:, None] // slots, place.reshape(-1, slots))
        share = take(gates.reshape(-1, 1), order[:, None], place[:, None])
    with jax.named_scope("experts"):
        outputs = by_group(copies, share, weights, count(expert_ids, num_experts), matmul, activation, keep=True)
    with jax.named_scope("combine"):
        back = take(outputs, place[:, None], order[:, None]).reshape(*expert_ids.shape, x.shape[1])
        return back.astype(jnp.float32).sum(1)


def by_group(
    rows: Array,
    share: Array,
    weights: ExpertWeights,
    sizes: Array,
    matmul: Matmul,
    activation: Activation,
    keep: bool = False,
) -> Array:
    """share x expert(row) for every row with its expert; rows [R, D] sorted by expert, share float32 [R, 1].

    The result of the rows after the last expert's is 0.
    """

    def product(rows: Array, matrices: Array, bias: Array | None, share: Array | None = None) -> Array:
        y = matmul(rows, matrices, sizes)
        return y if bias is None else _plus(y, bias_of_rows(bias, sizes, len(rows)), share)

    gate = None if weights.gate is None else product(rows, weights.gate, weights.gate_bias)
    up = product(rows, weights.up, weights.up_bias)
    if keep:
        gate, up = jax.tree.map(lambda a: checkpoint_name(a, "hidden"), (gate, up))
    return product(_hidden(gate, up, share, activation), weights.down, weights.down_bias, share)


def by_expert(rows: Array, share: Array, weights: ExpertWeights, activation: Activation = SWIGLU) -> Array:
    """share x expert(row) for rows [E, R, D], R for each expert, or rows [R, D] with every expert; share [E, R, 1]."""

    def one(rows: Array, share: Array, w: ExpertWeights) -> Array:
        gate = None if w.gate is None else _plus(rows @ w.gate, w.gate_bias)
        hidden = _hidden(gate, _plus(rows @ w.up, w.up_bias), share, activation)
        return _plus(hidden @ w.down, w.down_bias, share)

    return jax.vmap(one, in_axes=(None if rows.ndim == 2 else 0, 0, 0))(rows, share, weights)


def _plus(y: Array, bias: Array | None, share: Array | None = None) -> Array:
    """y [R, N] plus the bias, [N] or of each row, times the share [R, 1] if there is one; rounded once from float32."""
    if bias is None:
        return y
    wide = jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return (y.astype(jnp.float32) + (wide if share is None else share * wide)).astype(y.dtype)


def _hidden(gate: Array | None, up: Array, share: Array, activation: Activation) -> Array:
    """The rows [R, F] that `down` multiplies, rounded once from float32."""
    wide = None if gate is None else gate.astype(jnp.float32)
    return (activation(wide, up.astype(jnp.float32)) * share).astype(up.dtype)


# --- one value per arguments, so that jit finds what was compiled with it -------------------------------------


@functools.cache
def in_cpp(activation: Activation = SWIGLU) -> Multiply:
    """Products in C++ on CPUs."""
    routed = functools.partial(native_experts.experts, activation=activation, keep=True)
    return Multiply(routed, each=functools.partial(by_expert, activation=activation), tile=1)


@functools.cache
def in_xla(activation: Activation = SWIGLU) -> Multiply:
    """Products in the compute dtype, by XLA."""
    routed = functools.partial(by_sorting, activation=activation)
    return Multiply(routed, each=functools.partial(by_expert, activation=activation), tile=TILE_ROWS)


@functools.cache
def in_format(quantization: str, activation: Activation = SWIGLU) -> Multiply:
    """All products of the experts in eight bits, "int8" or "fp8"."""

    def matmul(rows: Array, w: Array, sizes: Array) -> Array:
        return quantize.quantized_matmul(rows, w, sizes, quantization)

    def each(rows: Array, share: Array, weights: ExpertWeights) -> Array:
        num_experts = weights.num_experts
        rows = jnp.broadcast_to(rows, (num_experts, *rows.shape[-2:]))
        sizes = jnp.full(num_experts, rows.shape[1], jnp.int32)
        flat = rows.reshape(-1, rows.shape[2])
        return by_group(flat, share.reshape(-1, 1), weights, sizes, matmul, activation).reshape(rows.shape)

    routed = functools.partial(by_sorting, matmul=matmul, activation=activation)
    return Multiply(routed, each, tile=TILE_ROWS)


@functools.cache
def on_input(multiply: Multiply) -> Multiply:
    """The same, but an expert reads gate x row and its output is not weighed; 0 for a gate of 0. Source: Llama 4."""

    def routed(x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights) -> Array:
        tokens, slots = expert_ids.shape
        copies = (x[:, None] * gates[..., None].astype(x.dtype)).reshape(tokens * slots, -1)
        y = multiply.routed(copies, expert_ids.reshape(-1, 1), _ones(gates).reshape(-1, 1), weights)
        return y.reshape(tokens, slots, -1).sum(1)

    def each(rows: Array, gates: Array, weights: ExpertWeights) -> Array:
        rows = jnp.broadcast_to(rows, (*gates.shape[:2], rows.shape[-1]))
        return multiply.each(rows * gates.astype(rows.dtype), _ones(gates), weights)

    return Multiply(routed, each, multiply.tile)


def _ones(gates: Array) -> Array:
    """1 for every gate but 0, of rows that belong to no copy and of experts that were not chosen."""
    return (gates != 0).astype(gates.dtype)
