"""Anticipatory routing: a step's experts are those that its batch had under the parameters of some steps before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import assert_same_bits, mesh_sizes, tiny_config
from moe_jax import balance
from moe_jax.analysis.interference import make_measure_step
from moe_jax.config import resolve
from moe_jax.data import open_corpus, training_batches
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.routing import RouterConfig, route
from moe_jax.runtime import checkpoint
from moe_jax.training.anticipation import NOT_CHOSEN, LossWatch, by_micro_batch, observe
from moe_jax.training.compile import make_train_step
from moe_jax.training.loop import run
from moe_jax.training.state import abstract_state, init_state, step_key

DELAY = 2
STEPS = 5
OPTIMIZER = dict(learning_rate=1e-2)  # large, so that a step moves choices


def config_of(mesh=(1, 1, 1, 1), sequence=1, **overrides):
    settings = dict(
        anticipation=dict(delay=DELAY),
        balance=dict(bias_sign=dict(rate=1e-2), z_loss={}),
        optimizer=OPTIMIZER,
        model=dict(num_kv_heads=2),
        mesh=mesh_sizes(mesh) | dict(sequence=sequence),
    )
    return resolve(tiny_config(**(settings | overrides)), len(jax.devices()), "cpu")


@functools.cache
def batch_of(config, step):
    batch_at = training_batches(
        open_corpus(""), seed=0, batch_size=config.batch_size, sequence_length=config.sequence_length
    )
    return batch_at(step)


def trained(config, steps=STEPS, state=None, first=0):
    """The states before each step and after the last, and every step's metrics."""
    mesh = make_mesh(config.mesh)
    step = make_train_step(config, mesh)
    states = [init_state(config, mesh) if state is None else state]
    values = []
    for number in range(first, first + steps):
        numbers = (number, number + config.anticipation.delay) if config.anticipation.delay else (number,)
        batch, *later = (jax.device_put(batch_of(config, n), batch_sharding(mesh)) for n in numbers)
        state, metrics = step(jax.tree.map(jnp.copy, states[-1]), batch, step_key(config), *later)
        states.append(state)
        values.append(jax.device_get(metrics))
    return states, values


@functools.cache
def plain():
    return trained(config_of())


def loads_under(config, state, step):
    """The loads of a step's batch under the parameters and the bias of a state, by the model alone."""
    model = nnx.merge(abstract_model(config.model).graphdef, state.params, state.bias)
    balancer = balance.make(config.balance, config.model)
    batch = jax.tree.map(jnp.asarray, batch_of(config, step))
    fwd = Pass(inputs_of(batch), balancer, PerLayer(state.balance), jax.random.key(0), train=True)
    return np.asarray(model(fwd)[1].statistics["loads"])


# --- the equation ---------------------------------------------------------------------------------------------


def test_a_step_routes_by_the_parameters_and_the_bias_of_some_steps_before():
    states, values = plain()
    for step in range(DELAY, STEPS):
        np.testing.assert_array_equal(values[step]["loads"], loads_under(config_of(), states[step - DELAY], step))
        assert (values[step]["loads"] != loads_under(config_of(), states[step], step)).any()


def test_the_first_steps_have_no_earlier_choices_and_are_those_of_a_run_without():
    _, values = plain()
    _, without = trained(config_of(anticipation={}), DELAY + 1)
    for step in range(DELAY):
        assert values[step]["loss"] == without[step]["loss"]
        np.testing.assert_array_equal(values[step]["loads"], without[step]["loads"])
    assert [float(v["moe/anticipated"]) for v in values] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert values[DELAY]["loss"] != without[DELAY]["loss"]


def test_gates_are_the_present_scores_of_the_experts_chosen_before():
    logits = jax.random.normal(jax.random.key(0), (3, 4))
    chosen = jnp.int16([[3, 0], [-1, -1], [1, 2]])
    routing = route(logits, RouterConfig(top_k=2, normalize_gates=False), chosen=chosen)
    best = jax.lax.top_k(logits[1], 2)[1]
    np.testing.assert_array_equal(routing.expert_ids, [[3, 0], best, [1, 2]])
    np.testing.assert_allclose(routing.gates[0], jax.nn.sigmoid(logits[0, jnp.array([3, 0])]), rtol=1e-6)
    assert routing.loads.sum() == 6


def test_a_step_is_measured_with_the_experts_that_were_chosen_for_it():
    config = config_of()
    states, values = plain()
    measured = make_measure_step(config)(states[DELAY], batch_of(config, DELAY), step_key(config))
    np.testing.assert_allclose(measured["moe/microbatch_max_violation"], values[DELAY]["moe/max_violation"], rtol=1e-6)
    assert not {"moe/churn", "moe/bias_changed"} & measured.keys()


# --- what must not change it ----------------------------------------------------------------------------------


def test_micro_batches_and_a_mesh_change_nothing():
    states, values = trained(config_of(mesh=(1, 2, 2, 1), sequence=2, micro_batches=2), DELAY + 1)
    before, want = plain()
    ids = states[1].anticipation.ids
    np.testing.assert_array_equal(ids, before[1].anticipation.ids)
    assert ids.sharding.shard_shape(ids.shape)[2] * 8 == ids.shape[2]  # split like the tokens
    for one, other in zip(values, want, strict=False):
        np.testing.assert_array_equal(one["loads"], other["loads"])
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=0, atol=1e-5)


def test_rows_of_micro_batches_are_those_of_the_batch():
    ids = jnp.arange(4 * 3, dtype=jnp.int16).reshape(1, 12, 1)  # 4 rows of 3 tokens
    np.testing.assert_array_equal(by_micro_batch(ids, 4, 2)[1, 0, :, 0], [3, 4, 5, 9, 10, 11])  # rows 1 and 3


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The workdir of a run that stopped after 3 steps, and resumed up to the last."""
    workdir = tmp_path_factory.mktemp("anticipation")
    run(config_of(), workdir, stop_at=3, quiet=True)
    run(config_of(), workdir, stop_at=STEPS, quiet=True)
    return workdir


def saved(config, workdir):
    return checkpoint.restore(workdir / "checkpoints", abstract_state(config))[0]


def test_a_resumed_run_has_the_choices_of_the_run_before(resumed):
    state = saved(config_of(), resumed)
    assert_same_bits(jax.device_get(state), jax.device_get(plain()[0][STEPS]))
    assert (state.anticipation.ids != NOT_CHOSEN).all()


@pytest.mark.parametrize("anticipation", [dict(delay=DELAY), {}], ids=["with", "without"])
def test_a_branch_does_not_use_choices_for_the_batches_of_its_trunk(resumed, tmp_path, anticipation):
    branch = config_of(branch_from=f"{resumed}@{STEPS}", anticipation=anticipation, seed=1)
    run(branch, tmp_path, stop_at=STEPS + 1, quiet=True)
    state = saved(branch, tmp_path)
    if not anticipation:
        assert state.anticipation is None
        return
    chosen = (state.anticipation.ids != NOT_CHOSEN).all((1, 2, 3))
    np.testing.assert_array_equal(chosen, [STEPS % DELAY == slot for slot in range(DELAY)])  # by its first step alone


def test_a_skipped_step_leaves_the_choices_of_later_steps_where_they_belong():
    states, _ = plain()
    broken = jax.tree.map(lambda p: p * jnp.nan, states[1].params)
    (_, after), (values,) = trained(config_of(), 1, states[1]._replace(params=broken), first=1)
    assert int(after.skipped) == 1
    before = states[1].anticipation.ids
    np.testing.assert_array_equal(after.anticipation.ids[0], before[0])  # for step 2
    assert (after.anticipation.ids[1] != before[1]).any()  # for step 3
    assert not np.isfinite(values["loss"])


# --- after a spike --------------------------------------------------------------------------------------------


def watched(losses, **options):
    """The `until` of the watch after each loss."""
    config = dataclasses.replace(config_of().anticipation, **dict(spike=4.0, hold=3, window=5) | options)
    watch = LossWatch(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))
    untils = []
    for step, loss in enumerate(losses):
        watch = observe(config, watch, jnp.int32(step), jnp.float32(loss))
        untils.append(int(watch.until))
    return untils, watch


STEADY = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9]


def test_a_spike_is_a_loss_far_above_the_last_ones():
    assert watched([*STEADY, 2.1, 3.0, 2.0])[0] == [0] * 7 + [10, 10]
    assert watched([5.0, *STEADY])[0] == [0] * 7  # a fall is none
    assert watched([2.0, 2.0, 9.0])[0] == [0] * 3  # too few losses to know


def test_mean_and_variance_are_those_of_the_first_losses():
    _, watch = watched(STEADY[:4])
    np.testing.assert_allclose(watch.mean, np.mean(STEADY[:4]), rtol=1e-6)
    np.testing.assert_allclose(watch.variance, np.var(STEADY[:4]), rtol=1e-4)


def test_a_loss_that_is_not_finite_is_neither_a_spike_nor_averaged():
    untils, watch = watched([*STEADY, float("nan"), float("inf")])
    assert untils == [0] * 8
    assert_same_bits(watch, watched(STEADY)[1])


def test_choices_are_made_ahead_only_after_a_spike():
    config = config_of(anticipation=dict(delay=1, spike=1e6, hold=2, window=2))
    states, values = trained(config, 4)
    assert all(v["moe/anticipated"] == 0 for v in values)
    assert (states[-1].anticipation.ids == NOT_CHOSEN).all()
    calm = states[-1].anticipation.watch._replace(mean=jnp.float32(-1e9), variance=jnp.float32(0))
    spiked = states[-1]._replace(anticipation=states[-1].anticipation._replace(watch=calm))
    _, values = trained(config, 4, spiked, first=4)  # the first of these losses is a spike
    assert [float(v["moe/anticipated"]) for v in values] == [0.0, 1.0, 1.0, 0.0]
