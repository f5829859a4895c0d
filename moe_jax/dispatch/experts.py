"""The experts: their weights, and the products of rows with them in C++, in XLA or in eight bits.

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
from moe_jax.kernels.grouped import TILE_ROWS, grouped_matmul
from moe_jax.mesh import is_sharded, platform
from moe_jax.routing import count


class ExpertWeights(NamedTuple):
    """Gated experts: gate and up [E, D, F], down [E, F, D]; without E a dense layer's."""

    gate: Float[Array, "*experts embed ffw"]
    up: Float[Array, "*experts embed ffw"]
    down: Float[Array, "*experts ffw embed"]


# the logical dimensions of each field, by which `moe_jax.mesh` splits them
DIMS = {"gate": ("experts", "embed", "ffw"), "up": ("experts", "embed", "ffw"), "down": ("experts", "ffw", "embed")}


def feed_forward(
    x: Float[Array, "tokens embed"],
    weights: ExpertWeights,
    mesh: Mesh | None = None,
    cpu_kernel: str = "auto",
    activation: Activation = SWIGLU,
) -> Float[Array, "tokens embed"]:
    """`activation(x gate, x up) down` with gate and up [D, F], down [F, D], in x's dtype.

    On a single CPU in C++, as one expert that gets every token.
    """
    if is_sharded(mesh) or not native.chosen(cpu_kernel, mesh, x.dtype):
        return activation(x @ weights.gate, x @ weights.up) @ weights.down
    tokens = x.shape[0]
    one = ExpertWeights(*(w[None] for w in weights))
    all_of_it = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32)
    return native_experts.experts(x, *all_of_it, one, activation).astype(x.dtype)


# --- how rows are multiplied ----------------------------------------------------------------------------------


class Multiply(NamedTuple):
    """One implementation of the products of rows with the matrices of their experts.

    Gates weigh the hidden row, so that their gradient needs no output of an expert.

    routed: (x [T, D], expert_ids [T, K], gates [T, K], weights) -> float32 [T, D], for every token the sum over its
        slots of gate x expert(x). Ids index the experts in `weights`, and their number is an empty slot. Exact under
        any routing, at a cost proportional to the copies. The hidden activations are named for `model.remat_keep`.
    each: (rows [E, R, D], gates [E, R, 1], weights) -> gate x expert(row) [E, R, D], R rows for each expert; rows
        [R, D] are multiplied by every expert.
    tile: `routed` pads the rows of an expert to a multiple of it.
    """

    routed: Callable[[Array, Array, Array, ExpertWeights], Array]
    each: Callable[[Array, Array, ExpertWeights], Array]
    tile: int


def multiply_for(
    cpu_kernel: str, mesh: Mesh | None, dtype: jnp.dtype, quantization: str, activation: Activation = SWIGLU
) -> Multiply:
    """The implementation that a config selects on these devices.

    Raises:
        ValueError: `cpu_kernel="native"` where it cannot run; `quantization` without qwix.
    """
    quantize.check(quantization)
    if quantization != "none":
        return in_format(quantization, activation)
    return in_cpp(activation) if native.chosen(cpu_kernel, mesh, dtype) else in_xla(activation)


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
    num_experts = weights.gate.shape[0]
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
    """share x expert(row) for every row with its expert; rows [R, D] sorted by expert, share float32 [R, 1]."""
    gate, up = matmul(rows, weights.gate, sizes), matmul(rows, weights.up, sizes)
    if keep:
        gate, up = checkpoint_name(gate, "hidden"), checkpoint_name(up, "hidden")
    return matmul(_hidden(gate, up, share, activation), weights.down, sizes)


def by_expert(rows: Array, share: Array, weights: ExpertWeights, activation: Activation = SWIGLU) -> Array:
    """share x expert(row) for rows [E, R, D], R for each expert, or rows [R, D] with every expert; share [E, R, 1]."""

    def one(rows: Array, share: Array, gate: Array, up: Array, down: Array) -> Array:
        return _hidden(rows @ gate, rows @ up, share, activation) @ down

    return jax.vmap(one, in_axes=(None if rows.ndim == 2 else 0, 0, 0, 0, 0))(rows, share, *weights)


def _hidden(gate: Array, up: Array, share: Array, activation: Activation) -> Array:
    """The rows [R, F] that `down` multiplies, rounded once from float32."""
    return (activation(gate.astype(jnp.float32), up.astype(jnp.float32)) * share).astype(gate.dtype)


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
        num_experts = weights.gate.shape[0]
        rows = jnp.broadcast_to(rows, (num_experts, *rows.shape[-2:]))
        sizes = jnp.full(num_experts, rows.shape[1], jnp.int32)
        flat = rows.reshape(-1, rows.shape[2])
        return by_group(flat, share.reshape(-1, 1), weights, sizes, matmul, activation).reshape(rows.shape)

    routed = functools.partial(by_sorting, matmul=matmul, activation=activation)
    return Multiply(routed, each, tile=TILE_ROWS)
