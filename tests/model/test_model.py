"""The models of the field, each compared with the equations of its paper written in numpy."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import TINY_MODEL, tiny_config
from moe_jax import balance
from moe_jax.config import LongRopeConfig, as_dict, num_moe_layers, validate
from moe_jax.dispatch.capacity import capacity_of
from moe_jax.kernels.head import row_nats, summed_nats
from moe_jax.model.attention import Attention
from moe_jax.model.block import Block, Run, layout
from moe_jax.model.forward import Inputs, Pass, PerLayer
from moe_jax.model.layers import FeedForward, LayerNorm, RMSNorm, make_norm, normal
from moe_jax.model.moe import MoE
from moe_jax.model.rope import rope
from moe_jax.model.transformer import Transformer
from moe_jax.routing import Tokens

SMALL = dict(embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, ffw_dim=12, expert_ffw_dim=6, vocab_size=257)


def model_config(name: str, **overrides):
    """The model of configs/<name>.py, at widths that numpy loops can follow."""
    config = as_dict(validate(importlib.import_module(f"configs.{name}").get_config()))
    return validate(config | {"model": config["model"] | SMALL | overrides}).model


def filled(make, seed=0, scale=0.5):
    """A module with random values in every leaf, float32 and int alike in their dtype; nothing is compiled."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype), state))


def moe_layer(config, bias=0.0):
    """An MoE layer with a router strong enough to decide, and a bias."""
    layer = filled(lambda: MoE(config, nnx.Rngs(0)))
    layer.router[...] = layer.router[...] * 2
    layer.bias[...] = jnp.full(config.num_experts, 0.0) + bias
    return layer


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(graphdef, state, x, key, train):
    tokens = Tokens(mask=jnp.ones(x.shape[0] * x.shape[1], bool))
    fwd = Pass(None, balance.make({}), PerLayer({}), jax.random.key(key), train)  # a layer alone reads no inputs
    return nnx.merge(graphdef, state)(x, tokens, fwd)


def apply(layer, x, train=False, key=0):
    """y and Report of a [B, S, D] batch without padding."""
    graphdef, state = nnx.split(layer)
    return _apply(graphdef, state, x, key, train)


def vectors(batch, seq, width=8):
    return jnp.asarray(np.random.default_rng(3).normal(size=(batch, seq, width)), jnp.float32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def expert(layer, e, u):
    """FFN_e(u) of one token, in float64."""
    gate, up, down = (np.asarray(w[...], np.float64)[e] for w in (layer.gate, layer.up, layer.down))
    return (silu(u @ gate) * (u @ up)) @ down


def shared(layer, u):
    """The shared experts of one token: a SwiGLU each; ours is their concatenation."""
    w = [np.asarray(v[...], np.float64) for v in (layer.shared.gate, layer.shared.up, layer.shared.down)]
    return (silu(u @ w[0]) * (u @ w[1])) @ w[2]


def logits_of(layer, u):
    return u @ np.asarray(layer.router[...], np.float64)


# --- (1) the dense layer ----------------------------------------------------------------------------------------


def test_attention_is_softmax_of_scaled_rotated_products_within_the_segment():
    config = validate(dict(model=SMALL)).model
    layer = filled(lambda: Attention(config, nnx.Rngs(0)), scale=1.0)
    x = vectors(1, 5)
    segments, positions = jnp.array([[1, 1, 2, 2, 2]]), jnp.array([[0, 1, 0, 1, 2]])
    got = layer(x, positions, segments)

    def rotate(v, position):  # pairs (i, i + 2), angle position x 10000^(-i / 2)
        angle = position * 10000.0 ** (-np.arange(2) / 2)
        return np.concatenate(
            [v[:2] * np.cos(angle) - v[2:] * np.sin(angle), v[2:] * np.cos(angle) + v[:2] * np.sin(angle)]
        )

    u = np.asarray(x[0], np.float64)
    q, k, v, o = (np.asarray(w[...], np.float64) for w in (layer.query, layer.key, layer.value, layer.out))
    want = np.zeros((5, 8))
    for t in range(5):
        for h in range(2):
            seen = [j for j in range(t + 1) if segments[0, j] == segments[0, t]]
            query = rotate(u[t] @ q[:, h], int(positions[0, t]))
            keys = [rotate(u[j] @ k[:, 0], int(positions[0, j])) for j in seen]  # one key head serves both
            weight = softmax(np.array([query @ key / 2.0 for key in keys]))  # sqrt(head_dim) = 2
            want[t] += sum(w * (u[j] @ v[:, 0]) for w, j in zip(weight, seen, strict=True)) @ o[h]
    np.testing.assert_allclose(got[0], want, rtol=2e-4, atol=2e-4)


def test_rope_depends_on_differences_of_positions_only():
    x, y = vectors(1, 1).reshape(1, 1, 2, 4), vectors(1, 2)[:, 1:].reshape(1, 1, 2, 4)

    def product(i, j):
        return (rope(x, jnp.array([[i]]), 100.0) * rope(y, jnp.array([[j]]), 100.0)).sum()

    np.testing.assert_allclose(product(5, 3), product(12, 10), rtol=1e-5)
    assert abs(product(5, 3) - product(5, 4)) > 1e-3


def test_rms_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(validate(dict(model=dict(norm_eps=0.0))).model, embed=2)
    np.testing.assert_allclose(norm(jnp.array([[3.0, 4.0]])), [[3 / 12.5**0.5, 4 / 12.5**0.5]], rtol=1e-6)


def test_longrope_turns_every_pair_slower_by_its_own_factor_and_scales_its_length():
    # pairs (0, 2) and (1, 3): the second turns half as fast, as at half of the position
    x, longrope = vectors(1, 1).reshape(1, 1, 2, 4), LongRopeConfig(short_factor=(1.0, 2.0), short_mscale=3.0)
    found = rope(x, jnp.array([[6]]), 100.0, longrope=longrope)
    at_6, at_3 = (rope(x, jnp.array([[place]]), 100.0) for place in (6, 3))
    np.testing.assert_allclose(found[..., ::2], 3 * at_6[..., ::2], rtol=1e-5)
    np.testing.assert_allclose(found[..., 1::2], 3 * at_3[..., 1::2], rtol=1e-5)


def test_layer_norm_divides_what_is_off_the_mean_by_the_deviation():
    # the mean of 1 and 5 is 3, their deviation 2
    norm = make_norm(validate(dict(model=dict(norm="layer", norm_eps=0.0, embed_dim=2))).model)
    assert isinstance(norm, LayerNorm)
    norm.scale[...], norm.shift[...] = jnp.array([10.0, 20.0]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(norm(jnp.array([[1.0, 5.0]])), [[-10.0 + 1, 20.0 + 2]], rtol=1e-6)


def test_all_norms_of_the_residual_stream_are_of_one_kind_and_those_of_heads_are_not():
    config = tiny_config(model=dict(norm="layer", sandwich_norm=True, qk_norm="head", mtp_depth=1)).model
    params = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))), nnx.Param))
    norms = [{path[-2] for path, _ in params if path[-1] == name} for name in ("shift", "scale")]
    assert norms[1] - norms[0] == {"query_norm", "key_norm"}
    assert {"final_norm", "attention_norm", "ffw_norm", "attention_after_norm", "embedding_norm", "norm"} <= norms[0]


def test_swiglu_is_gated_by_silu():
    layer = filled(lambda: FeedForward(validate(dict(model=SMALL)).model, nnx.Rngs(0), "dense", 3))
    u = np.asarray(vectors(1, 1)[0, 0], np.float64)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (layer.gate, layer.up, layer.down))
    np.testing.assert_allclose(layer(vectors(1, 1))[0, 0], (silu(u @ gate) * (u @ up)) @ down, rtol=1e-4, atol=1e-8)


def test_the_dense_config_has_no_experts_and_reports_nothing():
    config = model_config("dense")
    model = filled(lambda: Transformer(config, nnx.Rngs(0)))
    tokens = jnp.ones((1, 4), jnp.int32)
    inputs = Inputs(tokens, jnp.arange(4)[None], tokens)
    logits, report = model(Pass(inputs, balance.make({}), PerLayer({}), jax.random.key(0)))
    assert logits.shape == (1, 4, 257)
    assert logits.dtype == jnp.float32
    assert report is None
    assert num_moe_layers(config) == 0


# --- (2) GShard and Switch --------------------------------------------------------------------------------------


def test_switch_sends_a_token_to_its_top_expert_weighted_by_the_probability_up_to_the_capacity():
    config = model_config("switch")
    layer = moe_layer(config)
    x = vectors(2, 6)
    y, report = apply(layer, x)
    capacity = capacity_of(6, 1, 8, config.capacity_factor)  # ceil(1.25 x 6 x 1 / 8) = 1
    assert capacity == 1
    want, dropped = np.zeros((2, 6, 8)), 0
    for b in range(2):
        used = np.zeros(8, int)
        for t in range(6):
            u = np.asarray(x[b, t], np.float64)
            p = softmax(logits_of(layer, u))
            e = int(p.argmax())
            if used[e] < capacity:
                want[b, t] = p[e] * expert(layer, e, u)
            else:
                dropped += 1
            used[e] += 1
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-5)
    assert int(report.traffic.dropped) == dropped
    assert dropped > 0
    assert int(report.statistics["loads"].sum()) == 12  # counted before dropping


def test_gshard_seats_first_choices_before_second_ones_with_gates_normalised_over_the_two():
    config = model_config("gshard")
    layer = moe_layer(config)
    x = vectors(1, 6)
    y, report = apply(layer, x)  # evaluation: no random dropping of second experts
    capacity = capacity_of(6, 2, 8, config.capacity_factor)  # ceil(1.0 x 6 x 2 / 8) = 2
    assert capacity == 2
    used, want, dropped = np.zeros(8, int), np.zeros((6, 8)), 0
    probabilities = [softmax(logits_of(layer, np.asarray(x[0, t], np.float64))) for t in range(6)]
    for choice in range(2):
        for t, p in enumerate(probabilities):
            order = np.argsort(-p)
            e = order[choice]
            gate = p[e] / (p[order[0]] + p[order[1]])
            if used[e] < capacity:
                want[t] += gate * expert(layer, e, np.asarray(x[0, t], np.float64))
            else:
                dropped += 1
            used[e] += 1
    np.testing.assert_allclose(y[0], want, rtol=2e-4, atol=2e-5)
    assert int(report.traffic.dropped) == dropped


def test_gshard_uses_the_second_expert_at_random_in_training_only():
    layer = moe_layer(model_config("gshard", capacity_factor=8.0))
    x = vectors(2, 32)
    always, report = apply(layer, x, train=False)
    again = apply(layer, x, train=False, key=1)[0]
    sometimes, training_report = apply(layer, x, train=True)
    np.testing.assert_array_equal(always, again)
    lost = (np.asarray(always) != np.asarray(sometimes)).any(-1).mean()
    assert 0.05 < lost < 0.95  # share of the tokens without their second expert
    # a loss counts the choice, before any copy is dropped
    np.testing.assert_array_equal(report.statistics["loads"], training_report.statistics["loads"])


def test_switch_jitters_the_router_in_training_only():
    layer = moe_layer(model_config("switch", router_jitter=0.5, capacity_factor=8.0))
    x = vectors(1, 16)
    quiet = [apply(layer, x, train=False, key=k)[0] for k in range(2)]
    noisy = [apply(layer, x, train=True, key=k)[0] for k in range(2)]
    np.testing.assert_array_equal(quiet[0], quiet[1])
    assert not np.allclose(noisy[0], noisy[1])


# --- (3) DeepSeekMoE --------------------------------------------------------------------------------------------


def test_deepseek_moe_adds_shared_experts_to_softmax_weighted_ones():
    layer = moe_layer(model_config("deepseek_moe"))
    x = vectors(1, 4)
    y, report = apply(layer, x)
    for t in range(4):
        u = np.asarray(x[0, t], np.float64)
        s = softmax(logits_of(layer, u))
        chosen = np.argsort(-s)[:4]
        want = shared(layer, u) + sum(s[e] * expert(layer, e, u) for e in chosen)  # g = s, not normalised
        np.testing.assert_allclose(y[0, t], want, rtol=2e-4, atol=2e-5)
    assert int(report.traffic.dropped) == 0


def test_shared_experts_are_a_sum_of_swiglus():
    config = model_config("deepseek_moe", num_shared_experts=2)
    layer = filled(lambda: MoE(config, nnx.Rngs(0)))
    u = np.asarray(vectors(1, 1)[0, 0], np.float64)
    gate, up, down = (np.asarray(w[...], np.float64) for w in (layer.shared.gate, layer.shared.up, layer.shared.down))
    halves = [(silu(u @ gate[:, i]) * (u @ up[:, i])) @ down[i] for i in (slice(0, 6), slice(6, 12))]
    np.testing.assert_allclose(layer.shared(vectors(1, 1))[0, 0], sum(halves), rtol=1e-4, atol=1e-8)


# --- (4) DeepSeek-V3 --------------------------------------------------------------------------------------------


def test_deepseek_v3_selects_by_biased_sigmoid_in_the_best_groups_and_weights_by_the_unbiased():
    config = model_config("deepseek_v3_mini")
    bias = np.linspace(-1.2, 0.2, 16)  # negative enough that a mask of 0 would pick masked groups
    layer = moe_layer(config, jnp.asarray(bias, jnp.float32))
    x = vectors(1, 8)
    y, _ = apply(layer, x)
    for t in range(8):
        u = np.asarray(x[0, t], np.float64)
        s = sigmoid(logits_of(layer, u))
        biased = (s + bias).reshape(4, 4)  # 4 groups of 4
        rank = np.sort(biased, 1)[:, -2:].sum(1)  # a group counts by its best two
        allowed = np.argsort(-rank)[:2]
        masked = np.full((4, 4), -np.inf)
        masked[allowed] = biased[allowed]
        chosen = np.argsort(-masked.ravel())[:4]
        gates = 2.5 * s[chosen] / s[chosen].sum()
        want = shared(layer, u) + sum(g * expert(layer, e, u) for g, e in zip(gates, chosen, strict=True))
        np.testing.assert_allclose(y[0, t], want, rtol=2e-4, atol=2e-5)


# --- the transformer around them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "want"),
    [
        (dict(num_layers=6, num_experts=0), (Run(("dense",), 6),)),
        (dict(num_layers=6, first_dense=0), (Run(("moe",), 6),)),
        (dict(num_layers=6, first_dense=1), (Run(("dense",), 1), Run(("moe",), 5))),
        (dict(num_layers=6, first_dense=0, moe_every=2), (Run(("dense", "moe"), 3),)),
        (
            dict(num_layers=6, first_dense=1, moe_every=2),
            (Run(("dense",), 1), Run(("dense", "moe"), 2), Run(("dense",), 1)),
        ),
    ],
)
def test_layers_of_a_kind_are_stacked(overrides, want):
    assert layout(validate(dict(model=TINY_MODEL | overrides)).model) == want


@functools.cache
def model_of(config):
    """A jitted forward pass of a model with weights large enough to matter."""
    graphdef, state = nnx.split(filled(lambda: Transformer(config, nnx.Rngs(0)), scale=0.3))
    zeros = jnp.zeros((num_moe_layers(config), config.num_experts))

    @jax.jit
    def run(inputs):
        fwd = Pass(inputs, balance.make({}), PerLayer({"bias": zeros}), jax.random.key(0))
        return nnx.merge(graphdef, state)(fwd)[0]

    return run


def forward(config, inputs):
    """The logits."""
    return model_of(config)(inputs)


def packed_inputs(tokens, segments):
    tokens, segments = jnp.asarray(tokens, jnp.int32), jnp.asarray(segments, jnp.int32)
    starts = [[row.index(s) for s in row] for row in segments.tolist()]
    positions = jnp.arange(tokens.shape[1])[None] - jnp.asarray(starts)
    return Inputs(tokens, positions, segments)


def test_a_packed_document_has_the_logits_it_has_alone():
    config = tiny_config().model
    packed = forward(config, packed_inputs([[7, 8, 9, 1, 2, 3, 4, 0]], [[1, 1, 1, 2, 2, 2, 2, 0]]))
    alone = forward(config, packed_inputs([[1, 2, 3, 4, 0, 0, 0, 0]], [[1, 1, 1, 1, 0, 0, 0, 0]]))
    np.testing.assert_allclose(packed[0, 3:7], alone[0, :4], atol=1e-5)


def test_logits_before_a_token_do_not_depend_on_it():
    config = tiny_config().model
    ones = [[1] * 8]
    a = forward(config, packed_inputs([[5, 6, 7, 8, 9, 10, 11, 12]], ones))
    b = forward(config, packed_inputs([[5, 6, 7, 8, 99, 98, 97, 96]], ones))
    np.testing.assert_allclose(a[0, :4], b[0, :4], atol=1e-5)
    assert np.abs(a[0, 4:] - b[0, 4:]).max() > 1e-2


def test_padding_changes_nothing_for_real_tokens():
    config = tiny_config().model
    a = forward(config, packed_inputs([[5, 6, 7, 8, 0, 0, 0, 0]], [[1, 1, 1, 1, 0, 0, 0, 0]]))
    b = forward(config, packed_inputs([[5, 6, 7, 8, 9, 9, 9, 9]], [[1, 1, 1, 1, 0, 0, 0, 0]]))
    np.testing.assert_allclose(a[0, :4], b[0, :4], atol=1e-6)
    assert np.isfinite(a).all()


def test_tied_embeddings_have_one_matrix():
    config = tiny_config(model=dict(tied_embeddings=True)).model
    assert nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))).head is None
    logits = forward(config, packed_inputs([[5, 6, 7, 8]], [[1, 1, 1, 1]]))
    assert logits.shape == (1, 4, config.vocab_size)


@pytest.mark.parametrize("kernel", ["xla", "auto"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_bias_of_the_head_is_added_to_logits_before_they_are_divided_and_learns_from_the_loss(kernel, tied):
    config = tiny_config(model=dict(head_bias=True, tied_embeddings=tied, logits_scaling=4.0)).model
    model = filled(lambda: Transformer(config, nnx.Rngs(0)))
    x, targets = vectors(2, 6, 16), jnp.arange(12).reshape(2, 6)
    mask = jnp.asarray([[1.0] * 6, [0.5] * 5 + [0.0]])
    head = model.embedding.T if tied else model.head[...]
    logits = model.logits(x)
    np.testing.assert_allclose(logits, (x @ head + model.head_bias[...]) / 4.0, rtol=1e-5, atol=1e-5)
    graphdef, state = nnx.split(model)

    def loss(state, in_blocks):
        model = nnx.merge(graphdef, state)
        if in_blocks:
            longer, weight = model.factors(x)
            return summed_nats(longer, weight, targets, mask, kernel)
        return row_nats(model.logits(x), targets, mask).sum()

    (value, gradient), (expected, wanted) = (jax.value_and_grad(loss)(state, kind) for kind in (True, False))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(wanted["head_bias"][...]).max() > 0.01
    for found, one in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    config = tiny_config(model=dict(qk_norm="head", norm_eps=1e-12)).model
    layer = filled(lambda: Attention(config, nnx.Rngs(0)))
    x, positions = vectors(1, 4, 16), jnp.arange(4)[None]
    segments = jnp.ones((1, 4), jnp.int32)
    before = layer(x, positions, segments)
    layer.query[...] = layer.query[...] * 7.0
    np.testing.assert_allclose(layer(x, positions, segments), before, rtol=1e-4, atol=1e-6)


def test_a_bias_of_values_is_added_to_what_attention_returns():
    # the weights of a mean sum to 1, so that a bias b of every value moves the mean by b, and the output by b . out
    config = tiny_config(model=dict(qkv_bias=True)).model
    layer = filled(lambda: Attention(config, nnx.Rngs(0)))
    x, positions, segments = vectors(1, 4, 16), jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)
    bias = layer.value_bias.reshape(config.num_kv_heads, config.head_dim)
    moved = jnp.einsum("hk,hkd->d", jnp.repeat(bias, config.num_heads // config.num_kv_heads, 0), layer.out[...])
    biased = layer(x, positions, segments)
    layer.value_bias[...] = jnp.zeros_like(layer.value_bias[...])
    np.testing.assert_allclose(biased, layer(x, positions, segments) + moved, rtol=1e-5, atol=1e-6)
    assert np.abs(moved).max() > 0.1


def test_a_head_that_rotates_in_part_does_not_rotate_its_end():
    # heads of 8, of which the first 4 dimensions rotate: with those at 0, positions make no difference
    config = tiny_config(model=dict(partial_rotary_factor=0.5)).model
    layer = filled(lambda: Attention(config, nnx.Rngs(0)))
    x, segments = vectors(1, 4, 16), jnp.ones((1, 4), jnp.int32)
    near, far = jnp.arange(4)[None], 100 * jnp.arange(4)[None]
    assert np.abs(layer(x, near, segments) - layer(x, far, segments)).max() > 0.01
    layer.query[...] = layer.query[...].at[..., :4].set(0.0)
    np.testing.assert_array_equal(layer(x, near, segments), layer(x, far, segments))


def test_a_norm_behind_a_layer_makes_the_block_blind_to_the_scale_of_what_it_returns():
    config = tiny_config(model=dict(norm_after=True, norm_eps=1e-12)).model
    block = filled(lambda: Block(config, nnx.Rngs(0), "dense"))
    x, ones = vectors(1, 4, 16), jnp.ones((1, 4), jnp.int32)
    fwd = Pass(Inputs(ones, jnp.arange(4)[None], ones), balance.make({}), PerLayer({}), jax.random.key(0))
    before = block(x, None, fwd)[0]
    block.attention.out[...] = block.attention.out[...] * 7.0
    block.ffw.down[...] = block.ffw.down[...] * 7.0
    np.testing.assert_allclose(block(x, None, fwd)[0], before, rtol=1e-4, atol=1e-5)
    block.attention_norm.scale[...] = block.attention_norm.scale[...] * 7.0
    assert np.abs(block(x, None, fwd)[0] - before).max() > 0.1
    # no norm in front: without attention, what SwiGLU adds depends on the scale of what it reads
    block.attention_norm.scale[...] = block.attention_norm.scale[...] * 0.0
    assert np.abs((block(7 * x, None, fwd)[0] - 7 * x) - (block(x, None, fwd)[0] - x)).max() > 0.1


def test_factors_of_a_model_scale_what_they_are_named_after():
    # a model without layers' contributions returns its embedding; factors of 2 double it before the norm, where it
    # makes no difference, and logits are divided
    config = tiny_config(model=dict(residual_multiplier=0.0, tied_embeddings=True, norm_eps=1e-12)).model
    inputs = packed_inputs([[5, 6, 7, 8]], [[1, 1, 1, 1]])
    plain = forward(config, inputs)
    scaled = forward(dataclasses.replace(config, embedding_multiplier=2.0, logits_scaling=4.0), inputs)
    np.testing.assert_allclose(scaled, plain / 4.0, rtol=1e-5, atol=1e-7)
    # queries times 3 are as attention times 3, of heads of 8
    config = tiny_config().model
    x, positions, segments = vectors(1, 4, 16), jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32)
    layer = filled(lambda: Attention(config, nnx.Rngs(0)))
    tripled = filled(lambda: Attention(dataclasses.replace(config, attention_multiplier=3 / 8**0.5), nnx.Rngs(0)))
    layer.query[...] = 3.0 * layer.query[...]
    np.testing.assert_allclose(tripled(x, positions, segments), layer(x, positions, segments), rtol=1e-5, atol=1e-6)


def test_the_gate_of_shared_experts_is_a_sigmoid_of_the_token():
    # weights that give every token a logit of log 3 let 3/4 of the shared experts' output through; none at all, 1/2
    config = tiny_config(model=dict(shared_gate=True, shared_ffw_dim=12, num_shared_experts=2)).model
    layer, x = moe_layer(config), vectors(1, 4, 16).at[..., 0].set(1.0)
    assert layer.shared.gate.shape == (16, 2 * 12)
    outputs = {}
    for through, logit in ((0.75, np.log(3.0)), (0.5, 0.0), (0.0, -1e9)):
        layer.shared_gate[...] = jnp.zeros((16, 1)).at[0].set(logit)
        outputs[through] = apply(layer, x)[0]
    shared = np.asarray(layer.shared(x))
    assert np.abs(shared).max() > 0.1
    for through, y in outputs.items():
        np.testing.assert_allclose(y, outputs[0.0] + through * shared, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_loads_and_bias_stay_float32_and_int32(dtype):
    config = tiny_config(model=dict(compute_dtype=dtype, param_dtype=dtype)).model
    layer = filled(lambda: MoE(config, nnx.Rngs(0)))
    assert layer.router.dtype == jnp.float32
    assert layer.bias.dtype == jnp.float32
    assert layer.gate.dtype == jnp.dtype(dtype)
    x = vectors(1, 4, 16).astype(dtype)
    y, report = apply(layer, x)
    assert y.dtype == jnp.dtype(dtype)
    assert report.statistics["loads"].dtype == jnp.int32
    assert report.aux_loss.dtype == jnp.float32
    routing = layer.routing(x[0], Tokens(), Pass(None, balance.make({}), PerLayer({}), jax.random.key(0)))
    assert routing.logits.dtype == routing.scores.dtype == routing.gates.dtype == jnp.float32


def test_weights_are_drawn_with_the_configured_deviation():
    config = validate(dict(model=dict(embed_dim=64, vocab_size=300, init_std=0.006))).model
    weights = np.asarray(normal(config, nnx.Rngs(0), "embedding", vocab=300, embed=64)[...])
    assert abs(weights.std() - 0.006) < 2e-4  # 19200 draws: the deviation is known to half a percent
    assert abs(weights.mean()) < 2e-4
