"""Methods by which tokens differ in their number of experts: choices, losses and controllers by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import balance
from moe_jax.config import ModelConfig
from moe_jax.routing import RouterConfig, Tokens, route

NO_ROUTER = jnp.zeros((1, 3))
LOGITS = [[2.0, -1.0, 1.0], [-3.0, -1.0, -2.0], [1.0, 3.0, 2.0]]  # two, no and three experts have a positive logit


def routed(name: str, logits, top_k: int = 1, mask=None, state=None, **options):
    """The balancer, and the routing of the logits with raw gates."""
    balancer = balance.make({name: options}, ModelConfig(top_k=top_k))
    logits = jnp.asarray(logits)
    state = balancer.init(logits.shape[1]) if state is None else state
    router = RouterConfig(top_k=top_k, score="relu" if name == "relu" else "softmax", normalize_gates=False)
    select = functools.partial(balancer.select, state=state)
    tokens = Tokens(mask=None if mask is None else jnp.asarray(mask))
    return balancer, route(logits, router, state["bias"], tokens=tokens, select=select, train=True)


def experts(routing) -> list[list[int]]:
    """The experts of each token."""
    return [sorted(e for e in row if e < routing.scores.shape[1]) for row in routing.expert_ids.tolist()]


# --- relu ---------------------------------------------------------------------------------------------------


def test_a_token_uses_the_experts_with_a_positive_logit_and_their_logits_are_the_gates():
    _, routing = routed("relu", LOGITS)
    assert experts(routing) == [[0, 2], [], [0, 1, 2]]
    at_experts = jnp.zeros((3, 4)).at[jnp.arange(3)[:, None], routing.expert_ids].add(routing.gates)
    assert at_experts.tolist() == [[2, 0, 1, 0], [0, 0, 0, 0], [1, 3, 2, 0]]


def test_a_limit_of_slots_keeps_the_best():
    _, routing = routed("relu", LOGITS, slots=2)
    assert experts(routing) == [[0, 2], [], [1, 2]]
    assert routing.expert_ids.shape == (3, 2)


def test_the_output_is_continuous_where_an_expert_comes_or_goes():
    # gates at a logit just above and just below 0 differ by that logit only, unlike those of top-k
    gates = [routed("relu", [[1.0, x, -1.0]])[1].gates.sum() for x in (-1e-6, 1e-6)]
    np.testing.assert_allclose(np.diff(gates), 1e-6, rtol=0.2)


def test_the_l1_loss_weighs_mean_scores_by_loads():
    # copies 2 1 2 of 3 tokens: f = E / (k T) x copies = (2, 1, 2); P = (3, 3, 3) / 3; 0.5 x (2 + 1 + 2)
    balancer, routing = routed("relu", LOGITS, weight=0.5)
    loss = balancer.loss(routing, balancer.observe(routing), balancer.init(3), NO_ROUTER)
    np.testing.assert_allclose(loss, 2.5, rtol=1e-6)
    # without the last token: copies 1 0 1 of 2 tokens, f = (3/2, 0, 3/2), P = (1, 0, 1/2)
    balancer, routing = routed("relu", LOGITS, weight=0.5, mask=[True, True, False])
    loss = balancer.loss(routing, balancer.observe(routing), balancer.init(3), NO_ROUTER)
    np.testing.assert_allclose(loss, 0.5 * 2.25, rtol=1e-6)


def after(state, loads, tokens: int, **options) -> float:
    """The factor on the first coefficient after a step with these loads."""
    balancer = balance.make({"relu": options}, ModelConfig(top_k=1))
    state = {"bias": jnp.zeros(3), "relu": jnp.float32(state)}
    statistics = {"loads": jnp.asarray(loads, jnp.int32), "relu": jnp.int32(tokens)}
    return float(jnp.exp(balancer.update(statistics, state, jnp.int32(0))["relu"]))


def test_the_coefficient_grows_by_its_factor_above_k_experts_a_token_and_shrinks_below():
    np.testing.assert_allclose(after(0.0, [2, 2, 1], 4), 1.2, rtol=1e-6)
    np.testing.assert_allclose(after(0.0, [1, 1, 1], 4), 1 / 1.2, rtol=1e-6)
    np.testing.assert_allclose(after(0.0, [2, 1, 1], 4), 1.0)
    np.testing.assert_allclose(after(np.log(7.0), [3, 1, 1], 4, limit=8.0), 8.0, rtol=1e-5)


def test_tokens_come_to_have_k_experts_on_average_against_a_pull_towards_more():
    balancer = balance.make({"relu": {}}, ModelConfig(top_k=2))
    router = RouterConfig(top_k=2, score="relu", normalize_gates=False)

    def step(carry, key):
        offset, state = carry

        def loss(offset):
            logits = offset + jax.random.normal(key, (256, 8))
            select = functools.partial(balancer.select, state=state)
            routing = route(logits, router, select=select, train=True)
            statistics = balancer.observe(routing)
            return balancer.loss(routing, statistics, state, NO_ROUTER) - 0.05 * logits.mean(), statistics

        gradient, statistics = jax.grad(loss, has_aux=True)(offset)
        state = balancer.update(statistics, state, jnp.int32(0))
        return (offset - gradient, state), statistics["loads"]

    start, keys = (jnp.zeros((1, 8)), balancer.init(8)), jax.random.split(jax.random.key(0), 400)
    loads = np.asarray(jax.jit(lambda keys: jax.lax.scan(step, start, keys)[1])(keys))
    mean = loads.sum(1) / 256
    assert mean[0] > 3.5  # half of all logits are positive
    np.testing.assert_allclose(mean[-100:].mean(), 2.0, atol=0.2)


@pytest.mark.parametrize(
    ("model", "options", "problem"),
    [
        ({}, {}, r"balance\.relu works with model\.score='relu' only, but it is 'sigmoid'"),
        (
            {"score": "relu"},
            {"slots": 1},
            r"balance\.relu\.slots=1 must be from model\.top_k=2, the mean",
        ),
        (
            {"score": "relu"},
            {"slots": 5},
            r"balance\.relu\.slots=5 must be from model\.top_k=2, the mean",
        ),
    ],
)
def test_what_relu_cannot_do_is_refused(model, options, problem):
    with pytest.raises(ValueError, match=problem):
        tiny_config(model=model, balance={"relu": options})


def test_relu_scores_need_the_method_that_selects_by_them():
    with pytest.raises(ValueError, match=r"model\.score='relu' selects .* balance does not have it; add relu=\{\}"):
        tiny_config(model={"score": "relu"}, balance={"aux_loss": {}})
    tiny_config(model={"score": "relu"}, balance={"relu": {"slots": 3}})
