"""Muon: the direction of a matrix is its momentum with all singular values near 1.

A matrix is one weight of one layer, or of one expert of a layer; heads are the columns, or rows, of a single matrix.
N stacked matrices (layers, experts), R rows (what a weight reads), C columns.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from moe_jax.config import MuonConfig
from moe_jax.mesh import constrain, is_expert_weight, is_sharded, whole_spec
from moe_jax.model.abstract import Dims, Tree

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic, steepest at 0: small singular values grow fastest
OF_HEADS = ("heads", "kv_heads")  # dims that are one side of a matrix together with the next one


def orthogonalized(config: MuonConfig, dims: Tree, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Stateless: each update, a float32 weight of any rank, orthogonalised matrix by matrix and scaled.

    The result is `rms sqrt(max(R, C))` times the orthogonal factor, whose root mean square is about `rms` whatever the
    shape. Source: Jordan (2024), https://kellerjordan.github.io/posts/muon; the scale is eq. 4 of arXiv 2502.16982.
    """

    def update(updates: Tree, _: Tree) -> Tree:
        return jax.tree.map(one, updates, dims, is_leaf=is_masked)

    def one(x: Array, d: Dims) -> Array:
        if is_masked(x):
            return x
        stacked, rows = sides(d.names, x.ndim)
        if is_sharded(mesh):
            x = constrain(x, mesh, whole_spec(mesh, d.names, x.shape, stacked))
        matrices = x.reshape(*x.shape[:stacked], math.prod(x.shape[stacked : stacked + rows]), -1)
        scale = config.rms * math.sqrt(max(matrices.shape[-2:]))
        return scale * newton_schulz(matrices, config.iterations).reshape(x.shape)

    return optax.stateless(update)


def is_masked(x: object) -> bool:
    """Whether this stands where a tree by parameter has nothing, because another method moves the parameter."""
    return isinstance(x, optax.MaskedNode)


def newton_schulz(
    x: Float32[Array, "*stacked rows columns"], iterations: int
) -> Float32[Array, "*stacked rows columns"]:
    """The matrices with singular values between about 0.7 and 1.2; a matrix of zeros stays one.

    `optax.contrib.scale_by_muon` computes the same, but merges the stacked dimensions, so that a mesh that splits
    experts would have to gather them.
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    a, b, c = COEFFICIENTS

    def iterate(_: int, x: Array) -> Array:
        gram = x @ x.mT
        return a * x + (b * gram + c * gram @ gram) @ x

    x = jax.lax.fori_loop(0, iterations, iterate, x)
    return x if wide else x.mT


def sides(names: Sequence[str], rank: int) -> tuple[int, int]:
    """How many axes of a weight of this rank are stacked in front, and how many after them are the rows of a matrix."""
    by_expert = is_expert_weight(names)  # not of the router, whose columns are experts
    return rank - len(names) + by_expert, 2 if names[by_expert] in OF_HEADS else 1
