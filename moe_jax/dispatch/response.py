"""How strongly the experts respond to vectors: one product with every expert, where the experts are.

V vectors, E experts, D embed, F expert ffw.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from moe_jax.kernels.weights import DIMS
from moe_jax.mesh import axes, is_sharded, per_shard, spec

SMALLEST_SQUARE = 1e-20  # of a norm: the root of 0 has an infinite gradient


def responses(
    x: Float32[Array, "vectors embed"], first: Float[Array, "experts embed ffw"], mesh: Mesh | None = None
) -> Float32[Array, "vectors experts"]:
    """||x_v W_e||, the norm of what the first matrix of each expert makes of each vector, in float32.

    No matrix is gathered: a device multiplies its part of those that it has, one expert after the other, and [V, F] of
    an expert is summed over the devices that split D, numbers [V] over those that split F.

    Args:
        x: the vectors, the same on every device.
        first: W, [E, D, F], split as `DIMS` says: the gate, or up where there is none.
        mesh: the devices; None for one.
    """
    dims = DIMS["gate"]

    def on_device(x: Array, first: Array) -> Array:
        def total(y: Array, dim: str) -> Array:
            return lax.psum(y, axes(dim, dims)) if is_sharded(mesh) else y

        @jax.checkpoint
        def squared(matrix: Array) -> Array:
            y = jnp.matmul(x, matrix.astype(jnp.float32), precision=lax.Precision.HIGHEST)
            return (total(y, "embed") ** 2).sum(1)

        return jnp.sqrt(jnp.maximum(total(lax.map(squared, first), "ffw"), SMALLEST_SQUARE)).T

    vectors = functools.partial(spec, "whole")
    return per_shard(on_device, mesh, (vectors("embed"), spec(*dims)), vectors("experts"))(x, first)
