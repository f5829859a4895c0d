"""The weights of the heads whose logits are shrunk, in every kind of attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax.model.attention import make_attention
from moe_jax.model.rope import rope
from moe_jax.model.shrinking import shrink_logits

MLA = dict(attention="mla", kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
MODELS = {
    "a key for each head": dict(num_heads=4, num_kv_heads=4, qkv_bias=True),
    "a key for two heads": dict(num_heads=4, num_kv_heads=2, qkv_bias=True, partial_rotary_factor=0.5),
    "a key for all": dict(num_heads=4, num_kv_heads=1),
    "latent": dict(num_heads=4) | MLA,
    "latent queries too": dict(num_heads=4, q_lora_rank=8) | MLA,
}
LENGTH = 16


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_above_the_threshold_has_it_as_its_largest_logit_and_the_others_keep_theirs(kind):
    config = tiny_config(model=MODELS[kind]).model
    layer = make_attention(config, nnx.Rngs(0))
    draw = np.random.default_rng(0)
    for param in jax.tree.leaves(nnx.state(layer, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        param[...] = param[...] + jnp.asarray(draw.normal(size=param.shape, scale=0.5), jnp.float32)
    x = jnp.asarray(draw.normal(size=(2, LENGTH, config.embed_dim)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    one_document = jnp.ones_like(positions)
    observed = functools.partial(layer.observed, x, positions, one_document, max_logits=True)
    y, before = observed()
    np.testing.assert_array_equal(y, layer(x, positions, one_document))
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    want = np.where(seen, logits_of(layer, x, positions), -np.inf).max((0, 2, 3))
    np.testing.assert_allclose(before, want, rtol=1e-5)
    threshold = float(np.sort(before)[1:3].mean())  # two heads are above it
    shrink_logits(layer, jnp.minimum(1.0, threshold / before))
    np.testing.assert_allclose(observed()[1], np.minimum(before, threshold), rtol=1e-5)


def dense_logits(query, key, scale):
    """[B, H, S, S], from [B, S, H, K] and [B, S, G, K]."""
    key = np.repeat(np.asarray(key, np.float64), query.shape[2] // key.shape[2], 2)
    return scale * np.einsum("bqhk,bshk->bhqs", np.asarray(query, np.float64), key)


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
