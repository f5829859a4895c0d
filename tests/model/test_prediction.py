"""Multi-token prediction: its inputs, targets and weight, and the balance of its experts."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import balance
from moe_jax.analysis.interference import measure
from moe_jax.data.batches import Batch
from moe_jax.model.forward import Inputs, Pass, PerLayer, inputs_of
from moe_jax.model.prediction import ahead_of, ahead_targets, prediction_weight
from moe_jax.training.compile import make_train_step
from moe_jax.training.losses import model_summed_nats
from moe_jax.training.state import init_state, read_bias, step_key
from moe_jax.training.step import accumulate

# two documents, of 4 and 3 tokens, and one position of padding; a document's last token predicts the separator (9)
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
TOKENS = jnp.array([[11, 12, 13, 14, 9, 21, 22, 0]])
TARGETS = jnp.array([[12, 13, 14, 9, 21, 22, 9, 0]])


def packed() -> Batch:
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0]])
    rows = jnp.zeros(1, jnp.int32)
    return Batch(TOKENS, TARGETS, SEGMENTS, positions, SEGMENTS > 0, rows, rows + 7)


def pass_through(config, state) -> Pass:
    balancer = balance.make(config.balance, config.model)
    return Pass(inputs_of(packed()), balancer, PerLayer(state), jax.random.key(0), train=True)


def config_with(depth, **overrides):
    model = dict(mtp_depth=depth, num_layers=2, first_dense=1, init_std=0.3)
    settings = dict(batch_size=1, sequence_length=8, balance=dict(bias_sign=dict(rate=0.1)), num_steps=10)
    return tiny_config(**(settings | overrides), model=model)


def test_a_position_sees_the_token_k_later_and_predicts_the_next_within_its_document():
    seen = ahead_of(Inputs(TOKENS, SEGMENTS, SEGMENTS), 1)
    targets, valid = ahead_targets(packed(), 1)
    np.testing.assert_array_equal(seen.segment_ids, [[1, 1, 1, 0, 2, 2, 0, 0]])
    np.testing.assert_array_equal(seen.tokens[seen.segment_ids > 0], [12, 13, 14, 21, 22])
    np.testing.assert_array_equal(targets[valid], [13, 14, 9, 22, 9])
    assert ahead_targets(packed(), 3)[1].sum() == 1  # of 4 and 3 tokens, three positions later: 1 and 0


def test_a_target_weighs_the_same_at_every_depth_and_nothing_outside_its_document():
    weights = jnp.array([[0.0, 2.0, 0.5, 3.0, 1.0, 0.0, 4.0, 0.0]])
    (_, first), (_, third) = (ahead_targets(packed()._replace(mask=weights), depth) for depth in (1, 3))
    np.testing.assert_array_equal(first, [[2.0, 0.5, 3.0, 0.0, 0.0, 4.0, 0.0, 0.0]])
    np.testing.assert_array_equal(third, [[3.0, 0, 0, 0, 0, 0, 0, 0]])


@functools.cache
def stepped(depth):
    config = config_with(depth)
    before = init_state(config)
    return config, before, make_train_step(config)(init_state(config), packed(), step_key(config))


def test_its_layers_route_and_count_only_tokens_with_a_token_to_see():
    loads = stepped(2)[2][1]["loads"]  # [L, E]: one MoE layer, then depths 1 and 2; two experts a token
    np.testing.assert_array_equal(loads.sum(-1), [2 * 7, 2 * 5, 2 * 3])


def test_the_bias_moves_in_its_layers_against_their_own_loads():
    _, before, (after, values) = stepped(2)
    moved = read_bias(after.bias) - read_bias(before.bias)
    loads = values["loads"]
    np.testing.assert_array_equal(np.sign(moved), np.sign(loads.mean(-1, keepdims=True) - loads))
    assert (moved != 0).any(-1).all()


def test_the_loss_weights_the_mean_over_depths_and_divides_by_the_tokens_of_the_step():
    config, before, (_, values) = stepped(2)
    nats, ahead, *_ = model_summed_nats(
        config, before.params, before.bias, pass_through(config, before.balance), packed()
    )
    assert ahead.targets == 5 + 3
    np.testing.assert_allclose(values["total_loss"], (nats + 0.3 / 2 * ahead.nats) / 7, rtol=1e-6)
    np.testing.assert_allclose(values["loss"], nats / 7, rtol=1e-6)
    np.testing.assert_allclose(values["mtp/loss"], ahead.nats / 8, rtol=1e-6)


def test_every_part_of_it_learns_and_so_do_embedding_and_head_through_it():
    config, before, _ = stepped(2)
    only = replace(config, mtp_weights=(1e6,))
    grads = accumulate(only, before, packed(), step_key(config))[1]
    for path, grad in jax.tree_util.tree_leaves_with_path(grads["mtp"]):
        by_depth = np.abs(np.asarray(grad)).reshape(2, -1).max(-1)
        assert (by_depth > 0).all(), jax.tree_util.keystr(path)
    assert np.abs(grads["embedding"][22]).max() > 0 and np.abs(grads["head"]).max() > 0


def test_weights_follow_their_milestones():
    config = config_with(1, mtp_weights=(0.3, 0.1, 0.0), mtp_milestones=(0.5, 0.9))
    weights = [float(prediction_weight(config, jnp.int32(step))) for step in range(10)]
    np.testing.assert_allclose(weights, [0.3] * 5 + [0.1] * 4 + [0.0])


def test_logits_do_not_depend_on_it():
    with_it, without = (next_token_nats(depth) for depth in (2, 0))
    np.testing.assert_array_equal(with_it, without)


def next_token_nats(depth):
    """Nats of the next token, with the same parameters except those of multi-token prediction."""
    config, state = config_with(depth), init_state(config_with(2))
    params, bias = ({k: v for k, v in tree.items() if depth or k != "mtp"} for tree in (state.params, state.bias))
    return model_summed_nats(config, params, bias, pass_through(config, init_state(config).balance), packed())[0]


def test_two_micro_batches_give_the_gradient_of_one_batch():
    batch = jax.tree.map(lambda a: jnp.concatenate([a, a]), packed())
    batch = batch._replace(tokens=batch.tokens.at[1, 2].set(77), targets=batch.targets.at[1, 1].set(77))
    config = config_with(1, batch_size=2)
    state = init_state(config)
    one, two = (
        accumulate(replace(config, micro_batches=count), state, batch, jax.random.key(0))[1] for count in (1, 2)
    )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max(), err_msg=jax.tree_util.keystr(path))


def test_its_layers_are_measured_like_the_others():
    config = config_with(2, balance=dict(aux_loss=dict(weight=0.1)), measure_every=1)
    values = measure(config, init_state(config), packed(), step_key(config))
    ratio = values["interference/router_ratio"]
    assert ratio.shape == (3,) and np.isfinite(ratio).all() and (ratio > 0).all()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(mtp_weights=()), "mtp_weights=()"),
        (dict(mtp_weights=(0.3, -0.1), mtp_milestones=(0.5,)), "mtp_weights=(0.3, -0.1)"),
        (dict(mtp_weights=(0.3, 0.1), mtp_milestones=(1.5,)), "mtp_milestones=(1.5,)"),
        (dict(model=dict(mtp_depth=16)), "model.mtp_depth=16"),
        (dict(model=dict(attention="mla", qk_rope_head_dim=3)), "model.qk_rope_head_dim=3"),
        (dict(model=dict(attention="mla", qk_norm="head")), "model.qk_norm='head'"),
        (dict(model=dict(yarn=dict(factor=4.0, beta_fast=0.5))), "model.yarn.beta_fast=0.5"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        tiny_config(**overrides)
