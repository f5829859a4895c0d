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


# --- top_p --------------------------------------------------------------------------------------------------

SHARES = [[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.2, 0.1, 0.7]]


def chosen(p: float, shares=SHARES, **options) -> list[list[int]]:
    state = {"bias": jnp.zeros(3), "top_p": jnp.asarray([p, p])}
    return experts(routed("top_p", jnp.log(jnp.asarray(shares)), state=state, **options)[1])


def test_a_token_uses_its_best_experts_until_their_shares_reach_the_threshold():
    # cumulative shares .6 .9 1, .4 .75 1 and .7 .9 1: the expert that reaches the threshold is still used
    assert chosen(0.65) == [[0, 1], [0, 1], [2]]
    assert chosen(0.8) == [[0, 1], [0, 1, 2], [0, 2]]
    assert chosen(1.0) == [[0, 1, 2]] * 3
    assert chosen(0.8, slots=2) == [[0, 1], [0, 1], [0, 2]]


def test_a_token_always_has_its_best_expert():
    assert chosen(0.0) == [[0], [0], [2]]
    # all scores underflow to 0: none has a share of their sum
    state = {"bias": jnp.zeros(3), "top_p": jnp.asarray([0.5, 0.5])}
    select = functools.partial(balance.make({"top_p": {}}).select, state=state)
    ids = route(jnp.full((1, 3), -200.0), RouterConfig(top_k=1), select=select).expert_ids
    assert ids[0].tolist() == [0, 3, 3]


def controlled(state, loads, tokens: int, step: int = 0, **options) -> list[float]:
    """The controller's integral and threshold after a step with these loads."""
    balancer = balance.make({"top_p": {"proportional": 0.5, "integral": 0.25} | options}, ModelConfig(top_k=2))
    statistics = {"loads": jnp.asarray(loads, jnp.int32), "top_p": jnp.int32(tokens)}
    state = {"bias": jnp.zeros(4), "top_p": jnp.asarray(state)}
    return balancer.update(statistics, state, jnp.int32(step))["top_p"].tolist()


def test_the_threshold_is_the_sum_of_the_last_error_and_of_all_errors():
    # 10 copies of 4 tokens instead of 8: e = (2 - 2.5) / 4 = -1/8; I = 1/2 - 1/32; P = I - 1/16
    assert controlled([0.5, 0.7], [4, 3, 2, 1], 4) == [0.46875, 0.40625]
    # on target: P returns to I
    assert controlled([0.5, 0.7], [2, 2, 2, 2], 4) == [0.5, 0.5]
    # an error that cannot be corrected does not wind up
    assert controlled([1.0, 1.0], [1, 1, 1, 1], 4) == [1.0, 1.0]
    assert controlled([0.5, 0.7], [4, 3, 2, 1], 4, step=3, freeze_step=3) == [0.5, np.float32(0.7)]


def test_tokens_come_to_have_k_experts_on_average_whatever_their_scores():
    balancer = balance.make({"top_p": {}}, ModelConfig(top_k=3))

    def step(state, inputs):
        key, scale = inputs
        logits = scale * jax.random.normal(key, (512, 8))
        select = functools.partial(balancer.select, state=state)
        routing = route(logits, RouterConfig(top_k=3, score="softmax"), select=select, train=True)
        return balancer.update(balancer.observe(routing), state, jnp.int32(0)), routing.loads.sum() / 512

    scales = jnp.repeat(jnp.asarray([0.3, 3.0]), 100)  # first undecided tokens, then confident ones
    keys = jax.random.split(jax.random.key(0), 200)
    mean = np.asarray(jax.jit(lambda x: jax.lax.scan(step, balancer.init(8), x)[1])((keys, scales)))
    assert abs(mean[100] - 3.0) > 1.0
    np.testing.assert_allclose([mean[80:100].mean(), mean[180:].mean()], [3.0, 3.0], atol=0.05)
