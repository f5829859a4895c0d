"""Width and depth scaling: its multipliers, the coordinate check, and training at the base's own sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import assert_same_bits, tiny_config
from moe_jax import balance
from moe_jax.config import Multipliers
from moe_jax.config.multipliers import attention_multiplier, logits_divisor, of_matrix, of_vector, residual_multiplier
from moe_jax.data import open_corpus, training_batches
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.training.compile import make_train_step
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state, init_state, read_bias, step_key

RATE = 1e-3  # of the bias
STEPS = 4


def batch_at(step):
    """Batch `step` of the embedded corpus, 8 x 16 tokens."""
    batch = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)(step)
    return jax.tree.map(jnp.asarray, batch)


def stepped(config, steps):
    """The state before the first step, and after so many."""
    state = init_state(config)
    first = jax.tree.map(jnp.copy, state)
    for step in range(steps):
        state, _ = make_train_step(config)(state, batch_at(step), step_key(config))
    return first, state


# --- the multipliers ------------------------------------------------------------------------------------------


def scaled(scaling, **model):
    """m = 32 / 16 = 2, L = 12 / 3 = 4."""
    sizes = dict(embed_dim=32, num_layers=12, num_heads=4, head_dim=8, ffw_dim=48, expert_ffw_dim=16)
    return tiny_config(model=sizes | model | dict(scaling=dict(base_width=16, base_depth=3) | scaling)).model


def test_every_kind_of_parameter_has_the_multipliers_of_the_papers():
    half = dict(depth_exponent=0.5)  # L^-1/2 = 1/2 in the forward pass, L^(1/2 - 1) = 1/2 for rates
    hidden = dict(embed=32, ffw=48)
    assert of_matrix(scaled({}), "dense", hidden) == Multipliers(2**-0.5, 1 / 2, pytest.approx(2**-0.5), 1 / 8)
    assert of_matrix(scaled(half), "dense", hidden) == Multipliers(2**-0.5, 1 / 4, pytest.approx(8**-0.5), 1 / 4)
    router = dict(embed=32, experts=4)
    assert of_matrix(scaled({}), "router", router) == Multipliers(1 / 2, 1 / 2, pytest.approx(1 / 2), 1 / 4)
    flat = dict(base_depth=0)  # outside of blocks
    assert of_matrix(scaled(flat), "head", dict(embed=32, vocab=264)) == Multipliers(1.0, 1.0, 1.0, 1 / 2)
    assert of_matrix(scaled(flat), "embedding", dict(vocab=264, embed=32))._replace(muon=1.0) == (1.0, 1.0, 1.0, 1 / 2)
    assert of_vector(scaled({}), "norms", dict(embed=32)) == Multipliers(1.0, 1.0, 1.0, 1 / 8)
    assert of_vector(scaled(half), "norms", dict(embed=32)) == Multipliers(1.0, 1 / 2, 1 / 2, 1 / 4)
    assert residual_multiplier(scaled(half, residual_multiplier=3.0)) == 3 / 2
    assert residual_multiplier(scaled({})) == 1 / 4
    assert logits_divisor(scaled({}, logits_scaling=5.0)) == 10.0


def test_a_hidden_width_counts_against_its_own_base_or_in_proportion_to_the_embedding():
    down = dict(experts=4, ffw=16, embed=32)
    assert of_matrix(scaled({}), "experts", down)[:2] == (2**-0.5, 1 / 2)  # from 8 to 16, as 16 to 32
    assert of_matrix(scaled(dict(base_expert_ffw_dim=16)), "experts", down)[:2] == (1.0, 1.0)  # as wide as in the base
    up = dict(experts=4, embed=32, ffw=16)
    assert of_matrix(scaled(dict(base_expert_ffw_dim=16)), "experts", up)[:2] == (2**-0.5, 1 / 2)
    shared = dict(ffw=16, embed=32)
    assert of_matrix(scaled(dict(base_expert_ffw_dim=4)), "shared", shared)[:2] == (1 / 2, 1 / 4)
    own = scaled(dict(base_shared_ffw_dim=64), shared_ffw_dim=16)
    assert of_matrix(own, "shared", shared)[:2] == (2.0, 4.0)
    latent = scaled(dict(base_latent_dim=8), latent_dim=8)
    assert of_matrix(latent, "experts", dict(latent=8, embed=32))[:2] == (1.0, 1.0)
    assert of_matrix(latent, "experts", dict(experts=4, embed=8, ffw=16))[:2] == (1.0, 1.0)
    out = dict(heads=4, head_dim=8, embed=32)
    assert of_matrix(scaled(dict(base_num_heads=4)), "attention", out)[:2] == (1.0, 1.0)  # 4 heads of 8 in both
    wider = scaled(dict(base_num_heads=4, base_head_dim=2))
    assert of_matrix(wider, "attention", out)[:2] == (1 / 2, 1 / 4)
    assert attention_multiplier(wider) == 1 / 2  # 1/8 instead of 1/sqrt(8), relative to 1/2 instead of 1/sqrt(2)


def test_muon_s_rate_follows_the_spectral_norm_that_a_matrix_should_have():
    # its update has norm sqrt(max(rows, columns)) and should have sqrt(columns / rows)
    wide = of_matrix(scaled(dict(base_ffw_dim=48)), "dense", dict(embed=32, ffw=48))
    assert wide.muon == pytest.approx(1 / 2**0.5)  # sqrt(48/32) / sqrt(48) over sqrt(48/16) / sqrt(48)
    tall = of_matrix(scaled(dict(base_ffw_dim=48)), "dense", dict(ffw=48, embed=32))
    assert tall.muon == pytest.approx(2**0.5)  # sqrt(32/48) / sqrt(48) over sqrt(16/48) / sqrt(48)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_rate_times_decay_is_that_of_the_base_and_epsilon_is_as_small_as_the_gradient(method):
    def update(scaling, gradient):
        model = dict(embed_dim=32, num_layers=6, scaling=scaling)
        config = tiny_config(model=model, optimizer=dict(method=method, weight_decay=0.25, clip_norm=0.0))
        dims = abstract_model(config.model).dims
        params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract_state(config).params)
        optimizer = make_optimizer(config.optimizer, dims)
        gradients = jax.tree.map(lambda d, a: jnp.full(a.shape, gradient * d.multipliers.epsilon), dims, params)
        return jax.tree.leaves(dims), jax.tree.leaves(optimizer.update(gradients, optimizer.init(params), params)[0])

    scaling = dict(base_width=16, base_depth=3, depth_exponent=0.5)
    dims, decays = update(scaling, 0.0)
    _, moved = update(scaling, 1e-8)  # of the size of epsilon
    _, without_decay = update({}, 0.0)
    _, base = update({}, 1e-8)
    for d, decay, one, plain, other in zip(dims, decays, moved, without_decay, base, strict=True):
        np.testing.assert_allclose(decay, plain, rtol=1e-6)
        by_muon = method == "muon" and len(d.names) > 1 and d.part in ("attention", "dense", "experts", "shared")
        factor = d.multipliers.muon if by_muon else d.multipliers.adamw
        np.testing.assert_allclose(one - decay, factor * (other - plain), rtol=2e-3, atol=1e-7)


def test_initial_weights_have_the_deviation_of_their_multiplier():
    config = tiny_config(model=dict(embed_dim=64, ffw_dim=96, scaling=dict(base_width=16)))
    params, dims = init_state(config).params, abstract_model(config.model).dims
    checked = set()
    for d, value in zip(jax.tree.leaves(dims), jax.tree.leaves(params), strict=True):
        if np.size(value) > 1000:
            assert np.std(value) == pytest.approx(0.02 * d.multipliers.std, rel=0.1), d
            checked.add(d.multipliers.std)
    assert checked == {1.0, 1 / 2}


# --- training -------------------------------------------------------------------------------------------------


def test_at_the_base_s_own_sizes_training_is_bit_for_bit_the_unscaled_one():
    sizes = dict(ffw_dim=24, expert_ffw_dim=8, num_heads=2, head_dim=8)
    scaling = dict(base_width=16, base_depth=3) | {f"base_{key}": size for key, size in sizes.items()}
    balanced = dict(balance=dict(bias_sign=dict(rate=RATE)))
    plain, same = (tiny_config(model=dict(mtp_depth=1, scaling=s), **balanced) for s in ({}, scaling))
    for a, b in zip(stepped(plain, 2), stepped(same, 2), strict=True):
        assert_same_bits(jax.device_get(a), jax.device_get(b))


def test_the_selection_bias_moves_by_its_rate_at_any_size():
    scaling = dict(base_width=4, base_depth=1)
    config = tiny_config(model=dict(scaling=scaling), balance=dict(bias_sign=dict(rate=RATE)))
    first, after = stepped(config, 1)
    assert not read_bias(first.bias).any()
    moves = np.abs(read_bias(after.bias))
    np.testing.assert_array_equal(np.unique(moves[moves > 0]), np.float32(RATE))


# --- the coordinate check -------------------------------------------------------------------------------------
# How much activations change in a few steps: with scaling as much at any size, without it more, or less, the larger.


def sized(width=32, layers=1, optimizer=None, scaling=None, **model):
    """A model of this width and depth, whose heads, dense and expert layers grow with the width."""
    sizes = dict(num_layers=layers, embed_dim=width, num_heads=width // 8, num_kv_heads=width // 16, head_dim=8)
    sizes |= dict(ffw_dim=2 * width, expert_ffw_dim=width // 2, first_dense=0, init_std=0.03)
    optimizer = dict(learning_rate=1e-2, schedule="constant") | (optimizer or {})
    return tiny_config(
        model=sizes | model | dict(scaling=scaling or {}),
        optimizer=optimizer,
        balance=dict(bias_sign=dict(rate=RATE)),
    )


def activations(config, state):
    """On the first batch: the residual stream, the logits, those of routers, and the largest ones of attention."""

    def run(params, bias):
        model = nnx.merge(abstract_model(config.model).graphdef, params, bias)
        balancer = balance.make(config.balance, config.model)
        fwd = Pass(inputs_of(batch_at(0)), balancer, PerLayer(state.balance), jax.random.key(0), max_logits=True)
        x, report, top = model._layers(model._main_pass(fwd))
        attention = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(top)])
        logits = model.logits(model.final_norm(x))
        return dict(stream=x, logits=logits, router=report.details.routing.logits, attention=attention)

    return jax.tree.map(np.asarray, jax.jit(run)(state.params, state.bias))


@functools.lru_cache(maxsize=32)
def changes(config):
    """Root mean square of the change of each activation in some steps."""
    before, after = (activations(config, state) for state in stepped(config, STEPS))
    return {name: float(np.sqrt(((after[name] - value) ** 2).mean())) for name, value in before.items()}


def slopes(configs, sizes):
    """name -> the exponent with which the change of an activation grows with the size."""
    found = [changes(config) for config in configs]
    by = {name: np.polyfit(np.log(sizes), [np.log(f[name]) for f in found], 1)[0] for name in found[0]}
    print({name: (round(float(by[name]), 2), [round(f[name], 3) for f in found]) for name in by})
    return by


FACTORS = {"attention": 2}  # how many factors of an activation change: its exponent is the sum of theirs


def assert_level(slopes):
    assert all(abs(slope) < 0.3 * FACTORS.get(name, 1) for name, slope in slopes.items()), slopes


def of_widths(widths, base=0, **settings):
    """The slopes over these widths; at the base's own every multiplier is 1, so one run serves with and without."""
    scaling = dict(base_width=base) | settings.pop("scaling", {}) if base else {}
    return slopes([sized(w, scaling=None if w == base else scaling, **settings) for w in widths], widths)


def test_activations_change_as_much_at_any_width():
    level, steep = of_widths((32, 128), base=32), of_widths((32, 128))
    assert_level(level)
    assert all(slope > 0.5 * FACTORS.get(name, 1) for name, slope in steep.items()), steep


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(), dict(optimizer=dict(method="muon"))], ids=["adamw", "muon"])
def test_activations_change_as_much_at_three_widths(settings):
    assert_level(of_widths((32, 64, 128), base=32, **settings))


@pytest.mark.slow
def test_activations_change_as_much_at_any_depth():
    depths = 2, 4, 8
    level = slopes([sized(layers=n, scaling=dict(base_depth=2)) for n in depths], depths)
    steep = slopes([sized(layers=n) for n in depths], depths)
    assert abs(level["stream"]) < 0.3, level
    assert steep["stream"] > 0.5, steep
