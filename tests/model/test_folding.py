"""The multipliers of scaling: decoding has them, and weights with them multiplied in compute the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.config import ScalingConfig
from moe_jax.huggingface import LanguageModel, load_hf, save_hf
from moe_jax.model.abstract import abstract_model
from moe_jax.model.folding import folded
from moe_jax.model.forward import Pass, PerLayer, next_inputs
from moe_jax.runtime.leaves import path_name

SCALING = dict(base_width=4, base_depth=1, base_head_dim=2)
BIASES = dict(qkv_bias=True, out_bias=True, expert_bias=True, tied_embeddings=True)
LATENT = dict(attention="mla", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
MODELS = {
    "biases, tied": BIASES,
    "sandwich, norms of heads": dict(sandwich_norm=True, qk_norm="head", num_zero_experts=2),
    "norms behind, factors": dict(norm_after=True, qk_norm="projection", residual_multiplier=0.5, logits_scaling=2.0),
    "mla, mtp, latent experts": LATENT | dict(q_lora_rank=8, mtp_depth=1, latent_dim=8),
    "mla, direct queries": LATENT,
}


def drawn(config):
    """Parameters and bias, with no value at which a factor has no effect."""
    abstract, draw = abstract_model(config), np.random.default_rng(0)

    def leaf(path, a):
        return jnp.asarray(draw.normal(float("norm" in jax.tree_util.keystr(path)), 0.3, a.shape), a.dtype)

    return jax.tree_util.tree_map_with_path(leaf, (abstract.params, abstract.bias))


def reader(params, bias):
    values = {path_name(p): a for p, a in jax.tree_util.tree_leaves_with_path({"params": params, "bias": bias})}
    return lambda leaf, index: np.asarray(values[leaf][index])


def folded_model(config, params, bias):
    plain, read = folded(config, reader(params, bias))
    tree = {"params": params, "bias": bias}
    tree = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(read(path_name(path), ())), tree)
    return LanguageModel(plain, tree["params"], tree["bias"])


@pytest.mark.parametrize("name", MODELS)
def test_folded_weights_compute_the_same_logits_without_scaling(name):
    config = tiny_config(model=MODELS[name] | dict(scaling=SCALING)).model
    params, bias = drawn(config)
    model, plain = LanguageModel(config, params, bias), folded_model(config, params, bias)
    assert plain.config == tiny_config(model=MODELS[name]).model
    logits = model(TOKENS)
    np.testing.assert_allclose(plain(TOKENS), logits, atol=2e-5)
    unscaled = LanguageModel(plain.config, params, bias)
    assert np.abs(unscaled(TOKENS) - logits).max() > 0.1  # so the factors matter
    if config.mtp_depth:
        np.testing.assert_allclose(plain.ahead(TOKENS), model.ahead(TOKENS), atol=2e-5)


def test_without_scaling_every_bit_is_read_as_it_is():
    config = tiny_config().model
    params, bias = drawn(config)
    read = reader(params, bias)
    assert folded(config, read) == (config, read)


def test_an_exported_folder_computes_the_same_logits(tmp_path):
    model = LATENT | dict(qk_nope_head_dim=8, v_head_dim=8, mtp_depth=1, scaling=SCALING)
    config = tiny_config(model=model).model
    ours = LanguageModel(config, *drawn(config))
    save_hf(ours, tmp_path / "hf", architecture="DeepseekV3ForCausalLM")
    theirs = load_hf(tmp_path / "hf")
    assert theirs.config.scaling == ScalingConfig()
    np.testing.assert_allclose(theirs(TOKENS), ours(TOKENS), atol=2e-5)
    np.testing.assert_allclose(theirs.ahead(TOKENS), ours.ahead(TOKENS), atol=2e-5)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            dict(tied_embeddings=True, mtp_depth=1),
            r"base_width=4 divides logits, .*tied_embeddings=True and .*exported",
        ),
        (dict(num_zero_experts=2), r"base_depth=1 multiplies .*num_zero_experts=2.*cannot be exported"),
    ],
)
def test_a_factor_that_no_weight_can_take_is_refused(model, words):
    config = tiny_config(model=model | dict(scaling=SCALING)).model
    with pytest.raises(ValueError, match=words):
        folded(config, reader({}, {}))
    without = dataclasses.replace(config, scaling=ScalingConfig())
    assert folded(without, reader({}, {}))[0] == without


def test_decoding_has_the_logits_of_the_whole_sequence():
    config = tiny_config(model=dict(scaling=SCALING)).model
    params, bias = drawn(config)
    model = nnx.merge(abstract_model(config).graphdef, params, bias)
    whole = LanguageModel(config, params, bias)(TOKENS)
    fwd = Pass(next_inputs(TOKENS, TOKENS), balance.make({}, config), PerLayer({}), jax.random.key(0))
    cache = model.init_cache(*TOKENS.shape)
    extend = jax.jit(lambda inputs, cache: model.extend(fwd._replace(inputs=inputs), cache))
    for first in range(0, 12, 6):
        positions = jnp.broadcast_to(jnp.arange(first, first + 6, dtype=jnp.int32), (2, 6))
        logits, _, cache = extend(next_inputs(TOKENS[:, first : first + 6], positions), cache)
        np.testing.assert_allclose(logits, whole[:, first : first + 6], atol=1e-4)
