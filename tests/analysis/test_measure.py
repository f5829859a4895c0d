"""Measures beside the step: interference, the effect of the bias, recorded scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax.analysis.interference import make_measure_step
from moe_jax.analysis.recording import make_recorder
from moe_jax.config import resolve
from moe_jax.data import open_corpus, training_batches
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.training.compile import make_train_step
from moe_jax.training.state import init_state, step_key, write_bias
from moe_jax.training.step import accumulate

BALANCES = {
    "none": {},
    "bias": dict(bias_sign=dict(rate=1e-2)),
    "aux": dict(aux_loss=dict(weight=1e-2)),
    "aux twice as strong": dict(aux_loss=dict(weight=2e-2)),
    "z": dict(z_loss=dict(weight=1e-2)),
    "both": dict(aux_loss=dict(weight=1e-2), z_loss=dict(weight=1e-2)),
}


def config_of(name, **overrides):
    return tiny_config(balance=BALANCES[name], measure_every=1, **overrides)


def batch_of(config, step: int = 0):
    make = training_batches(
        open_corpus(""), seed=0, batch_size=config.batch_size, sequence_length=config.sequence_length
    )
    return make(step)


@functools.cache
def measured(name):
    config = config_of(name)
    return jax.device_get(make_measure_step(config)(init_state(config), batch_of(config), step_key(config)))


@pytest.mark.parametrize("name", ["none", "bias"])
@pytest.mark.parametrize("place", ["router", "input"])
def test_methods_without_a_loss_have_a_measured_interference_of_zero(name, place):
    values = measured(name)
    np.testing.assert_array_equal(values[f"interference/{place}_ratio"], [0.0, 0.0])
    assert np.isnan(values[f"interference/{place}_cosine"]).all()


@pytest.mark.parametrize("place", ["router", "input"])
def test_the_ratio_of_an_auxiliary_loss_grows_with_its_weight_and_the_angle_stays(place):
    once, twice = measured("aux"), measured("aux twice as strong")
    assert (once[f"interference/{place}_ratio"] > 0).all()
    np.testing.assert_allclose(twice[f"interference/{place}_ratio"], 2 * once[f"interference/{place}_ratio"], rtol=1e-4)
    cosine = once[f"interference/{place}_cosine"]
    assert (abs(cosine) <= 1).all()
    np.testing.assert_allclose(twice[f"interference/{place}_cosine"], cosine, rtol=1e-3, atol=1e-5)


def test_z_loss_is_measured_separately_from_losses_that_balance():
    both = measured("both")
    for name, alone in (("", measured("aux")), ("z_", measured("z"))):
        for what in ("router_ratio", "router_cosine", "input_ratio", "input_cosine"):
            key = f"interference/{name}{what}"
            np.testing.assert_allclose(both[key], alone[key], rtol=1e-4, atol=1e-6, err_msg=key)
    np.testing.assert_array_equal(measured("z")["interference/router_ratio"], [0.0, 0.0])


def test_the_gradients_at_the_router_are_those_of_the_step():
    # of the whole loss: |g|^2 = |a|^2 + |b|^2 + 2 a.b with |b| = ratio |a|, so its norm follows from |a|
    config, plain = config_of("aux"), config_of("none")
    state, batch, key = init_state(config), batch_of(config), jax.random.fold_in(step_key(config), 0)

    def router_norms(config):
        grads = jax.jit(functools.partial(accumulate, config))(state._replace(balance={}), batch, key)[1]
        (router,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if "router" in str(path[-1])]
        return np.linalg.norm(np.asarray(router).reshape(2, -1), axis=1)

    language, total = router_norms(plain), router_norms(config)
    ratio, cosine = (measured("aux")[f"interference/router_{what}"] for what in ("ratio", "cosine"))
    np.testing.assert_allclose(total, language * np.sqrt(1 + ratio**2 + 2 * ratio * cosine), rtol=1e-4)


def test_a_bias_that_pushes_everything_to_one_expert_changes_half_of_two_choices():
    # with a bias of 10 on expert 3, every token chooses it; a token that chose it anyway keeps both choices
    config = config_of("bias")
    state = init_state(config)
    measure, batch = make_measure_step(config), batch_of(config)
    np.testing.assert_array_equal(measure(state, batch, step_key(config))["moe/bias_changed"], [0.0, 0.0])
    pushed = state._replace(bias=write_bias(state.bias, jnp.zeros((2, 4)).at[:, 3].set(10.0)))
    _, values = make_train_step(config)(jax.tree.map(jnp.copy, state), batch, step_key(config))
    chosen_before = np.asarray(values["loads"])[0, 3] / batch.mask.sum()
    changed = measure(pushed, batch, step_key(config))["moe/bias_changed"]
    np.testing.assert_allclose(changed[0], (1 - chosen_before) / 2, atol=1e-6)


def test_churn_uses_the_rate_of_this_step():
    config = tiny_config(balance=dict(bias_sign=dict(rate=1.0, freeze_step=3)))
    state, measure = init_state(config), make_measure_step(config)

    def churn(step):
        values = measure(state._replace(step=jnp.int32(step)), batch_of(config), step_key(config))
        return np.asarray(values["moe/churn"])

    assert (churn(2) > 0.1).all()
    np.testing.assert_array_equal(churn(3), [0.0, 0.0])


def test_violation_of_the_micro_batch_is_that_of_the_step_with_one_and_of_sequences_is_larger():
    config = config_of("none")
    _, values = make_train_step(config)(init_state(config), batch_of(config), step_key(config))
    values, here = jax.device_get(values), measured("none")
    for name in ("max_violation", "max_violation_worst", "min_violation", "mean_violation", "violation_floor"):
        np.testing.assert_allclose(here[f"moe/microbatch_{name}"], values[f"moe/{name}"], rtol=1e-5, err_msg=name)
    for name in ("max_violation", "max_violation_worst", "violation_floor"):
        assert here[f"moe/sequence_{name}"] > here[f"moe/microbatch_{name}"]


@pytest.mark.parametrize(
    "sizes", [dict(data=2, expert=2), pytest.param(dict(data=2, sequence=2), marks=pytest.mark.slow)], ids=str
)
def test_measuring_leaves_the_state_unchanged_and_is_the_same_on_a_mesh(sizes):
    config = resolve(config_of("both", mesh=sizes), 8, "cpu")
    mesh = make_mesh(config.mesh)
    state = init_state(config, mesh)
    before = jax.device_get(state)
    batch = jax.device_put(batch_of(config), batch_sharding(mesh))
    values = jax.device_get(make_measure_step(config, mesh)(state, batch, step_key(config)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    for name, want in measured("both").items():
        np.testing.assert_allclose(values[name], want, rtol=1e-3, atol=1e-5, err_msg=name)


def test_recorded_scores_are_the_logits_of_the_first_micro_batch():
    config = config_of("none", micro_batches=2)
    state, batch = init_state(config), batch_of(config)
    scores = jax.device_get(make_recorder(config)(state, batch, step_key(config)))
    assert (scores.logits.shape, scores.logits.dtype) == ((2, 4 * 16, 4), np.float16)
    np.testing.assert_array_equal(scores.ids, np.asarray(batch.tokens)[::2].ravel())
    np.testing.assert_array_equal(scores.mask, np.asarray(batch.segment_ids)[::2].ravel() > 0)
    loads = np.asarray(make_measure_step(config)(state, batch, step_key(config))["moe/microbatch_max_violation"])
    top = np.argsort(-scores.logits.astype(np.float32), axis=-1)[..., :2]
    counts = np.stack([np.bincount(layer[scores.mask].ravel(), minlength=4) for layer in top])
    # float16 may break a tie differently
    np.testing.assert_allclose((counts.max(1) / counts.mean(1) - 1).mean(), loads, atol=0.05)
