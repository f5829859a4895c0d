"""A frozen router: what it routes by, what cannot change it, and that methods of balancing work with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.config import ModelConfig
from moe_jax.huggingface.weights import refuse_balance
from moe_jax.model.forward import Inputs, Pass, PerLayer, token_info
from moe_jax.model.moe import MoE

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
        balance.make({"frozen_router": {}, "other": {"method": "frozen_router", "seed": 1}}, MODEL)


def test_it_is_not_exported():
    with pytest.raises(ValueError, match=r"balance \(frozen_router\) has routers that are no parameters"):
        refuse_balance(tiny_config(balance={"frozen_router": {}}))


def test_a_layer_routes_by_the_frozen_weight_and_the_learned_one_has_no_gradient():
    config = tiny_config(balance={"frozen_router": {}, "bias_sign": {}}).model
    balancer = balance.make({"frozen_router": {}, "bias_sign": {}}, config)
    layer = MoE(config, nnx.Rngs(0))
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(1, 8)
    inputs = Inputs(tokens, tokens, jnp.ones_like(tokens))
    state = balancer.init(config.num_experts)
    x = jax.random.normal(jax.random.key(1), (1, 8, config.embed_dim))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def output(params, state):
        fwd = Pass(inputs, balancer, PerLayer(state), jax.random.key(0), train=True)
        y, report = nnx.merge(graph, params, rest)(x, token_info(inputs), fwd)
        return (y**2).sum(), report.details.routing.logits

    gradient, logits = jax.jit(jax.grad(output, has_aux=True))(params, state)
    np.testing.assert_allclose(logits, x[0] @ state["frozen_router"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient["router"][...], 0.0)
    assert (gradient["gate"][...] != 0).any()
