"""Routers in place of the learned one: what they route by, what moves them, and that balancing works with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.config import MeshConfig, ModelConfig
from moe_jax.huggingface.weights import refuse_balance
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model.forward import Inputs, Pass, PerLayer, token_info
from moe_jax.model.moe import MoE
from moe_jax.routing import RouterConfig, route

MODEL = ModelConfig(embed_dim=64, num_experts=8, init_std=0.02)


def weights(layers: int = 2, **options) -> np.ndarray:
    init = balance.make({"frozen_router": options}, MODEL).init
    return np.asarray(jax.vmap(lambda layer: init(8, layer)["frozen_router"])(jnp.arange(layers)))


def test_weights_are_drawn_as_those_of_a_learned_router_for_every_layer_and_seed():
    first, second = weights()
    assert (first.shape, first.dtype) == ((64, 8), np.float32)
    np.testing.assert_array_equal(np.abs([first, second]), np.float32(0.02))
    assert abs(first.mean()) < 0.02 * 4 / np.sqrt(512)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / np.sqrt(512)
    np.testing.assert_array_equal(weights(), [first, second])
    assert (weights(seed=1) != weights()).any()


def test_the_frozen_weight_takes_the_place_of_the_learned_one_in_its_layers():
    balancer = balance.make({"frozen_router": {"layers": (1, 2)}}, MODEL)
    learned = jnp.ones((64, 8))
    for layer, expected in enumerate((learned, weights()[1])):
        np.testing.assert_array_equal(balancer.router(learned, balancer.init(8, layer)), expected)


def test_only_one_method_may_replace_the_router():
    with pytest.raises(ValueError, match="only one method may replace the router"):
        balance.make({"frozen_router": {}, "kmeans_router": {}}, MODEL)


BOTH = pytest.mark.parametrize("method", ["frozen_router", "kmeans_router"])


@BOTH
def test_they_are_not_exported(method):
    with pytest.raises(ValueError, match=rf"balance \({method}\) has routers that are no parameters"):
        refuse_balance(tiny_config(balance={method: {}}))


@BOTH
def test_a_layer_routes_by_the_weight_in_its_place_and_the_learned_one_has_no_gradient(method):
    config = tiny_config(balance={method: {}, "bias_sign": {}}).model
    balancer = balance.make({method: {}, "bias_sign": {}}, config)
    layer = MoE(config, nnx.Rngs(0))
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)
    inputs = Inputs(tokens, tokens, jnp.ones_like(tokens))
    state = balancer.init(config.num_experts)
    x = jax.random.normal(jax.random.key(1), (1, 8, config.embed_dim))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def output(params, state):
        fwd = Pass(inputs, balancer, PerLayer(state), jax.random.key(0), train=True)
        y, report = nnx.merge(graph, params, rest)(x, token_info(inputs), fwd)
        return (y**2).sum(), (report.details.routing, report.statistics)

    gradient, (routing, statistics) = jax.jit(jax.grad(output, has_aux=True))(params, state)
    weight = state[method]
    if method == "kmeans_router":
        weight = weight / np.linalg.norm(weight, axis=0) / np.sqrt(config.embed_dim)
        chosen = np.asarray(jax.nn.one_hot(routing.expert_ids, config.num_experts)).sum(1)
        np.testing.assert_allclose(statistics[method]["sum"], x[0].T @ chosen, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(statistics[method]["count"], statistics["loads"])
    np.testing.assert_allclose(routing.logits, x[0] @ weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient["router"][...], 0.0)
    assert (gradient["gate"][...] != 0).any()


# --- centroids ------------------------------------------------------------------------------------------------


def of_tokens(x, centroids, **options):
    """The centroids [D, E] after a step on tokens x [T, D], each of which goes to one expert; and the routing."""
    balancer = balance.make(
        {"kmeans_router": options}, ModelConfig(embed_dim=x.shape[1], num_experts=centroids.shape[1])
    )
    state = balancer.init(centroids.shape[1]) | {"kmeans_router": jnp.asarray(centroids)}
    weight = balancer.router(jnp.zeros_like(centroids), state)
    routing = route(jnp.asarray(x) @ weight, RouterConfig(top_k=1), state["bias"])
    after = balancer.update(balancer.observe(routing, jnp.asarray(x)), state, jnp.int32(0))
    return np.asarray(after["kmeans_router"]), routing


def test_a_centroid_moves_towards_the_mean_of_its_tokens_and_one_without_tokens_stays():
    # experts at (1, 0), (0, 1) and (-1, 0): two tokens go to the first, whose mean is (3, 1), one to the second
    x = np.float32([[2, 1], [4, 1], [0, 6]])
    centroids = np.float32([[1, 0, -1], [0, 1, 0]])
    after, routing = of_tokens(x, centroids, ema=0.75)
    np.testing.assert_array_equal(routing.loads, [2, 1, 0])
    np.testing.assert_allclose(after, [[1.5, 0, -1], [0.25, 2.25, 0]], rtol=1e-6)


def test_a_token_chooses_by_direction_whatever_the_length_of_a_centroid():
    x = np.float32([[1, 0.9], [0.9, 1]])
    for factor in (1, 100):
        _, routing = of_tokens(x, np.float32([[factor, 0], [0, 1]]))
        np.testing.assert_array_equal(routing.expert_ids[:, 0], [0, 1])
    # vectors of root mean square 1: their logits are cosines
    _, routing = of_tokens(x * np.sqrt(2) / np.linalg.norm(x, axis=1, keepdims=True), np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(routing.logits, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-5)


def test_centroids_find_the_clusters_of_their_tokens():
    draw = np.random.default_rng(0)
    means = np.float32([[3, 0, 0, 1], [0, 3, 0, -1], [0, 0, 3, 0]])
    centroids = draw.normal(size=(4, 3)).astype(np.float32) * 0.1 + means.T / 3
    for _ in range(50):
        x = means[draw.integers(0, 3, 64)] + 0.1 * draw.normal(size=(64, 4)).astype(np.float32)
        centroids, _ = of_tokens(x, centroids, ema=0.8)
    np.testing.assert_allclose(centroids.T, means, atol=0.1)


def test_the_sums_of_a_mesh_are_those_of_one_device_and_of_micro_batches():
    balancer = balance.make({"kmeans_router": {}}, MODEL)
    draw = np.random.default_rng(0).normal
    x, logits = draw(size=(64, 64)).astype(np.float32), draw(size=(64, 8)).astype(np.float32)

    @jax.jit
    def observed(logits, x):
        return balancer.observe(route(logits, RouterConfig(top_k=2), jnp.zeros(8)), x)

    whole = observed(logits, x)
    tokens = batch_sharding(make_mesh(MeshConfig(data=4, tensor=2)), ["tokens"])
    halves = jax.tree.map(jnp.add, *(observed(logits[part], x[part]) for part in (slice(32), slice(32, 64))))
    for other in (observed(*jax.device_put((logits, x), tokens)), halves):
        for found, expected in zip(*map(jax.tree.leaves, (other, whole)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_without_vectors_no_centroid_moves():
    balancer = balance.make({"kmeans_router": {}}, MODEL)
    state = balancer.init(8)
    routing = route(jnp.ones((2, 8)), RouterConfig(top_k=1), state["bias"])
    after = balancer.update(balancer.observe(routing), state, jnp.int32(0))
    np.testing.assert_array_equal(after["kmeans_router"], state["kmeans_router"])
