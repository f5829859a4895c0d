"""Decoding with a cache gives what the forward pass on the whole sequence gives."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.config import MeshConfig
from moe_jax.mesh import make_mesh
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Inputs, Pass, PerLayer, next_inputs
from moe_jax.training.state import init_state, state_shardings, write_bias

LENGTHS = (9, 5, 1)  # of the three prompts
PROMPT, TOTAL = 9, 14
GQA = dict(qk_norm="head", qkv_bias=True, partial_rotary_factor=0.5)
MLA = dict(
    attention="mla", q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, num_groups=2
)
YARN = dict(factor=4.0, original_length=8, mscale=0.7, mscale_all_dim=0.4)
KINDS = dict(window=4, window_pattern="LG", local_rope=dict(theta=100.0, partial_rotary_factor=0.25))
KINDS |= dict(attention_sinks=True, attention_gate="element", gate_activation="softplus", sandwich_norm=True)
MODELS = {
    "gqa": GQA | KINDS,
    "gqa, mtp": GQA | dict(mtp_depth=2, qk_norm="projection"),
    "gqa, dense": dict(num_experts=0, first_dense=0, num_shared_experts=0),
    "mla": MLA | dict(top_groups=1, group_top=1, yarn=YARN),
    "mla, mtp": MLA
    | dict(
        window=4, window_pattern="GL", mtp_depth=1, q_lora_rank=0, num_groups=1, expert_bias=True, expert_scale=True
    ),
    "a method that drops": dict(dispatch="capacity", capacity_factor=0.5, gate_on="input", router_norm="plain"),
}


@functools.cache
def state_of(name):
    """Config and state, with a bias far from zero."""
    model = MODELS[name] | dict(init_std=0.2)
    config = tiny_config(model=model, balance={} if "dense" in name else dict(bias_sign={}))
    state = init_state(config)
    if state.balance or config.model.num_experts:
        layers = 2 + config.model.mtp_depth
        state = state._replace(
            bias=write_bias(state.bias, jnp.linspace(-0.7, 0.9, layers * 4).reshape(layers, 4)[::-1])
        )
    return config, state


@functools.cache
def built(name):
    """Config, model, and a function from inputs to the pass through them."""
    config, state = state_of(name)
    module = nnx.merge(abstract_model(config.model).graphdef, state.params, state.bias)
    balancer = balance.make(config.balance, config.model)

    def passing(inputs, mesh=None) -> Pass:
        return Pass(inputs, balancer, PerLayer(state.balance), jax.random.key(0), mesh=mesh)

    return config, module, passing


def whole(name, tokens):
    """Logits and chosen experts by the forward pass, nothing dropped."""
    config, module, passing = built(name)
    if config.model.dispatch == "capacity":
        model = replace(config.model, dispatch="auto")
        module = nnx.merge(abstract_model(model).graphdef, *nnx.split(module, nnx.Param, ...)[1:])
    positions = jnp.broadcast_to(jnp.arange(TOTAL), tokens.shape)
    logits, report = module(passing(Inputs(tokens, positions, jnp.ones_like(tokens))))
    return logits, None if report is None else report.details.routing.expert_ids


def ragged(tokens):
    """The prompts, right-padded with position -1, then one token a row and call at each row's own position."""
    start = jnp.array(LENGTHS)[:, None]
    places = jnp.arange(PROMPT)
    yield tokens[:, :PROMPT], jnp.where(places < start, places, -1)
    for done in range(TOTAL - PROMPT):
        at = start + done
        yield jnp.take_along_axis(tokens, at, 1), at


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_of_ragged_prompts_is_the_full_forward_pass(name):
    _, module, passing = built(name)
    tokens = jax.random.randint(jax.random.key(1), (3, TOTAL), 0, 256)
    logits, chosen = whole(name, tokens)
    extend = jax.jit(lambda new, positions, cache: module.extend(passing(next_inputs(new, positions)), cache))
    cache = module.init_cache(3, TOTAL)
    for new, positions in ragged(tokens):
        found, report, cache = extend(new, positions, cache)
        rows, places = np.nonzero(np.asarray(positions) >= 0)
        at = np.asarray(positions)[rows, places]
        np.testing.assert_allclose(found[rows, places], logits[rows, at], atol=1e-4)
        if chosen is not None:
            layers = report.details.routing.expert_ids.reshape(2, 3, new.shape[1], -1)
            everywhere = chosen[:2].reshape(2, 3, TOTAL, -1)
            np.testing.assert_array_equal(layers[:, rows, places], everywhere[:, rows, at])


def test_padding_is_routed_nowhere_and_leaves_the_cache_as_it_was():
    _, module, passing = built("mla")
    tokens, nowhere = jnp.full((3, 4), 7), jnp.full((3, 4), -1)
    before = module.init_cache(3, TOTAL)
    _, report, after = module.extend(passing(next_inputs(tokens, nowhere)), before)
    assert report.statistics["loads"].sum() == 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_cache_of_latent_attention_holds_the_latent_and_one_rotated_key():
    _, module, _ = built("mla")
    widths = {leaf.shape[-2:] for leaf in jax.tree.leaves(module.init_cache(3, TOTAL))}
    assert widths == {(1, MLA["kv_lora_rank"]), (1, MLA["qk_rope_head_dim"])}


@pytest.mark.parametrize(
    "sizes", [dict(expert=2, tensor=2), pytest.param(dict(sequence=2, tensor=2), marks=pytest.mark.slow)], ids=str
)
def test_decoding_on_a_mesh_is_decoding_on_one_device(sizes):
    config, module, passing = built("mla")
    tokens, positions = jax.random.randint(jax.random.key(2), (4, 6), 0, 256), jnp.tile(jnp.arange(6), (4, 1))
    mesh = make_mesh(MeshConfig(data=2, **sizes))
    places = state_shardings(config, mesh)
    weights = jax.device_put((state_of("mla")[1].params, state_of("mla")[1].bias), (places.params, places.bias))
    there = nnx.merge(abstract_model(config.model).graphdef, *weights)
    results = []
    for model, devices in ((module, None), (there, mesh)):
        extend = jax.jit(lambda *new, cache, m=model, d=devices: m.extend(passing(next_inputs(*new), d), cache))
        *_, cache = extend(tokens[:, :5], positions[:, :5], cache=model.init_cache(4, 6))
        results.append(extend(tokens[:, 5:], positions[:, 5:], cache=cache)[0])
    np.testing.assert_allclose(*results, atol=1e-5)
