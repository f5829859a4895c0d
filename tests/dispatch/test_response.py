"""The responses of experts are norms of products, on any mesh, and no matrix of an expert travels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import mesh_sizes
from moe_jax.config import MeshConfig
from moe_jax.dispatch import responses
from moe_jax.kernels.weights import DIMS
from moe_jax.mesh import make_mesh, spec

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(5, 8)).astype(np.float32)
FIRST = DRAW.normal(size=(4, 8, 6)).astype(np.float32)
WEIGHTS = DRAW.normal(size=(5, 4)).astype(np.float32)


def compiled(mesh=None):
    """(x, first) -> the gradients of a weighted sum in both, and the responses."""

    def weighed(x, first):
        y = responses(x, first, mesh)
        return (y * WEIGHTS).sum(), y

    places = X, FIRST
    if mesh is not None:
        places = jax.device_put(places, (NamedSharding(mesh, P()), NamedSharding(mesh, spec(*DIMS["gate"]))))
    lowered = jax.jit(jax.grad(weighed, (0, 1), has_aux=True)).lower(*places)
    return lowered.compile(), places


def test_they_are_the_norms_of_the_products_with_every_expert():
    program, inputs = compiled()
    (dx, dw), y = program(*inputs)
    products = np.einsum("vd,edf->vef", X, FIRST)
    norms = np.linalg.norm(products, axis=-1)
    np.testing.assert_allclose(y, norms, rtol=1e-5)
    # the derivative of a norm is the vector over it
    unit = products / norms[..., None] * WEIGHTS[..., None]
    np.testing.assert_allclose(dx, np.einsum("vef,edf->vd", unit, FIRST), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("vef,vd->edf", unit, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 1, 2, 1, 2)], ids=str)
def test_on_a_mesh_they_and_their_gradients_are_those_of_one_device_and_no_matrix_is_gathered(sizes):
    program, inputs = compiled(make_mesh(MeshConfig(**mesh_sizes(sizes)), jax.devices()))
    alone, own = compiled()
    for found, expected in zip(*map(jax.tree.leaves, (program(*inputs), alone(*own))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    gathered = re.findall(r"f32\[([\d,]*)\]\S* all-gather", program.as_text())
    assert all(len(shape.split(",")) < 3 for shape in gathered)  # a matrix would have the axes of FIRST


def test_a_vector_of_zeros_has_a_finite_gradient():
    gradients = jax.grad(lambda x, first: responses(x, first).sum(), (0, 1))(jnp.zeros_like(X), FIRST)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
