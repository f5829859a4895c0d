"""Groups of parameters by part of the model, and each optimizer through the whole train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_same_bits, mesh_sizes, tiny_config
from moe_jax.config import parts, resolve
from moe_jax.data import open_corpus, training_batches
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model.abstract import abstract_model
from moe_jax.runtime import checkpoint
from moe_jax.training.compile import make_train_step
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state, init_state, read_bias, step_key

GROUPS = dict(
    attention=dict(frozen=True),
    router=dict(frozen=True),
    experts=dict(learning_rate=2.0, weight_decay=3.0),
)
MUON = dict(method="muon", muon=dict(iterations=2), moment_dtype="bfloat16")
OPTIMIZER = MUON | dict(learning_rate=1e-2, groups=GROUPS, rounding="stochastic")


def config_of(mesh=(1, 1, 1, 1), **overrides):
    settings = dict(
        balance=dict(bias_sign=dict(rate=1e-2)),
        optimizer=OPTIMIZER,
        model=dict(num_kv_heads=2, num_layers=1, first_dense=0),
        mesh=mesh_sizes(mesh),
    )
    return resolve(tiny_config(**(settings | overrides)), len(jax.devices()), "cpu")


def stepped(config, state, first=0):
    """The state after one more step."""
    mesh = make_mesh(config.mesh)
    batch_at = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)
    batch = jax.device_put(batch_at(first), batch_sharding(mesh))
    state, _ = make_train_step(config, mesh)(jax.tree.map(jnp.copy, state), batch, step_key(config))
    return jax.device_get(state)


@functools.cache
def initial():
    return jax.device_get(init_state(config_of(), make_mesh(config_of().mesh)))


@functools.cache
def plain():
    return stepped(config_of(), initial())


def by_part(config, tree):
    """part -> the leaves of a tree like the parameters."""
    found = {}
    for dims, leaf in zip(*map(jax.tree.leaves, (abstract_model(config.model).dims, tree)), strict=True):
        found.setdefault(dims.part, []).append(np.asarray(leaf))
    return found


# --- parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        dict(),
        dict(num_experts=0, tied_embeddings=True),
        dict(first_dense=0, num_shared_experts=0, mtp_depth=1),
        dict(attention="mla", q_lora_rank=8, latent_dim=8, shared_gate=True),
        dict(qkv_bias=True, qk_norm="head", moe_every=2),
    ],
    ids=str,
)
def test_the_parts_that_the_rules_know_are_those_of_the_parameters(model):
    config = tiny_config(model=model)
    assert set(by_part(config, abstract_state(config).params)) == set(parts(config.model))


# --- groups ---------------------------------------------------------------------------------------------------


def test_frozen_parts_keep_their_values_and_have_no_moments_but_the_bias_of_a_frozen_router_moves():
    before, after = (by_part(config_of(), state.params) for state in (initial(), plain()))
    moved = {part for part in before if any((a != b).any() for a, b in zip(before[part], after[part], strict=True))}
    assert moved == set(before) - {"attention", "router"}
    assert (read_bias(initial().bias) != read_bias(plain().bias)).any()
    trained = sum(a.size for part, leaves in before.items() for a in leaves if part in moved)
    adam = sum(a.size for part in ("embedding", "head", "norms") for a in before[part])
    moments = sum(a.size for a in jax.tree.leaves(plain().optimizer) if a.ndim)
    assert moments == trained + adam  # Adam has two, Muon has one


def test_a_factor_scales_a_part_s_update_and_decay_and_nothing_else():
    plain_config = tiny_config(optimizer=dict(weight_decay=0.25, clip_norm=0.0))
    groups = dict(router=dict(learning_rate=0.5), experts=dict(learning_rate=2.0, weight_decay=4.0))
    config = tiny_config(optimizer=dict(weight_decay=0.25, clip_norm=0.0, groups=groups))
    dims = abstract_model(config.model).dims
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract_state(config).params)

    def update(config, gradient):
        optimizer = make_optimizer(config.optimizer, dims)
        gradients = jax.tree.map(lambda a: jnp.full(a.shape, gradient), params)
        return by_part(config, jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0])

    without, decays = update(plain_config, 1.0), update(plain_config, 0.0)
    grouped = update(config, 1.0)
    for part, leaves in grouped.items():
        factor = groups.get(part, {}).get("learning_rate", 1.0)
        more = groups.get(part, {}).get("weight_decay", 1.0) - 1.0
        for ours, theirs, decay in zip(leaves, without[part], decays[part], strict=True):
            np.testing.assert_allclose(ours, factor * (theirs + more * decay), rtol=1e-6)
    assert grouped["experts"][0].max() == pytest.approx(2.0 * (1.0 + 4.0 * 0.25), rel=1e-4)


def test_gradients_of_frozen_parts_are_never_computed():
    def products(optimizer):
        config = config_of(optimizer=optimizer, model=dict(num_kv_heads=2, num_layers=1, first_dense=0))
        state = abstract_state(config)
        batch = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)(0)
        cost = make_train_step(config).lower(state, batch, step_key(config)).cost_analysis()
        return cost["flops"]

    frozen = dict(groups={part: dict(frozen=True) for part in ("embedding", "head", "attention", "experts", "shared")})
    assert products(frozen) < 0.8 * products({})


# --- the whole step -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_micro_batches_remat_and_a_mesh_together_change_nothing():
    config = config_of(
        (1, 2, 2, 2), micro_batches=2, model=dict(num_kv_heads=2, num_layers=1, first_dense=0, remat="full")
    )
    state = stepped(config, init_state(config, make_mesh(config.mesh)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4), state.params, plain().params)
    np.testing.assert_array_equal(read_bias(state.bias), read_bias(plain().bias))


def test_a_checkpoint_has_the_whole_state_and_the_resumed_run_is_the_same(tmp_path):
    config = config_of()
    saver = checkpoint.Checkpointer(tmp_path, 1)
    saver.save(1, jax.tree.map(jnp.asarray, plain()), {})
    saver.close()
    restored, _ = checkpoint.restore(tmp_path, abstract_state(config, make_mesh(config.mesh)))
    assert_same_bits(jax.device_get(restored), plain())
    after = (stepped(config, state, first=1) for state in (restored, plain()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), *(s.params for s in after))


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (dict(groups=dict(mtp=dict(frozen=True))), r"groups\.mtp is set, but the model has no such part \(only emb"),
        (
            dict(groups=dict(router=dict(frozen=True, learning_rate=0.5))),
            r"router\.frozen=True leaves nothing to .*=0\.5",
        ),
        (dict(groups=dict(norms=dict(weight_decay=0.0))), r"norms\.weight_decay=0\.0 must be 1\.0"),
        (dict(weight_decay=0.0, groups=dict(head=dict(weight_decay=2.0))), r"head\.weight_decay=2\.0 is a factor of"),
        (dict(groups={p: dict(frozen=True) for p in parts(tiny_config().model)}), "freezes all parts of the model"),
        (dict(muon=dict(iterations=6)), r"optimizer\.muon is set, but optimizer\.method='adamw' does not use it"),
        (dict(method="muon", muon=dict(parts=("norms",))), r"muon\.parts=\('norms',\) must be different parts"),
        (dict(method="muon", muon=dict(parts=("mtp",))), r"muon\.parts=\('mtp',\) must be .* at least one"),
        (dict(method="muon", muon=dict(parts=("head", "head"))), r"must be different parts"),
        (dict(method="muon", muon=dict(parts=("gate",))), r"muon\.parts.*gate"),
        (dict(method="muon", muon=dict(momentum=1.0)), r"muon\.momentum=1\.0 must be below 1; try 0\.95"),
        (dict(groups=dict(router=dict(learning_rate=-1.0))), r"groups\.router\.learning_rate=-1\.0"),
    ],
    ids=str,
)
def test_what_would_be_ignored_or_contradicts_is_refused(optimizer, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(optimizer=optimizer)
