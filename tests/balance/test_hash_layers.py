"""DeepSeek-V4's routing in one scan: a table of token ids in the first layers, biased scores in the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conftest import tiny_config
from moe_jax import balance
from moe_jax.data import open_corpus, training_batches
from moe_jax.model.abstract import abstract_model
from moe_jax.model.forward import Inputs, Pass, PerLayer, next_inputs
from moe_jax.training.compile import make_train_step
from moe_jax.training.state import init_state, read_bias, step_key, write_bias

LAYERS, HASHED, EXPERTS, SLOTS, ROWS, LENGTH = 4, 3, 8, 2, 3, 12
CONFIG = tiny_config(
    balance=dict(
        hash=dict(layers=(0, HASHED)),
        bias_sign=dict(rate=1e-2, layers=(HASHED, LAYERS)),
        aux_loss=dict(weight=1e-4, scope="sequence", counts="unbiased"),
    ),
    model=dict(
        num_layers=LAYERS,
        first_dense=0,
        num_experts=EXPERTS,
        top_k=SLOTS,
        score="sqrt_softplus",
        gate_scale=1.5,
        init_std=0.2,
    ),
)
TOKENS = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, 256)


@functools.cache
def built():
    """The model, with biases far from zero in every layer, including the hash layers; and its state."""
    state = init_state(CONFIG)
    bias = jnp.linspace(-3.0, 3.0, LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
    state = state._replace(bias=write_bias(state.bias, bias))
    module = nnx.merge(abstract_model(CONFIG.model).graphdef, state.params, state.bias)
    return module, state


def passing(inputs, train=False) -> Pass:
    balancer = balance.make(CONFIG.balance, CONFIG.model)
    return Pass(inputs, balancer, PerLayer(built()[1].balance), jax.random.key(0), train)


@functools.cache
def routing(train: bool):
    """The routing of the whole batch, with leaves [L, T, ...]."""
    module, _ = built()
    inputs = Inputs(TOKENS, jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape), jnp.ones_like(TOKENS))
    run = jax.jit(lambda inputs: module(passing(inputs, train)))
    return jax.tree.map(np.asarray, run(inputs)[1].details.routing)


def test_the_first_layers_follow_their_tables_whatever_scores_and_bias_are():
    tables = np.asarray(built()[1].balance["hash"]["own"]["table"])
    ids = np.asarray(TOKENS).ravel()
    for layer in range(HASHED):
        np.testing.assert_array_equal(routing(True).expert_ids[layer], tables[layer][ids])
    assert (tables[0] != tables[1]).any()
    assert (routing(True).expert_ids[HASHED] != tables[HASHED][ids]).any()


def test_the_other_layers_choose_by_biased_scores_among_all_experts():
    found = routing(True)
    scores = np.sqrt(np.log1p(np.exp(found.logits[HASHED].astype(np.float64))))
    order = np.argsort(-(scores + np.asarray(read_bias(built()[1].bias))[HASHED]), axis=1)
    np.testing.assert_array_equal(found.expert_ids[HASHED], order[:, :SLOTS])


def test_gates_are_the_learned_scores_of_the_chosen_normalised_and_scaled_in_every_layer():
    found = routing(True)
    scores = np.sqrt(np.log1p(np.exp(found.logits.astype(np.float64))))
    chosen = np.take_along_axis(scores, found.expert_ids, axis=2)
    np.testing.assert_allclose(found.gates, 1.5 * chosen / chosen.sum(2, keepdims=True), rtol=1e-5)


def test_evaluation_routes_as_training():
    for name in ("expert_ids", "gates"):
        np.testing.assert_array_equal(getattr(routing(True), name), getattr(routing(False), name))


def test_one_token_at_a_time_is_routed_as_the_whole_sequence():
    module, _ = built()
    extend = jax.jit(lambda *new, cache: module.extend(passing(next_inputs(*new)), cache))
    cache = module.init_cache(ROWS, LENGTH)
    whole = routing(False)
    ids, gates = (a.reshape(LAYERS, ROWS, LENGTH, SLOTS) for a in (whole.expert_ids, whole.gates))
    for place in range(LENGTH):
        at = jnp.full((ROWS, 1), place)
        _, report, cache = extend(TOKENS[:, place : place + 1], at, cache=cache)
        np.testing.assert_array_equal(report.details.routing.expert_ids, ids[:, :, place])
        np.testing.assert_allclose(report.details.routing.gates, gates[:, :, place], rtol=1e-4)


@functools.cache
def trained(steps: int = 3):
    """The states before and after a few steps on text."""
    data = training_batches(open_corpus(""), seed=0, batch_size=8, sequence_length=16)
    before = init_state(CONFIG)
    step = make_train_step(CONFIG)
    state = before
    for number in range(steps):
        state, _ = step(jax.tree.map(jnp.copy, state), jax.tree.map(jnp.asarray, data(number)), step_key(CONFIG))
    return before, state


def test_the_bias_of_hash_layers_stays_where_it_was_and_that_of_the_others_learns():
    bias = np.asarray(read_bias(trained()[1].bias))
    np.testing.assert_array_equal(bias[:HASHED], 0.0)
    assert np.abs(bias[HASHED]).max() > 0.005


def test_the_tables_do_not_change_and_the_routers_of_hash_layers_learn_for_their_gates():
    before, after = trained()
    np.testing.assert_array_equal(before.balance["hash"]["own"]["table"], after.balance["hash"]["own"]["table"])
    routers = [np.asarray(s.params["stacks"][0]["blocks"][0]["ffw"]["router"]) for s in (before, after)]
    assert all((a != b).any() for a, b in zip(*routers, strict=True))
