"""Muon: each matrix alone, against ten lines of NumPy, optax, and a mesh of eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from conftest import mesh_sizes, tiny_config
from moe_jax.config import MeshConfig
from moe_jax.mesh import abstract_mesh, is_expert_weight, make_mesh, ways, whole_spec
from moe_jax.model.abstract import abstract_model
from moe_jax.training.muon import newton_schulz, sides
from moe_jax.training.optimizer import make_optimizer, method_of
from moe_jax.training.state import abstract_state, state_shardings

MUON = dict(method="muon", weight_decay=0.0, clip_norm=0.0)
CONFIG = tiny_config(optimizer=MUON, model=dict(num_shared_experts=1, mtp_depth=1, qk_norm="head"))
DIMS = abstract_model(CONFIG.model).dims


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    draws = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(draws.normal(size=a.shape), jnp.float32) for a in leaves])


def reference(gradients, matrix_shape):
    """The update after these gradients of one matrix, in float64."""
    momentum = 0.0
    for gradient in gradients:
        gradient = gradient.reshape(matrix_shape).astype(np.float64)
        momentum = 0.95 * momentum + gradient
        x = gradient + 0.95 * momentum
    x = x / np.linalg.norm(x)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return 0.2 * np.sqrt(max(matrix_shape)) * x


def test_every_matrix_of_every_layer_and_expert_moves_as_ten_lines_say():
    gradients = [random_like(abstract_state(CONFIG).params, seed) for seed in range(2)]
    optimizer = make_optimizer(CONFIG.optimizer, DIMS)
    state = optimizer.init(gradients[0])
    for one in gradients:
        updates, state = jax.jit(optimizer.update)(one, state)
    matrices = 0
    for update, dims, *both in zip(*map(jax.tree.leaves, (updates, DIMS, *gradients)), strict=True):
        if method_of(CONFIG.optimizer, dims) != "muon":
            continue
        stacked, rows = sides(dims.names, update.ndim)
        shape = np.prod(update.shape[stacked : stacked + rows]), np.prod(update.shape[stacked + rows :])
        for index in np.ndindex(update.shape[:stacked]):
            want = reference([np.asarray(g[index]) for g in both], shape)
            np.testing.assert_allclose(np.asarray(update[index]).reshape(shape), want, atol=2e-3 * np.abs(want).max())
            matrices += 1
    assert matrices == 4 * 4 + 3 + 3 * (3 * 4 + 3) + 2  # attention, the dense layer, experts and shared, mtp


def test_router_embedding_head_and_norms_move_as_adamw_moves_them():
    gradients = random_like(abstract_state(CONFIG).params, 0)
    adam = make_optimizer(tiny_config(optimizer=MUON | dict(method="adamw")).optimizer, DIMS)
    muon = make_optimizer(CONFIG.optimizer, DIMS)
    ours, theirs = (jax.jit(o.update)(gradients, o.init(gradients))[0] for o in (muon, adam))
    same = set()
    for dims, a, b in zip(*map(jax.tree.leaves, (DIMS, ours, theirs)), strict=True):
        if (np.asarray(a) == np.asarray(b)).all():
            same.add(dims.part)
            assert method_of(CONFIG.optimizer, dims) == "adamw"
        else:
            assert method_of(CONFIG.optimizer, dims) == "muon"
    assert same == {"embedding", "head", "router", "norms"}


def test_one_matrix_is_that_of_optax():
    x = random_like({"w": np.zeros((24, 10))}, 1)
    theirs = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}
    )
    want = theirs.update(x, theirs.init(x))[0]["w"]
    np.testing.assert_allclose(newton_schulz(x["w"], 5), want, atol=1e-5)


def test_singular_values_come_near_one_and_zeros_stay_zeros():
    x = random_like(np.zeros((3, 20, 30)), 2)
    found = np.linalg.svd(newton_schulz(x, 5), compute_uv=False)
    assert (found.min() > 0.6) and (found.max() < 1.3)
    assert (np.asarray(newton_schulz(jnp.zeros((2, 4, 6)), 5)) == 0).all()  # of an expert that no token reached


@pytest.mark.parametrize(
    ("names", "rank", "want"),
    [
        (("embed", "ffw"), 3, (1, 1)),
        (("experts", "embed", "ffw"), 4, (2, 1)),
        (("embed", "heads", "head_dim"), 4, (1, 1)),
        (("heads", "head_dim", "embed"), 4, (1, 2)),
        (("embed", "mixed"), 2, (0, 1)),
        (("embed", "experts"), 3, (1, 1)),  # the router, one matrix a layer
    ],
)
def test_the_axes_of_a_weight_are_stacked_or_rows_or_columns(names, rank, want):
    assert sides(names, rank) == want


def test_matrices_are_placed_whole_as_far_as_their_number_divides():
    mesh = abstract_mesh(MeshConfig(data=2, expert=4), 8)
    experts = ("experts", "embed", "ffw")
    assert whole_spec(mesh, experts, (3, 8, 64, 64), 2) == P(None, ("expert", "data"), None, None)
    assert whole_spec(mesh, experts, (2, 4, 64, 64), 2) == P("data", "expert", None, None)
    assert whole_spec(mesh, experts, (3, 4, 64, 64), 2) == P(None, "expert", "data", None)  # neither 3 nor 4 / 4
    assert whole_spec(mesh, ("embed", "ffw"), (8, 64, 64), 1) == P(("data", "expert"), None, None)
    assert whole_spec(mesh, ("embed", "ffw"), (3, 64, 64), 1) == P(None, "data", "expert")


@pytest.mark.parametrize("layers", [4, 3])
def test_a_mesh_moves_the_same_and_gathers_no_stack_of_experts(layers):
    config = tiny_config(optimizer=MUON, model=dict(num_layers=layers + 1, embed_dim=32))
    dims = abstract_model(config.model).dims
    gradients = random_like(abstract_state(config).params, 3)
    alone = make_optimizer(config.optimizer, dims)
    want = jax.jit(alone.update)(gradients, alone.init(gradients))[0]
    mesh = make_mesh(MeshConfig(**mesh_sizes((1, 2, 2, 2))))
    places = state_shardings(config, mesh)
    ours = make_optimizer(config.optimizer, dims, mesh)
    placed = jax.device_put(gradients, places.params)
    state = jax.device_put(ours.init(gradients), places.optimizer)
    update = jax.jit(ours.update, out_shardings=(places.params, places.optimizer)).lower(placed, state).compile()
    for a, b in zip(jax.tree.leaves(update(placed, state)[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    experts = [a for a, d in zip(*map(jax.tree.leaves, (gradients, dims)), strict=True) if is_expert_weight(d.names)]
    text = update.as_text()
    assert "all-reduce" in text  # the search below would see collectives
    gathered = [sizes.split(",") for sizes in re.findall(r"f32\[([\d,]+)\]\S* all-gather", text)]
    assert all(np.prod([int(n) for n in sizes]) <= experts[0].size // ways(mesh, "experts") for sizes in gathered)
