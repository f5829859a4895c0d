"""Options of the experts' layer, each compared with its equation written in plain jnp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.model.abstract import abstract_model
from moe_jax.model.cost import parts
from moe_jax.model.forward import Pass, PerLayer
from moe_jax.model.layers import FeedForward
from moe_jax.model.moe import MoE
from moe_jax.routing import Tokens
from moe_jax.training.optimizer import weight_decay

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


def squared(gate, up):
    return jnp.maximum(up, 0.0) ** 2


def feed_forward(layer, x, activation=lambda gate, up: jax.nn.silu(gate) * up):
    """One expert, or with weights [E, ...] all of them [E, T, D]."""
    gate = None if layer.gate is None else x @ layer.gate[...]
    return activation(gate, x @ layer.up[...]) @ layer.down[...]


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


ACTIVATIONS = pytest.mark.parametrize(("keys", "activation"), [(CLAMPED, clamped), (dict(activation="relu2"), squared)])


@ACTIVATIONS
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_the_activation_is_that_of_routed_and_shared_experts(kernel, keys, activation):
    config = tiny_config(model=keys | dict(cpu_kernel=kernel)).model
    layer = filled(lambda: MoE(config, nnx.Rngs(0)))

    def theirs(layer, x):
        return routed(layer, x, feed_forward(layer, x, activation)) + feed_forward(layer.shared, x, activation)

    assert_same(layer, moe_of, theirs)


@ACTIVATIONS
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_the_activation_is_that_of_dense_layers(kernel, keys, activation):
    config = tiny_config(model=keys | dict(cpu_kernel=kernel)).model
    layer = filled(lambda: FeedForward(config, nnx.Rngs(0), "dense", 5))
    assert_same(layer, lambda layer, x: layer(x), functools.partial(feed_forward, activation=activation))


def test_a_layer_without_a_gate_has_no_parameter_of_one():
    config = tiny_config(model=dict(activation="relu2", expert_bias=True)).model
    layer = MoE(config, nnx.Rngs(0))
    assert layer.gate is layer.gate_bias is layer.shared.gate is None
    assert layer.up_bias.shape == (4, 8)


@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_biases_of_experts_are_of_the_width_of_a_latent_and_of_routed_experts_only(kernel):
    # gpt-oss's layer on a latent: sum of gate x (clamped(z W_g + b_g, z W_u + b_u) W_d + b_d), z = W_down x
    keys = CLAMPED | dict(expert_bias=True, latent_dim=6, cpu_kernel=kernel)
    layer = filled(lambda: MoE(tiny_config(model=keys).model, nnx.Rngs(0)))
    assert (layer.gate_bias.shape, layer.up_bias.shape, layer.down_bias.shape) == ((4, 8), (4, 8), (4, 6))

    def theirs(layer, x):
        z = x @ layer.latent_down[...]
        gate, up = z @ layer.gate[...] + layer.gate_bias[...][:, None], z @ layer.up[...] + layer.up_bias[...][:, None]
        outputs = clamped(gate, up) @ layer.down[...] + layer.down_bias[...][:, None]
        return routed(layer, x, outputs) @ layer.latent_up[...] + feed_forward(layer.shared, x, clamped)

    assert_same(layer, moe_of, theirs)


@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_gates_on_the_input_weigh_what_an_expert_reads(kernel):
    # Llama 4: sigmoid scores, the best expert reads score x token, and its output is added as it is
    keys = dict(gate_on="input", top_k=1, normalize_gates=False, cpu_kernel=kernel)
    layer = filled(lambda: MoE(tiny_config(model=keys).model, nnx.Rngs(0)))

    def theirs(layer, x):
        scores = jax.nn.sigmoid(x @ layer.router[...])
        best = (scores + layer.bias[...]).argmax(-1)
        outputs = feed_forward(layer, x[None] * scores.T[..., None])  # [E, T, D]
        return outputs[best, jnp.arange(len(x))] + feed_forward(layer.shared, x)

    assert_same(layer, moe_of, theirs)


# --- the router ------------------------------------------------------------------------------------------------


def chosen(layer, x, logits, scores, scale=1.0):
    """sum of gate x output over the 2 experts with the highest biased scores; gates sum to 1 before the scale."""
    ids = jax.lax.top_k(scores + layer.bias[...], 2)[1]
    picked = jnp.exp(jax.nn.log_sigmoid(jnp.take_along_axis(logits, ids, -1)))
    gates = picked / picked.sum(-1, keepdims=True) * jnp.broadcast_to(scale, 4)[ids]
    share = jax.nn.one_hot(ids, 4) * gates[..., None]
    return jnp.einsum("etd,tke->td", feed_forward(layer, x), share) + feed_forward(layer.shared, x)


def normed(x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def by_scores(layer, x, logits, scale=1.0):
    return chosen(layer, x, logits, jax.nn.sigmoid(logits), scale)


GEMMA4 = dict(router_norm="scaled", router_scale=16**-0.5, expert_scale=True)
ROUTERS = {
    "a bias of the logits, gpt-oss": (
        dict(router_bias=True),
        lambda layer, x: by_scores(layer, x, x @ layer.router[...] + layer.router_bias[...]),
    ),
    "a norm of what it reads": (
        dict(router_norm="plain"),
        lambda layer, x: by_scores(layer, x, normed(x) @ layer.router[...]),
    ),
    "a norm with a scale and a factor, a scale of experts, Gemma 4": (
        GEMMA4,
        lambda layer, x: by_scores(
            layer, x, (normed(x) * layer.router_norm[...] / 4) @ layer.router[...], layer.expert_scale[...]
        ),
    ),
    "a selection by logits, Marin": (
        dict(select_by="logits"),
        lambda layer, x: chosen(layer, x, *[x @ layer.router[...]] * 2),
    ),
}


@pytest.mark.parametrize(("keys", "theirs"), ROUTERS.values(), ids=ROUTERS)
def test_a_router_computes_its_equation(keys, theirs):
    layer = filled(lambda: MoE(tiny_config(model=keys).model, nnx.Rngs(0)))
    assert_same(layer, moe_of, theirs)


def test_parameters_of_the_router_are_float32_vectors_that_start_without_effect():
    keys = dict(router_bias=True, param_dtype="bfloat16", compute_dtype="bfloat16", num_zero_experts=2) | GEMMA4
    layer = MoE(tiny_config(model=keys).model, nnx.Rngs(0))
    for name, value, width in (("router_bias", 0, 6), ("router_norm", 1, 16), ("expert_scale", 1, 6)):
        found = getattr(layer, name)
        assert (found.dtype, found.shape) == (jnp.float32, (width,))
        np.testing.assert_array_equal(found[...], value)


def test_biases_and_scales_neither_decay_nor_multiply():
    keys = dict(router_bias=True, expert_bias=True) | GEMMA4
    plain, config = tiny_config(), tiny_config(model=keys)
    dims = jax.tree_util.tree_leaves_with_path(abstract_model(config.model).dims)
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        for path, d in dims
        if not weight_decay(config.optimizer, d)
    }
    assert kept == {"scale", "router_bias", "router_norm", "expert_scale", "gate_bias", "up_bias", "down_bias"}
    few, more = ({p.name: p for p in parts(c)} for c in (plain, config))
    assert more["router"].total - few["router"].total == 2 * (4 + 16 + 4)  # two MoE layers
    assert more["routed experts"].total - few["routed experts"].total == 2 * 4 * (8 + 8 + 16)
    assert more["routed experts"].active - few["routed experts"].active == 2 * 2 * (8 + 8 + 16)
    assert [p.flops for p in few.values()] == [p.flops for p in more.values()]


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
