"""phi-balancing: prices and average by hand, sums that do not depend on the split, experts that compute nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import balance
from moe_jax.balance.phi import digit_sums, of_digits
from moe_jax.config import ModelConfig
from moe_jax.routing import RouterConfig, Tokens, route

NO_ROUTER = jnp.zeros((1, 2))
TWO = [[0.75, 0.25], [0.25, 0.75], [0.875, 0.125]]  # shares of three tokens: their mean is 5/8, 3/8


def made(model=ModelConfig(), **options):
    return balance.make({"phi_loss": options}, model)


def routed(shares, mask=None):
    """The routing of tokens with these softmax scores."""
    mask = jnp.ones(len(shares), bool) if mask is None else jnp.asarray(mask)
    return route(jnp.log(jnp.asarray(shares)), RouterConfig(top_k=1, score="softmax"), tokens=Tokens(mask=mask))


def loss_at(mean, shares=TWO, **options) -> float:
    balancer = made(**options)
    routing = routed(shares)
    state = {"bias": jnp.zeros(2), "phi_loss": jnp.asarray(mean)}
    return float(balancer.loss(routing, balancer.observe(routing), state, NO_ROUTER))


def test_prices_are_the_gradient_of_the_potential_up_to_a_constant():
    # m = (3/4, 1/4): entropy prices log 3/2 and log 1/2, euclidean 1/4 and -1/4; P = (5/8, 3/8)
    expected = 0.5 * (5 / 8 * np.log(3 / 2) + 3 / 8 * np.log(1 / 2))
    np.testing.assert_allclose(loss_at([0.75, 0.25], weight=0.5), expected, rtol=1e-5)
    np.testing.assert_allclose(loss_at([0.75, 0.25], weight=0.5, potential="euclidean"), 0.5 * 1 / 16, rtol=1e-5)


@pytest.mark.parametrize("potential", ["negative_entropy", "euclidean"])
def test_the_prices_are_those_of_the_potential(potential):
    phi = {"negative_entropy": lambda m: (m * jnp.log(m)).sum(), "euclidean": lambda m: (m**2).sum() / 2}[potential]
    mean = jnp.asarray([0.5, 0.3, 0.2])
    each = [loss_at_three(mean, expert, potential) for expert in range(3)]
    expected = np.asarray(jax.grad(phi)(mean))
    np.testing.assert_allclose(np.diff(each), np.diff(expected), rtol=1e-5)


def loss_at_three(mean, expert: int, potential: str) -> float:
    """The loss of a token whose whole score is at one expert."""
    balancer = made(weight=1.0, potential=potential)
    logits = 60.0 * jax.nn.one_hot(jnp.asarray([expert]), 3)
    routing = route(logits, RouterConfig(top_k=1, score="softmax"))
    state = {"bias": jnp.zeros(3), "phi_loss": mean}
    return float(balancer.loss(routing, balancer.observe(routing), state, jnp.zeros((1, 3))))


def test_a_uniform_average_has_no_price():
    assert loss_at([0.5, 0.5], weight=1.0) == 0.0
    assert made().init(2)["phi_loss"].tolist() == [0.5, 0.5]


def test_the_average_moves_once_a_step_by_the_mean_share_of_valid_tokens():
    balancer = made(ema=0.75)
    state = balancer.init(2)
    statistics = balancer.observe(routed([*TWO, [0.1, 0.9]], mask=[True, True, True, False]))
    state = balancer.update(statistics, state, jnp.int32(0))
    # 3/4 x (1/2, 1/2) + 1/4 x (5/8, 3/8)
    np.testing.assert_allclose(state["phi_loss"], [17 / 32, 15 / 32], rtol=1e-6)


def test_the_price_has_no_gradient_and_the_scores_have_that_of_a_linear_loss():
    balancer = made(weight=1.0)
    shares = np.asarray(TWO)

    def loss(logits, mean):
        routing = route(logits, RouterConfig(top_k=1, score="softmax"))
        return balancer.loss(routing, balancer.observe(routing), {"bias": jnp.zeros(2), "phi_loss": mean}, NO_ROUTER)

    prices = np.log([1.5, 0.5])
    to_logits = jax.grad(loss)(jnp.log(shares), jnp.asarray([0.75, 0.25]))
    # d/dz_ti of sum_j p_tj a_j / T is p_ti (a_i - sum_j p_tj a_j) / T
    expected = shares * (prices - (shares * prices).sum(1, keepdims=True)) / 3
    np.testing.assert_allclose(to_logits, expected, rtol=1e-4, atol=1e-7)


def test_zero_computation_experts_are_left_out():
    model = ModelConfig(num_experts=2, num_zero_experts=1)
    balancer = made(model, ema=0.0)
    state = balancer.init(3)
    assert state["phi_loss"].shape == (2,)
    routing = routed([[0.6, 0.2, 0.2]])  # of those that compute: 3/4 and 1/4
    state = balancer.update(balancer.observe(routing), state, jnp.int32(0))
    np.testing.assert_allclose(state["phi_loss"], [0.75, 0.25], rtol=1e-5)


def test_sums_by_digit_are_exact_to_the_last_digit_and_at_both_ends():
    values = np.random.default_rng(0).random((257, 3)).astype(np.float32)
    values[:2] = [[0, 1, 1], [1, 0, 1]]
    rounded = np.round(values.astype(np.float64) * 16**5) / 16**5
    np.testing.assert_allclose(of_digits(digit_sums(jnp.asarray(values))), rounded.sum(0), rtol=1e-6)
    halves = digit_sums(jnp.asarray(values[:100])) + digit_sums(jnp.asarray(values[100:]))
    np.testing.assert_array_equal(halves, digit_sums(jnp.asarray(values)))
    assert digit_sums(jnp.ones((1, 1))).tolist() == [[16, 0, 0, 0, 0]]
    assert digit_sums(jnp.full((1, 1), 16.0**-5)).tolist() == [[0, 0, 0, 0, 1]]
