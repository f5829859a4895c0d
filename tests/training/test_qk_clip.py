"""QK-clip: the largest logit of every head, and the weights of those that exceed the threshold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import assert_same_bits, mesh_sizes, tiny_config
from moe_jax import balance
from moe_jax.config import resolve
from moe_jax.data import open_corpus, training_batches
from moe_jax.kernels import max_logits
from moe_jax.kernels.attention import visibility
from moe_jax.kernels.max_logits import largest_logits
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model.attention import make_attention
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.model.rope import rope
from moe_jax.model.shrinking import shrink_logits
from moe_jax.training.losses import model_summed_nats
from moe_jax.training.qk_clip import clipped
from moe_jax.training.state import init_state, step_key
from moe_jax.training.step import accumulate, advance, train_step

MLA = dict(attention="mla", kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MODELS = {
    "a key for each head": dict(num_heads=4, num_kv_heads=4, qkv_bias=True),
    "a key for two heads": dict(num_heads=4, num_kv_heads=2, qkv_bias=True, partial_rotary_factor=0.5),
    "a key for all": dict(num_heads=4, num_kv_heads=1),
    "latent": dict(num_heads=4) | MLA,
    "latent queries too": dict(num_heads=4, q_lora_rank=8) | MLA,
}
SEGMENTS = jnp.array([[1] * 7 + [2] * 6 + [0] * 3, [1] * 16], jnp.int32)


def visible(segments, window=0):
    """bool [B, S, S]: whether a query sees a key, and is no padding."""
    return np.asarray(visibility(segments, window)[:, 0] & (segments > 0)[:, :, None])


def dense_logits(query, key, scale):
    """[B, H, S, S], from [B, S, H, K] and [B, S, G, K]."""
    key = np.repeat(np.asarray(key, np.float64), query.shape[2] // key.shape[2], 2)
    return scale * np.einsum("bqhk,bshk->bhqs", np.asarray(query, np.float64), key)


def largest_of(logits, seen):
    return np.where(seen[:, None], logits, -np.inf).max((0, 2, 3))


# --- the largest logit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_the_largest_over_the_keys_that_a_query_sees(kv_heads, window, monkeypatch):
    monkeypatch.setattr(max_logits, "BLOCK", 6)  # 16 tokens are 3 blocks, of which the last has padding
    draw = np.random.default_rng(kv_heads)
    query, key = (jnp.asarray(draw.normal(size=(2, 16, heads, 8)), jnp.float32) for heads in (4, kv_heads))
    found = largest_logits(query, key, SEGMENTS, 0.5, window)
    want = largest_of(dense_logits(query, key, 0.5), visible(SEGMENTS, window))
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_blocks_that_no_query_sees_are_left_out():
    assert max_logits._visible_blocks(4, 8, 0).tolist() == [[q, k] for q in range(4) for k in range(q + 1)]
    # the first query of block 3, at 24, sees 17 to 24 of a window of 8: blocks 2 and 3
    assert max_logits._visible_blocks(4, 8, 8).tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    assert max_logits._visible_blocks(3, 8, 1).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_nothing_is_differentiated_and_padding_has_none():
    query = jnp.ones((2, 16, 4, 8))
    assert not jax.grad(lambda q: largest_logits(q, q, SEGMENTS, 1.0).sum())(query).any()
    assert (largest_logits(query, query, jnp.zeros_like(SEGMENTS), 1.0) == -jnp.inf).all()


# --- the weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_above_the_threshold_has_it_as_its_largest_logit_and_the_others_keep_theirs(kind):
    config = tiny_config(model=MODELS[kind]).model
    layer = make_attention(config, nnx.Rngs(0))
    draw = np.random.default_rng(0)
    for param in jax.tree.leaves(nnx.state(layer, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        param[...] = param[...] + jnp.asarray(draw.normal(size=param.shape, scale=0.5), jnp.float32)
    x = jnp.asarray(draw.normal(size=(2, 16, config.embed_dim)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
    observed = functools.partial(layer.observed, x, positions, SEGMENTS, max_logits=True)
    y, before = observed()
    np.testing.assert_array_equal(y, layer(x, positions, SEGMENTS))
    np.testing.assert_allclose(before, largest_of(logits_of(layer, x, positions), visible(SEGMENTS)), rtol=1e-5)
    threshold = float(np.sort(before)[1:3].mean())  # two heads are above it
    shrink_logits(layer, jnp.minimum(1.0, threshold / before))
    np.testing.assert_allclose(observed()[1], np.minimum(before, threshold), rtol=1e-5)


def logits_of(layer, x, positions):
    """The logits of a layer [B, H, S, S], from its weights and the definition of its kind of attention."""
    c = layer.config
    if c.attention == "gqa":
        query, key = (jnp.einsum("bsd,dhk->bshk", x, w[...]) for w in (layer.query, layer.key))
        if c.qkv_bias:
            query, key = query + layer.query_bias.reshape(-1, c.head_dim), key + layer.key_bias.reshape(-1, c.head_dim)
        width = int(c.head_dim * c.partial_rotary_factor)
        turned = (rope(a[..., :width], positions, c.rope_theta, c.yarn) for a in (query, key))
        query, key = (jnp.concatenate([t, a[..., width:]], -1) for t, a in zip(turned, (query, key), strict=True))
        return dense_logits(query, key, c.head_dim**-0.5)
    latent = x if layer.query_up is None else layer.query_latent_norm(x @ layer.query_down[...])
    query = jnp.einsum("bsd,dhk->bshk", latent, (layer.query if layer.query_up is None else layer.query_up)[...])
    nope, rotated = query[..., : c.qk_nope_head_dim], query[..., c.qk_nope_head_dim :]
    key = jnp.einsum("bsr,rhk->bshk", layer.latent_norm(x @ layer.latent_down[...]), layer.key_up[...])
    shared = rope((x @ layer.key_rope[...])[:, :, None], positions, c.rope_theta, c.yarn)
    rotated = rope(rotated, positions, c.rope_theta, c.yarn)
    scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    return dense_logits(nope, key, scale) + dense_logits(rotated, shared, scale)


# --- the whole step -------------------------------------------------------------------------------------------

TAU = 0.6  # above the logits of some heads and below those of others, at initial weights


def config_of(mesh=(1, 1, 1, 1), sequence=1, **overrides):
    model = dict(num_layers=3, num_heads=4, num_kv_heads=2, mtp_depth=1, window=6, window_pattern="LG", init_std=0.1)
    settings = dict(optimizer=dict(qk_clip=TAU), model=model, mesh=mesh_sizes(mesh) | dict(sequence=sequence))
    return resolve(tiny_config(**(settings | overrides)), len(jax.devices()), "cpu")


def stepped(config):
    """The state before and after a step, its metrics, its sums and its gradient."""
    mesh = make_mesh(config.mesh)
    batch = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)(0)
    batch = jax.device_put(batch, batch_sharding(mesh))
    state = init_state(config, mesh)
    key = step_key(config)

    def both(state, batch):  # in one program, whose forward and backward pass is that of the step
        return train_step(config, state, batch, key, mesh=mesh), accumulate(
            config, state, batch, jax.random.fold_in(key, 0), mesh
        )

    return state, *jax.device_get(jax.jit(both)(state, batch))


@functools.cache
def plain():
    return stepped(config_of())


def test_a_step_clips_every_layer_after_its_update():
    state, (after, values), (sums, grads) = plain()
    tops = sums.max_logits
    assert [[top.shape for top in unit] for unit in tops.stacks] == [[(1, 4)], [(2, 4)]]
    assert tops.ahead.shape == (1, 4)
    every = np.concatenate([top.ravel() for top in jax.tree.leaves(tops)])
    assert values["max_logit"] == every.max()
    assert 0 < (every > TAU).sum() < every.size
    update = jax.jit(functools.partial(advance, config_of()))
    free = update(state, grads, sums.statistics, jnp.float32(values["learning_rate"]), jax.random.key(0))
    want = clipped(config_of(), free.params, free.bias, tops)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.params, want)
    clipped_or_not = zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(free.params), strict=True)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/") for (path, a), b in clipped_or_not if (a != b).any()
    }
    assert changed == {f"{where}/attention/query" for where in ("mtp/block", "stacks/0/blocks/0", "stacks/1/blocks/0")}


def test_devices_with_parts_of_the_batch_the_heads_and_the_sequences_find_the_same():
    config = config_of(mesh=(1, 2, 1, 2), sequence=2)
    mesh = make_mesh(config.mesh)
    batch = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)(0)
    balancer = balance.make(config.balance, config.model)

    def forward(state, batch):
        fwd = Pass(inputs_of(batch), balancer, PerLayer(state.balance), jax.random.key(0), mesh=mesh, max_logits=True)
        return model_summed_nats(config, state.params, state.bias, fwd, batch)[3]

    found = jax.jit(forward)(init_state(config, mesh), jax.device_put(batch, batch_sharding(mesh)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, plain()[2][0].max_logits)


def test_of_two_micro_batches_the_larger_logit_counts_and_all_else_is_summed():
    sums = plain()[2][0]
    less = sums._replace(max_logits=jax.tree.map(lambda a: a - 1.0, sums.max_logits))
    for total in (sums.plus(less), less.plus(sums)):
        assert_same_bits(jax.device_get(total.max_logits), sums.max_logits)
        assert (total.nats, total.total_loss) == (2 * sums.nats, 2 * sums.total_loss)


@pytest.mark.slow
def test_micro_batches_and_a_mesh_change_nothing():
    _, (after, values), (sums, _) = stepped(config_of(mesh=(1, 2, 1, 2), sequence=2, micro_batches=2))
    _, (want, whole), (same, _) = plain()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, (sums.max_logits, after.params), (same.max_logits, want.params))
    close(values["max_logit"], whole["max_logit"])


def test_a_head_without_a_logit_above_it_keeps_its_bits():
    config = config_of(optimizer=dict(qk_clip=1e6))
    state, _, (sums, _) = plain()
    tops = sums.max_logits
    assert_same_bits(jax.device_get(clipped(config, state.params, state.bias, tops)), jax.device_get(state.params))
    nothing = jax.tree.map(lambda a: np.full_like(a, -np.inf), tops)  # a batch of padding
    assert_same_bits(
        jax.device_get(clipped(config_of(), state.params, state.bias, nothing)), jax.device_get(state.params)
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(model=dict(qk_norm="head")), r"optimizer\.qk_clip=100\.0 .* model\.qk_norm='head' makes logits"),
        (
            dict(optimizer=dict(qk_clip=100.0, groups=dict(attention=dict(frozen=True)))),
            r"attention\.frozen=True leaves",
        ),
    ],
    ids=str,
)
def test_where_it_could_do_nothing_it_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**(dict(optimizer=dict(qk_clip=100.0)) | overrides))
