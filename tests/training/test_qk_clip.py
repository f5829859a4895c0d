"""QK-clip in a step: after the update, in every layer, over micro-batches and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import assert_same_bits, mesh_sizes, tiny_config
from moe_jax import balance
from moe_jax.config import resolve
from moe_jax.data import open_corpus, training_batches
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.model.forward import Pass, PerLayer, inputs_of
from moe_jax.training.losses import model_summed_nats
from moe_jax.training.qk_clip import clipped
from moe_jax.training.state import init_state, step_key
from moe_jax.training.step import accumulate, advance, train_step

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
