"""The train state: weight decay, the learning rate, initial values and rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import tiny_config
from moe_jax.config import MeshConfig, OptimizerConfig, num_moe_layers
from moe_jax.mesh import make_mesh
from moe_jax.model.abstract import Dims, abstract_model
from moe_jax.training.optimizer import cost_of_rounding, learning_rate, make_optimizer, stored, weight_decay
from moe_jax.training.state import abstract_state, init_state, read_bias, write_bias

CONFIG = tiny_config(model=dict(qk_norm="head"), balance=dict(bias_sign={}))


def leaves(tree):
    """path -> leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def test_every_matrix_decays_and_no_norm_scale_does():
    dims = leaves(abstract_model(CONFIG.model).dims)
    assert dims.keys() == leaves(abstract_state(CONFIG).params).keys()
    mask = {path: weight_decay(CONFIG.optimizer, d) > 0 for path, d in dims.items()}
    for path, decays in mask.items():
        assert decays == (not path.endswith("scale")), path
    assert sum(mask.values()) > 10
    assert sum(not m for m in mask.values()) > 5


def test_weight_decay_shrinks_exactly_the_leaves_of_the_mask():
    config = OptimizerConfig(weight_decay=0.5, clip_norm=0.0)
    dims = abstract_model(CONFIG.model).dims
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract_state(CONFIG).params)
    optimizer = make_optimizer(config, dims)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in leaves(updates).items():
        np.testing.assert_array_equal(update, 0.0 if path.endswith("scale") else 0.5, err_msg=path)


def test_the_bias_is_not_a_parameter_and_has_no_moments():
    state = abstract_state(CONFIG)
    assert not any("bias" in path for path in leaves((state.params, state.optimizer)))
    assert [a.shape for a in jax.tree.leaves(state.bias)] == [(2, 4)]  # two MoE layers, four experts


def test_biases_are_read_and_written_in_layer_order():
    bias = {"mtp": {"a": jnp.zeros((1, 3))}, "stacks": {"b": jnp.zeros((2, 3)), "c": jnp.zeros((1, 3))}}
    value = jnp.arange(12.0).reshape(4, 3)
    written = write_bias(bias, value)
    np.testing.assert_array_equal(read_bias(written), value)
    np.testing.assert_array_equal(written["mtp"]["a"], value[3:])  # multi-token prediction comes last


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_have_the_configured_dtype_whatever_the_parameters(dtype):
    config = tiny_config(optimizer=dict(moment_dtype=dtype), model=dict(param_dtype="bfloat16"))
    state = abstract_state(config)
    moments = {p: a for p, a in leaves(state.optimizer).items() if "mu" in p or "nu" in p}
    assert moments
    assert {str(a.dtype) for a in moments.values()} == {dtype}
    routers = {p: a for p, a in leaves(state.params).items() if p.endswith("router")}
    assert {str(a.dtype) for a in routers.values()} == {"float32"}


def test_bfloat16_moments_make_nearly_the_same_step():
    params = {"w": jnp.ones((4, 4))}
    grads = {"w": jax.random.normal(jax.random.key(0), (4, 4))}
    dims = {"w": Dims(("embed", "ffw"), "dense")}
    steps = []
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(moment_dtype=dtype, clip_norm=0.0, weight_decay=0.0), dims)
        state = optimizer.init(params)
        for _ in range(3):
            update, moments = optimizer.update(grads, state, params)
            state = stored(moments, state, "nearest", jax.random.key(0))
        steps.append(update["w"])
    np.testing.assert_allclose(steps[0], steps[1], rtol=0.02)
    assert steps[1].dtype == jnp.float32


def test_clipping_bounds_the_global_norm():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0), {})
    reference = optax.clip_by_global_norm(1.0)
    grads = {"w": jnp.array([3.0, 4.0])}
    clipped = reference.update(grads, reference.init(grads))[0]["w"]  # (0.6, 0.8)
    update, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(update["w"], clipped / (jnp.abs(clipped) + 1.0), rtol=1e-6)


def rates(num_steps=100, **options):
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **options), num_steps)
    return np.array([float(schedule(s)) for s in range(num_steps)])


def test_warm_up_is_linear_ends_at_the_peak_and_never_starts_at_zero():
    rate = rates(schedule="constant", warmup_steps=4)
    np.testing.assert_allclose(rate[:6], [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_cosine_falls_to_its_end_ratio():
    rate = rates(num_steps=101, schedule="cosine", warmup_steps=0, end_ratio=0.1)
    # half way between 1 and 0.1 in the middle of the 101 steps
    np.testing.assert_allclose(rate[[0, 50, 100]], [1.0, 0.55, 0.1], rtol=1e-5)


def test_wsd_is_stable_and_then_decays_linearly():
    rate = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2, end_ratio=0.0)
    np.testing.assert_allclose(rate[10:80], 1.0)
    np.testing.assert_allclose(rate[[89, 99]], [0.5, 0.0], atol=1e-6)  # 20 steps from 1 to 0


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5, 9])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_wherever_the_rate_decays_the_last_step_has_the_end_ratio(schedule, warmup, fraction):
    rate = rates(num_steps=10, schedule=schedule, warmup_steps=warmup, decay_fraction=fraction, end_ratio=0.1)
    np.testing.assert_allclose([rate.max(), rate[-1]], [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rate[:warmup], (np.arange(warmup) + 1) / max(1, warmup), rtol=1e-6)
    assert (np.diff(rate[max(0, warmup - 1) :]) <= 0).all()


def test_a_wsd_that_decays_nothing_is_constant():
    np.testing.assert_array_equal(rates(num_steps=10, schedule="wsd", decay_fraction=0.0), np.ones(10, np.float32))


def test_a_wsd_that_fills_the_run_falls_in_equal_steps_from_one_at_the_peak():
    # the step at the peak is the first without a warm-up, and the last of the warm-up with one
    rate = rates(num_steps=10, schedule="wsd", decay_fraction=1.0, end_ratio=0.1)
    np.testing.assert_allclose(rate, np.linspace(1.0, 0.1, 10), rtol=1e-6)
    rate = rates(num_steps=10, schedule="wsd", warmup_steps=5, decay_fraction=0.5, end_ratio=0.1)
    np.testing.assert_allclose(rate[4:], np.linspace(1.0, 0.1, 6), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd", "multistep"])
def test_a_run_of_one_step_and_one_that_only_warms_up_end_at_the_peak(schedule):
    np.testing.assert_allclose(rates(num_steps=1, schedule=schedule), [1.0])
    warming = rates(num_steps=4, schedule=schedule, warmup_steps=4, decay_fraction=0.0, milestones=())
    np.testing.assert_allclose(warming, [0.25, 0.5, 0.75, 1.0])


def test_a_milestone_within_the_warm_up_counts_from_its_own_step_on():
    rate = rates(num_steps=10, schedule="multistep", warmup_steps=4, milestones=(0.2,), milestone_ratio=0.5)
    np.testing.assert_allclose(rate[:5], [0.25, 0.5, 0.375, 0.5, 0.5])


def test_multistep_drops_at_its_milestones():
    rate = rates(schedule="multistep", warmup_steps=10, milestones=(0.8, 0.9), milestone_ratio=0.5)
    np.testing.assert_allclose(rate[[10, 79, 81, 89, 91]], [1.0, 1.0, 0.5, 0.5, 0.25])


def test_milestones_that_round_to_one_step_both_count():
    rate = rates(num_steps=5, schedule="multistep", milestones=(0.8, 0.85), milestone_ratio=0.5)
    np.testing.assert_allclose(rate, [1.0, 1.0, 1.0, 1.0, 0.25])


def test_equal_seeds_draw_equal_states_and_others_do_not():
    a, b = init_state(CONFIG), init_state(CONFIG)
    other = init_state(tiny_config(model=dict(qk_norm="head"), balance=dict(bias_sign={}), seed=1))
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a.params, b.params))
    assert not (a.params["embedding"] == other.params["embedding"]).any()


def test_arms_of_an_experiment_start_from_the_same_weights():
    none = tiny_config(model=dict(qk_norm="head"))
    a, b = init_state(CONFIG), init_state(none)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a.params, b.params))


def test_abstract_state_is_what_init_makes():
    made = jax.tree.map(lambda a: (a.shape, a.dtype), init_state(CONFIG))
    assert made == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_state(CONFIG))


def test_stacked_layers_differ_from_each_other():
    experts = init_state(CONFIG).params["stacks"][1]["blocks"][0]["ffw"]["gate"]
    assert experts.shape[:2] == (num_moe_layers(CONFIG.model), 4)
    assert not np.allclose(experts[0], experts[1])
    assert not np.allclose(experts[0, 0], experts[0, 1])


# --- numbers kept in bfloat16 -------------------------------------------------------------------------------------


def test_stochastic_rounding_keeps_the_mean_where_the_nearest_loses_a_small_update():
    # 1 + 2^-10 is an eighth of the way from 1 to the next bfloat16, 1 + 2^-7
    old = jnp.ones(2**16, jnp.bfloat16)
    new = old.astype(jnp.float32) + 2.0**-10
    assert (stored(new, old, "nearest", jax.random.key(0)) == old).all()
    rounded = stored(new, old, "stochastic", jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    assert set(np.asarray(rounded, np.float32)) == {1.0, 1.0 + 2.0**-7}
    # the share that goes up is 1/8, with a standard deviation of 0.0013
    np.testing.assert_allclose((rounded > 1).mean(dtype=jnp.float32), 1 / 8, atol=0.006)


def test_stochastic_rounding_leaves_exact_and_non_finite_values_alone():
    key = jax.random.key(0)
    exact = jnp.asarray([0.0, -0.0, 1.5, -(2.0**-126), 3.0e38, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    rounded = stored(exact.astype(jnp.float32), exact, "stochastic", key)
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), np.asarray(exact, np.float32))
    nan = jnp.full(100, jnp.uint32(0x7FFFFFFF).view(jnp.float32))  # its lower bits are ones: adding must not carry
    assert jnp.isnan(stored(nan, nan.astype(jnp.bfloat16), "stochastic", key)).all()
    wide = {"w": jnp.full(3, 1.0 + 2.0**-20), "count": jnp.int32(7)}
    same = stored(wide, wide, "stochastic", key)  # float32 and integers are kept as they are
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.dtype == b.dtype, same, wide))


def test_a_key_repeats_its_draws_and_every_leaf_and_key_has_others():
    old = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}
    new = jax.tree.map(lambda a: a.astype(jnp.float32) + 2.0**-8, old)
    one, again, other = (stored(new, old, "stochastic", jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["a"], again["a"])
    assert (one["a"] != one["b"]).any()
    assert (one["a"] != other["a"]).any()


def test_draws_do_not_depend_on_the_mesh():
    new = jnp.ones((16, 8), jnp.float32) + 2.0**-8
    round_it = jax.jit(lambda new, old: stored(new, old, "stochastic", jax.random.key(0)))
    places = NamedSharding(make_mesh(MeshConfig(data=2, expert=4)), P("data", "expert"))
    split = jax.device_put(new, places)
    old = split.astype(jnp.bfloat16)
    np.testing.assert_array_equal(round_it(split, old), round_it(new, new.astype(jnp.bfloat16)))


def test_updates_lost_by_rounding_are_reported_where_there_are_any():
    assert cost_of_rounding(tiny_config()) is None
    kept = tiny_config(model=dict(param_dtype="bfloat16"))
    assert "model.param_dtype='bfloat16' loses" in cost_of_rounding(kept)
    assert "set 'float32', or optimizer.rounding='stochastic'" in cost_of_rounding(kept)
    by_chance = tiny_config(model=dict(param_dtype="bfloat16"), optimizer=dict(rounding="stochastic"))
    assert cost_of_rounding(by_chance) is None
    # a second moment that decays by 0.999 does not fall: 0.001 of it is less than half a step of bfloat16
    stays = tiny_config(optimizer=dict(moment_dtype="bfloat16", b2=0.999))
    assert "optimizer.moment_dtype='bfloat16' loses" in cost_of_rounding(stays)
    assert cost_of_rounding(tiny_config(optimizer=dict(moment_dtype="bfloat16", b2=0.95))) is None
