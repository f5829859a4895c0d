"""The experts themselves: their weights, SwiGLU, and how rows are multiplied on each platform."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from moe_jax.kernels import native, quantize
from moe_jax.kernels.grouped import TILE_ROWS, grouped_matmul
from moe_jax.mesh import is_sharded, platform
from moe_jax.routing import count

pass


class ExpertWeights(NamedTuple):
    """SwiGLU experts: gate and up [E, D, F], down [E, F, D]; without E a dense layer's."""

    gate: Float[Array, "*experts embed ffw"]
    up: Float[Array, "*experts embed ffw"]
    down: Float[Array, "*experts ffw embed"]


class Traffic(NamedTuple):
    """What a dispatch did, int32 [] each, additive over micro-batches.

    dropped: token copies that no expert saw. rounds: exchanges that were needed, 1 when balanced.
    rows: rows multiplied, padding included. visits: over all tokens, how many devices their copies went to.
    """

    dropped: Int32[Array, "*shards"]
    rounds: Int32[Array, "*shards"]
    rows: Int32[Array, "*shards"]
    visits: Int32[Array, "*shards"]


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """`(silu(x gate) * (x up)) down`. Source: arXiv 2002.05202."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def dense_swiglu(
    x: Float[Array, "tokens embed"], weights: ExpertWeights, mesh: Mesh | None = None, cpu_kernel: str = "auto"
) -> Float[Array, "tokens embed"]:
    """`swiglu` with gate and up [D, F], down [F, D]: on one CPU an expert to which all tokens go."""
    if is_sharded(mesh) or not in_native(cpu_kernel, mesh, x.dtype):
        return swiglu(x, *weights)
    tokens = x.shape[0]
    one = ExpertWeights(*(w[None] for w in weights))
    return native.experts(x, jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1), jnp.float32), one).astype(x.dtype)


def _grouped_swiglu(rows: Array, weights: ExpertWeights, sizes: Array, quantization: str) -> Array:
    """`swiglu` of every row with its expert's weights; rows sorted by expert."""

    def times(rows: Array, w: Array) -> Array:
        if quantization == "none":
            return grouped_matmul(rows, w, sizes)
        return quantize.quantized_matmul(rows, w, sizes, quantization)

    return times(jax.nn.silu(times(rows, weights.gate)) * times(rows, weights.up), weights.down)


def _swiglu_of_each(rows: Array, weights: ExpertWeights, quantization: str) -> Array:
    """`swiglu` of rows [E, R, D], R for each expert."""
    if quantization == "none":
        return jax.vmap(swiglu)(rows, *weights)
    sizes = jnp.full(rows.shape[0], rows.shape[1], jnp.int32)
    return _grouped_swiglu(rows.reshape(-1, rows.shape[2]), weights, sizes, quantization).reshape(rows.shape)


def _visits(expert_ids: Array, experts_per_device: int, devices: int) -> Array:
    """Over all tokens, the number of distinct devices that their experts are on."""
    device = jnp.sort(expert_ids // experts_per_device, axis=1)
    new = jnp.concatenate([jnp.ones_like(device[:, :1], bool), device[:, 1:] != device[:, :-1]], 1)
    return (new & (device < devices)).sum(dtype=jnp.int32)


# --- one linear map, its own transpose ------------------------------------------------------------------------


@jax.custom_vjp
def _take(rows: Array, index: Array, back: Array) -> Array:
    """out[i] = sum_k rows[index[i, k]], 0 out of range. `back` says the same from the other side:

    j in index[i] exactly as often as i in back[j], so the transpose is a gather too, never a scatter.
    """
    taken = rows.at[index].get(mode="fill", fill_value=0)
    if index.shape[1] == 1:
        return taken[:, 0]
    return taken.astype(jnp.float32).sum(1).astype(rows.dtype)


def _sorting(keys: Array) -> tuple[Array, Array]:
    """(which element comes i-th, at which place element j comes), int32, stable."""
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))


# --- local: sort by expert, dropless --------------------------------------------------------------------------


class Kernel(NamedTuple):
    """(x [T, D], expert_ids [T, K], gates [T, K], weights) -> float32 [T, D], an expert's rows padded to tiles."""

    multiply: Callable[[Array, Array, Array, ExpertWeights], Array]
    tile: int


def in_native(cpu_kernel: str, mesh: Mesh | None, dtype: jnp.dtype) -> bool:
    """Whether experts run in C++ here: "xla" nowhere; "auto" on CPUs that can; "native" on CPUs, or not at all.

    Raises:
        ValueError: `cpu_kernel="native"` on a CPU without a compiler, or with another dtype.
    """
    here = jax.default_backend() if mesh is None else platform(mesh)
    if here != "cpu" or cpu_kernel == "xla":
        return False
    why = native.missing() if dtype in native.DTYPES else f"it computes in float32 and bfloat16, not {dtype}"
    if why and cpu_kernel == "native":
        raise ValueError(f'model.cpu_kernel="native" cannot be: {why}; or set it to "auto" or "xla".')
    return why is None


def kernel_for(cpu_kernel: str, mesh: Mesh | None, dtype: jnp.dtype, quantization: str) -> Kernel:
    """The kernel that the config means on these devices."""
    if quantization != "none":
        return Kernel(_in_format(quantization), TILE_ROWS)
    return NATIVE if in_native(cpu_kernel, mesh, dtype) else IN_XLA


def told(cpu_kernel: str, mesh: Mesh, dtype: str, quantization: str = "none") -> str | None:
    """One line on how experts multiply, on CPUs or narrowed; None where there is nothing to tell."""
    quantize.check(quantization)
    if quantization != "none":
        return f"experts multiply in {quantization}, quantized by qwix, in XLA"
    if platform(mesh) != "cpu":
        return None
    if in_native(cpu_kernel, mesh, jnp.dtype(dtype)):
        return "experts multiply in C++"
    return f"experts multiply in XLA: {native.missing() or f'model.cpu_kernel={cpu_kernel!r}, {dtype}'}"


def _by_sorting(x: Array, expert_ids: Array, gates: Array, weights: ExpertWeights, quantization: str = "none") -> Array:
    """`native.experts` in XLA, for every platform."""
    num_experts, slots = weights.gate.shape[0], expert_ids.shape[1]
    with jax.named_scope("dispatch"):
        order, place = _sorting(expert_ids.ravel())
        copies = _take(x, order[:, None] // slots, place.reshape(-1, slots))
    with jax.named_scope("experts"):
        outputs = _grouped_swiglu(copies, weights, count(expert_ids, num_experts), quantization)
    with jax.named_scope("combine"):
        back = _take(outputs, place[:, None], order[:, None]).reshape(*expert_ids.shape, x.shape[1])
        return jnp.einsum("tk,tkd->td", gates, back.astype(jnp.float32))


@functools.cache  # the same kernel is the same function
def _in_format(quantization: str) -> Callable[[Array, Array, Array, ExpertWeights], Array]:
    return functools.partial(_by_sorting, quantization=quantization)


NATIVE, IN_XLA = Kernel(native.experts, 1), Kernel(_by_sorting, TILE_ROWS)


def _traffic(dropped: Array | int = 0, *, rounds: Array | int, rows: Array | int, visits: Array) -> Traffic:
    """One row of a per-shard report."""
    return Traffic(*(jnp.asarray(n, jnp.int32)[None] for n in (dropped, rounds, rows, visits)))


def _before(sizes: Array) -> Array:
    """The sum of all earlier entries, along the first axis."""
    return jnp.cumsum(sizes, axis=0, dtype=jnp.int32) - sizes
