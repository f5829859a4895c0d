"""Options of the experts' layer, each compared with its equation written in plain jnp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.model.forward import Pass, PerLayer
from moe_jax.model.layers import FeedForward
from moe_jax.model.moe import MoE
from moe_jax.routing import Tokens

X = jnp.asarray(np.random.default_rng(0).normal(size=(1, 12, 16)), jnp.float32)
FWD = Pass(None, balance.make({}), PerLayer({}), jax.random.key(0))  # a layer alone reads no inputs
TOKENS = Tokens(mask=jnp.ones(12, bool))
LIMIT = 0.3
CLAMPED = dict(activation="swiglu_oai", activation_limit=LIMIT)


def clamped(gate, up):
    gate = jnp.minimum(gate, LIMIT)
    return gate * jax.nn.sigmoid(1.702 * gate) * (jnp.clip(up, -LIMIT, LIMIT) + 1)


def filled(make):
    """A module with random values in every leaf, large enough that limits and routers matter."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    draw = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(0.5 * draw.normal(size=a.shape), a.dtype), state))


def feed_forward(layer, x, activation=lambda gate, up: jax.nn.silu(gate) * up):
    """One expert, or with weights [E, ...] all of them [E, T, D]."""
    return activation(x @ layer.gate[...], x @ layer.up[...]) @ layer.down[...]


def routed(layer, x, outputs):
    """sum of gate x output [E, T, D] over the experts that the layer chooses for x."""
    routing = layer.routing(x, TOKENS, FWD)
    share = jax.nn.one_hot(routing.expert_ids, outputs.shape[0]) * routing.gates[..., None]
    return jnp.einsum("etd,tke->td", outputs, share)


def assert_same(layer, ours, theirs):
    """Equal results, and equal gradients of every parameter and of x."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def value_and_gradients(run):
        def total(params, x):
            y = run(nnx.merge(graphdef, params, rest), x)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, X[0])
        return jax.tree_util.tree_leaves_with_path((y, gradients))

    for (path, one), (_, other) in zip(value_and_gradients(ours), value_and_gradients(theirs), strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
        assert scale > 0 or "bias" in jax.tree_util.keystr(path)


def moe_of(layer, x):
    return layer(x[None], TOKENS, FWD)[0][0]


@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_the_activation_is_that_of_routed_and_shared_experts(kernel):
    config = tiny_config(model=CLAMPED | dict(cpu_kernel=kernel)).model
    layer = filled(lambda: MoE(config, nnx.Rngs(0)))

    def theirs(layer, x):
        return routed(layer, x, feed_forward(layer, x, clamped)) + feed_forward(layer.shared, x, clamped)

    assert_same(layer, moe_of, theirs)


def test_the_activation_is_that_of_dense_layers():
    config = tiny_config(model=CLAMPED).model
    layer = filled(lambda: FeedForward(config, nnx.Rngs(0), "dense", 5))
    assert_same(layer, lambda layer, x: layer(x), functools.partial(feed_forward, activation=clamped))


@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_a_latent_carries_the_routed_experts_and_nothing_else(kernel):
    # y = W_up sum of gate E(W_down x) + sigmoid(w x) shared(x) + sum of gate x over zero-computation experts;
    # the router reads x
    config = tiny_config(model=dict(latent_dim=6, num_zero_experts=2, shared_gate=True, cpu_kernel=kernel)).model
    layer = filled(lambda: MoE(config, nnx.Rngs(0)))

    def theirs(layer, x):
        narrow = feed_forward(layer, x @ layer.latent_down[...])
        routing = layer.routing(x, TOKENS, FWD)
        share = jax.nn.one_hot(routing.expert_ids, 6) * routing.gates[..., None]  # 4 experts and 2 of them
        own, zero = share[..., :4].sum(1), share[..., 4:].sum((1, 2))
        y = jnp.einsum("etl,te->tl", narrow, own) @ layer.latent_up[...]
        shared = jax.nn.sigmoid(x @ layer.shared_gate[...]) * feed_forward(layer.shared, x)
        return y + shared + zero[:, None] * x

    assert_same(layer, moe_of, theirs)
