"""Each family of balancing methods through the whole train step: micro-batches, remat, a mesh, a checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import mesh_sizes, tiny_config
from moe_jax.config import resolve
from moe_jax.data import open_corpus, training_batches
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.runtime import checkpoint
from moe_jax.training.compile import make_train_step
from moe_jax.training.state import abstract_state, init_state, read_bias, state_shardings, step_key

# family -> balance, model: with every option that makes a state larger than one vector over experts
FAMILIES = {
    "bias with momentum, by class, in one layer": (
        dict(bias_smebu=dict(rate=1e-2, num_classes=2, layers=(1, 2), ema=0.5)),
        dict(class_starts=(100,), select_by="logits"),
    ),
    "quantile": (dict(quantile=dict(bins=100)), {}),
    "multiplicative": (dict(bias_multiplicative=dict(rate=1e-2)), dict(num_groups=2, top_groups=1)),
    "pi with zero experts": (dict(bias_pi=dict(gain=0.1)), dict(num_zero_experts=2, latent_dim=8, expert_bias=True)),
    "losses": (
        dict(
            aux_loss=dict(level="device", scope="global", num_devices=2, counts="unbiased"),
            z_loss=dict(warmup_steps=4),
            target_violation={},
        ),
        dict(router_bias=True, router_norm="scaled", router_scale=0.25, expert_scale=True),
    ),
    "running counts": (dict(aux_loss=dict(scope="global_running")), dict(activation="relu2", gate_on="input")),
    "threshold": (dict(expert_threshold=dict(bins=100)), {}),
    "ReLU": (dict(relu=dict(weight=0.1, slots=3)), dict(score="relu", normalize_gates=False)),
    "top-p": (dict(top_p={}, phi_loss={}), {}),
    "moving quantiles": (dict(moving_quantile=dict(strength=1.0, ema=0.8), bias_sign=dict(rate=1e-2)), {}),
    "frozen router": (dict(frozen_router=dict(layers=(1, 2)), quantile=dict(bins=100, quantiles_of="sequence")), {}),
    "expert choice by sequence": (dict(expert_choice=dict(scope="sequence")), {}),
    "DeepSeek-V4": (
        dict(
            hash=dict(layers=(0, 1)),
            bias_sign=dict(rate=1e-2, layers=(1, 2)),
            aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased"),
        ),
        dict(score="sqrt_softplus", gate_scale=1.5, activation_limit=0.01),
    ),
    "capacity of devices": (
        dict(device_capacity=dict(num_devices=2), aux_loss=dict(level="communication", num_devices=2)),
        dict(num_layers=1),  # a second layer would route by what the first one dropped
    ),
}
# a loss reads the counts so far or of a micro-batch, so the gradient, and only the gradient, depends on the split
GRADIENT_DEPENDS_ON_THE_SPLIT = {"running counts", "ReLU"}
# which copies are dropped depends on all copies that are dispatched together
LOADS_ONLY = {"capacity of devices"}
every_family = pytest.mark.parametrize("family", FAMILIES, scope="module")
# those whose state or loss crosses devices in ways of its own; on a mesh the others are compared by the slow tests
ON_A_MESH = {
    "bias with momentum, by class, in one layer",
    "quantile",
    "pi with zero experts",
    "losses",
    "DeepSeek-V4",
    "capacity of devices",
}
every_family_on_a_mesh = pytest.mark.parametrize(
    "family",
    [name if name in ON_A_MESH else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
    scope="module",
)


def config_of(family, mesh=(1, 1, 1, 1), **overrides):
    balance, model = FAMILIES[family]
    model = dict(num_layers=2, first_dense=0, num_kv_heads=2) | model | overrides.pop("model", {})
    settings = dict(balance=balance, model=model, mesh=mesh_sizes(mesh)) | overrides
    return resolve(tiny_config(**settings), len(jax.devices()), "cpu")


def batches(config):
    return training_batches(
        open_corpus(""), seed=0, batch_size=config.batch_size, sequence_length=config.sequence_length
    )


def stepped(config, state, first: int = 0, steps: int = 1):
    mesh = make_mesh(config.mesh)
    step, batch_at = make_train_step(config, mesh), batches(config)
    for number in range(first, first + steps):
        batch = jax.device_put(batch_at(number), batch_sharding(mesh))
        state, values = step(jax.tree.map(jnp.copy, state), batch, step_key(config))
    return jax.device_get(state), jax.device_get(values)


@functools.cache
def plain(family):
    """The state and metrics after one step on one device."""
    config = config_of(family)
    return stepped(config, init_state(config, make_mesh(config.mesh)))


@functools.cache
def unbalanced(model):
    """The loads of the first step of the same model without balancing."""
    config = dataclasses.replace(config_of("quantile"), model=dataclasses.replace(model, class_starts=()), balance=())
    return stepped(config, init_state(config, make_mesh(config.mesh)))[1]["loads"]


def assert_same(family, state, values, gradient=True):
    """Loads and balancer state bit by bit; loss within 1e-5."""
    want_state, want = plain(family)
    np.testing.assert_array_equal(values["loads"], want["loads"])
    if family not in LOADS_ONLY:
        np.testing.assert_allclose(values["loss"], want["loss"], rtol=0, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), state.balance, want_state.balance)
    np.testing.assert_allclose(read_bias(state.bias), read_bias(want_state.bias), rtol=0, atol=1e-6)
    same = [name for name in want if name.startswith(("moe/loss/", "moe/bias", "moe/drop", "moe/zero"))]
    if family in GRADIENT_DEPENDS_ON_THE_SPLIT | LOADS_ONLY:
        same = ["moe/bias_range"]
    for name in same:
        np.testing.assert_allclose(values[name], want[name], rtol=1e-4, atol=1e-6, err_msg=name)
    if gradient:
        np.testing.assert_allclose(values["grad_norm"], want["grad_norm"], rtol=1e-4)


@every_family_on_a_mesh
def test_micro_batches_remat_and_a_mesh_together_change_nothing(family):
    config = config_of(family, mesh=(1, 2, 2, 2), micro_batches=2, model=dict(remat="full"))
    state, values = stepped(config, init_state(config, make_mesh(config.mesh)))
    assert_same(family, state, values, gradient=family not in GRADIENT_DEPENDS_ON_THE_SPLIT | LOADS_ONLY)


@every_family
def test_a_checkpoint_has_the_whole_state_and_the_resumed_run_is_the_same(family, tmp_path):
    config, (state, _) = config_of(family), plain(family)
    saver = checkpoint.Checkpointer(tmp_path, 1)
    saver.save(1, jax.tree.map(jnp.asarray, state), {})
    saver.close()
    mesh = make_mesh(config.mesh)
    restored, _ = checkpoint.restore(tmp_path, abstract_state(config, mesh))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), state)
    # sharded as after a restore, so that nothing is compiled again
    state = jax.device_put(state, state_shardings(config, mesh))
    (on, on_values), (off, off_values) = (stepped(config, s, first=1) for s in (restored, state))
    np.testing.assert_array_equal(on_values["loads"], off_values["loads"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), on, off)


@every_family
def test_the_method_does_something(family):
    state, values = plain(family)
    before = jax.device_get(init_state(config_of(family)))
    moved = [
        (a != b).any()
        for a, b in zip(
            jax.tree.leaves((before.balance, before.bias)), jax.tree.leaves((state.balance, state.bias)), strict=True
        )
    ]
    losses = [float(v) for name, v in values.items() if name.startswith("moe/loss/")]
    other_loads = (values["loads"] != unbalanced(config_of(family).model)).any()
    assert any(moved) or any(losses) or other_loads
    assert (values["moe/dropped"] > 0) == (family == "capacity of devices")
