"""The methods that move the bias: their papers' arithmetic computed by hand, and the options that they share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import balance
from moe_jax.balance.bias import balanced_bias, needed_bias_histogram
from moe_jax.balance.measures import max_violation
from moe_jax.config import ModelConfig
from moe_jax.config.balance import BALANCE_METHODS
from moe_jax.routing import RouterConfig, Tokens, route

METHODS = sorted(name for name, o in BALANCE_METHODS.items() if o.moves_bias and not o.selects)
BY_LOADS = [name for name in METHODS if name != "quantile"]  # they read only loads
SKEWED = np.asarray([0, 2, 3, 7], np.int32)  # mean 3, errors 3 1 0 -4, relative to the mean: 1 1/3 0 -4/3
LEVEL = np.asarray([3, 3, 3, 3], np.int32)
TILT = np.asarray([0.4, 0.0, -0.1, -0.3], np.float32)
# two real experts and a zero-computation expert whose target is a quarter: of 24 copies 9, 9 and 6
WITH_ZERO = (("num_experts", 2), ("num_zero_experts", 1), ("zero_share", 0.25))
ZERO_LOADS = np.asarray([12, 3, 9], np.int32)


@functools.cache
def made(method: str, model: tuple = (), **options: Any) -> balance.Balancer:
    return balance.make({method: options}, ModelConfig(**dict(model)))


@functools.cache
def compiled(method: str, model: tuple = (), **options: Any):
    return jax.jit(made(method, model, **options).update)


def fresh(method: str, num_experts: int = 4, layer: int = 0, **options: Any) -> balance.State:
    return jax.tree.map(np.asarray, made(method, **options).init(num_experts, layer))


def step_by_step(method: str, *all_loads: np.ndarray, start: int = 0, bias=None, **options: Any) -> list[balance.State]:
    """The state after each step, from the loads of these steps."""
    state = fresh(method, len(all_loads[0]), **options)
    state |= {} if bias is None else {"bias": np.asarray(bias, np.float32)}
    states = []
    for i, loads in enumerate(all_loads):
        state = compiled(method, **options)({"loads": loads}, state, np.int32(start + i))
        states.append(jax.tree.map(np.asarray, state))
    return states


def moved(method: str, *all_loads: np.ndarray, **options: Any) -> np.ndarray:
    """The bias after the last of these steps."""
    return step_by_step(method, *all_loads, **options)[-1]["bias"]


# --- the published arithmetic -------------------------------------------------------------------------------

PROPORTIONAL = {
    "relative": [0.5, 0.5 / 3, 0.0, -2.0 / 3],  # errors over the mean of 3, times 0.5
    "fraction": [0.125, 0.125 / 3, 0.0, -0.5 / 3],  # over all 12 copies
    "count": [1.5, 0.5, 0.0, -2.0],
}


@pytest.mark.parametrize("error", PROPORTIONAL)
def test_proportional_rule_of_table_3_in_each_unit_of_the_error(error):
    np.testing.assert_allclose(
        moved("bias_proportional", SKEWED, rate=0.5, error=error), PROPORTIONAL[error], rtol=1e-6, atol=1e-7
    )


def test_the_relative_error_is_the_default_and_does_not_see_the_size_of_the_batch():
    small = moved("bias_proportional", SKEWED, rate=0.5)
    np.testing.assert_allclose(moved("bias_proportional", 1000 * SKEWED, rate=0.5), small, atol=1e-7)
    np.testing.assert_allclose(small, PROPORTIONAL["relative"], rtol=1e-6, atol=1e-7)


def test_multiplicative_bias_starts_at_one_and_moves_by_signs():
    np.testing.assert_array_equal(fresh("bias_multiplicative")["bias"], np.ones(4, np.float32))
    np.testing.assert_allclose(moved("bias_multiplicative", SKEWED, rate=0.5), [1.5, 1.5, 1.0, 0.5])


def test_multiplicative_bias_selects_by_products_and_pays_by_scores():
    # scores 0.5 0.4 0.2 times 1 2 2 are 0.5 0.8 0.4: experts 1 and 0; their sums 1.5 2.4 2.2 would give 1 and 2
    scores = np.asarray([[0.5, 0.4, 0.2]], np.float32)
    bias = np.asarray([1.0, 2.0, 2.0], np.float32)
    combine = made("bias_multiplicative").combine
    router = RouterConfig(top_k=2, normalize_gates=False)
    pick = jax.jit(lambda logits, bias: route(logits, router, bias, combine=combine))
    routing = pick(logit(scores), bias)
    np.testing.assert_array_equal(routing.expert_ids, [[1, 0]])
    np.testing.assert_allclose(routing.gates, [[0.4, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(routed(logit(scores), bias, top_k=2).expert_ids, [[1, 2]])


def test_rms_rule_divides_the_errors_by_their_root_mean_square():
    # the mean of 9 1 0 16 is 6.5, its root 2.54951
    expected = 0.5 * np.asarray([3, 1, 0, -4]) / 2.54951
    np.testing.assert_allclose(moved("bias_rms", SKEWED, rate=0.5), expected, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt((moved("bias_rms", SKEWED, rate=0.5) ** 2).mean()), 0.5, rtol=1e-6)


def test_rms_rule_moves_nothing_in_balance():
    np.testing.assert_array_equal(moved("bias_rms", LEVEL, rate=0.5, bias=TILT), TILT)


def test_rms_rule_does_not_amplify_rounding_of_float32():
    # targets of 0.9 x 90 / 3 = 27 are not quite 27 in float32, and errors of 1e-7 over their own size would be 1
    model = (("num_experts", 3), ("num_zero_experts", 1), ("zero_share", 0.1))
    loads = np.asarray([27, 27, 27, 9], np.int32)
    np.testing.assert_array_equal(moved("bias_rms", loads, rate=0.5, model=model), np.zeros(4))


def test_pi_rule_without_gain_is_longcat_flash_with_its_zero_computation_experts():
    # K_e / K = 3/4 of 24 copies over N = 2: target share 0.375; shares 12/24 and 3/24; nothing for the zero expert
    # 0.8 (0.375 - 0.5) = -0.1, 0.8 (0.375 - 0.125) = 0.2
    np.testing.assert_allclose(moved("bias_pi", ZERO_LOADS, rate=0.8, model=WITH_ZERO), [-0.1, 0.2, 0.0], rtol=1e-6)
    twice = moved("bias_pi", ZERO_LOADS, ZERO_LOADS, rate=0.8, model=WITH_ZERO)
    np.testing.assert_allclose(twice, [-0.2, 0.4, 0.0], rtol=1e-6)


def test_gain_adds_the_last_error_alone_to_the_sum_of_all():
    # errors (3 1 0 -4) / 12 then 0: first 0.2 e + 0.4 e, and then 0.2 e is left
    error = np.asarray([3, 1, 0, -4]) / 12
    first, second = step_by_step("bias_pi", SKEWED, LEVEL, rate=0.2, gain=0.4)
    np.testing.assert_allclose(first["bias"], 0.6 * error, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(second["bias"], 0.2 * error, rtol=1e-6, atol=1e-8)


def test_the_pi_rule_continues_from_a_bias_set_from_outside():
    # an imported bias has no history: TILT + (0.2 + 0.4) e
    error = np.asarray([3, 1, 0, -4]) / 12
    after = moved("bias_pi", SKEWED, rate=0.2, gain=0.4, bias=TILT)
    np.testing.assert_allclose(after, TILT + 0.6 * error, rtol=1e-6, atol=1e-7)


def test_smebu_is_a_centred_momentum_of_soft_clamped_errors():
    # loads 4 3 1 8: e = 0 1/4 3/4 -1; tanh(2 e) = 0 0.462117 0.905148 -0.964028, of mean 0.100809
    # b = m = 0.5 x 0.1 x (tanh - mean); in balance then the momentum halves, and b = 1.5 times the first
    first, second = step_by_step("bias_smebu", np.asarray([4, 3, 1, 8], np.int32), LEVEL, rate=0.1)
    expected = np.asarray([-0.00504047, 0.01806538, 0.04021694, -0.05324185])
    np.testing.assert_allclose(first["bias"], expected, rtol=1e-5)
    np.testing.assert_allclose(second["bias"], 1.5 * expected, rtol=1e-5)
    np.testing.assert_allclose(first["bias_smebu"], 0.5 * np.tanh([0.0, 0.5, 1.5, -2.0]), rtol=1e-6)


def test_smebu_equals_the_published_order_of_operations_over_many_steps():
    # v, tanh, rate, mean, momentum, bias: one after the other in float64
    rng = np.random.default_rng(0)
    momentum = np.zeros(4)
    bias = np.zeros(4)
    all_loads = [rng.integers(0, 20, 4).astype(np.int32) for _ in range(20)]
    for loads in all_loads:
        delta = 0.05 * np.tanh(3.0 * (loads.mean() - loads) / loads.mean())
        momentum = 0.7 * momentum + 0.3 * (delta - delta.mean())
        bias = bias + momentum
    after = moved("bias_smebu", *all_loads, rate=0.05, kappa=3.0, beta=0.7)
    np.testing.assert_allclose(after, bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "start"), [("bias_sign", 0.0), ("bias_multiplicative", 1.0)])
def test_signs_are_right_where_float32_cannot_distinguish_the_loads(method, start):
    # float32 rounds 2^25 + 1 to 2^25
    many = 2**25
    loads = np.asarray([many - 1, many, many, many + 1], np.int32)
    np.testing.assert_array_equal(moved(method, loads, rate=0.5), start + np.asarray([0.5, 0.0, 0.0, -0.5]))


# --- zero-computation experts -------------------------------------------------------------------------------

# targets 9 9 6 of loads 12 3 9: errors -3 6, relative -1/3 2/3, shares of 24 -1/8 1/4, signs -1 1
WITH_ZERO_MOVES = {
    "bias_sign": [-0.5, 0.5, 0.0],
    "bias_proportional": [-0.5 / 3, 1.0 / 3, 0.0],
    "bias_multiplicative": [0.5, 1.5, 1.0],
    "bias_rms": [-0.5 / np.sqrt(2.5), 1.0 / np.sqrt(2.5), 0.0],  # the mean of 1 and 4, over the real experts
    "bias_pi": [-0.0625, 0.125, 0.0],
    "bias_smebu": 0.25 * np.tanh([-2 / 3, 4 / 3, 0.0]),
}


@pytest.mark.parametrize("method", BY_LOADS)
def test_real_experts_share_the_remaining_copies_and_the_bias_of_zero_computation_experts_stays(method):
    options = {"zero_mean": False} if method == "bias_smebu" else {}
    after = moved(method, ZERO_LOADS, rate=0.5, model=WITH_ZERO, **options)
    np.testing.assert_allclose(after, WITH_ZERO_MOVES[method], rtol=1e-5)


@pytest.mark.parametrize("method", BY_LOADS)
def test_loads_at_the_targets_of_zero_computation_experts_move_nothing(method):
    at_target = np.asarray([9, 9, 6], np.int32)
    start = fresh(method, 3)["bias"]
    np.testing.assert_allclose(moved(method, at_target, rate=0.5, model=WITH_ZERO), start, atol=1e-6)


@pytest.mark.parametrize("method", ["bias_sign", "bias_smebu"])
def test_zero_mean_keeps_the_differences_to_a_zero_computation_expert(method):
    # the differences hold the budget; all biases shift together, which changes no selection
    plain, centred = (
        moved(method, ZERO_LOADS, ZERO_LOADS + 1, rate=0.5, model=WITH_ZERO, zero_mean=z) for z in (False, True)
    )
    np.testing.assert_allclose(plain - plain[2], centred - centred[2], atol=1e-6)
    np.testing.assert_allclose(centred.sum(), 0.0, atol=1e-6)


# --- shared options -----------------------------------------------------------------------------------------

OTHER = np.asarray([6, 2, 3, 1], np.int32)


@pytest.mark.parametrize("method", BY_LOADS)
def test_the_first_smoothed_step_is_that_of_its_loads(method):
    # an uncorrected average that starts at 0 would be a tenth of the loads, which an error in copies would show
    options = {"error": "count"} if method == "bias_proportional" else {}
    smoothed = moved(method, SKEWED, rate=0.5, ema=0.9, **options)
    np.testing.assert_allclose(smoothed, moved(method, SKEWED, rate=0.5, **options), rtol=1e-5, atol=1e-7)


def test_the_second_smoothed_step_sees_the_average_of_both():
    # weights 1/4 and 1/2 over their sum: (SKEWED + 2 OTHER) / 3 = 4 2 3 3, errors -1 1 0 0 of a mean of 3
    first, second = step_by_step("bias_proportional", SKEWED, OTHER, rate=0.3, ema=0.5)
    np.testing.assert_allclose(second["bias"] - first["bias"], [-0.1, 0.1, 0.0, 0.0], atol=1e-6)
    first, second = step_by_step("bias_sign", SKEWED, OTHER, rate=0.5, ema=0.5)
    np.testing.assert_allclose(second["bias"] - first["bias"], [-0.5, 0.5, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("method", BY_LOADS)
def test_warm_up_takes_a_quarter_of_the_first_step(method):
    start = fresh(method)["bias"]
    full, quarter = (moved(method, SKEWED, rate=0.5, **o) - start for o in ({}, {"warmup_steps": 4}))
    np.testing.assert_allclose(quarter, 0.25 * full, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", BY_LOADS)
def test_a_frozen_bias_does_not_move_whatever_its_method_remembers(method):
    # the two steps before step 10 leave a momentum, an average and a last error; steps 10 and 11 are frozen
    options = {"gain": 0.5} if method == "bias_pi" else {}
    states = step_by_step(
        method, SKEWED, SKEWED, OTHER, SKEWED, start=8, bias=TILT, rate=0.5, ema=0.5, freeze_step=10, **options
    )
    assert (states[1]["bias"] != states[0]["bias"]).any()
    for state in states[2:]:
        np.testing.assert_array_equal(state["bias"], states[1]["bias"])


@pytest.mark.parametrize("method", BY_LOADS)
def test_a_rate_of_zero_moves_nothing(method):
    np.testing.assert_array_equal(moved(method, SKEWED, OTHER, rate=0.0, bias=TILT), TILT)


@pytest.mark.parametrize("method", ["bias_sign", "bias_multiplicative", "bias_smebu"])
def test_zero_mean_holds_the_mean_where_the_increments_have_one(method):
    # signs 1 1 1 -1, or clamped errors 0.96 0.58 0.58 -0.96 and so on: none has mean 0 by itself
    loads = np.asarray([0, 2, 2, 8], np.int32)
    start = fresh(method)["bias"].mean()
    means = [moved(method, loads, loads, rate=0.5, zero_mean=z).mean() - start for z in (True, False)]
    assert abs(means[0]) < 1e-6 < 1e-2 < abs(means[1])


@pytest.mark.parametrize("method", METHODS)
def test_layers_name_the_moe_layers_in_which_a_method_acts(method):
    # of layers 0 to 3 those from 1 to 2
    balancer, everywhere = made(method, layers=(1, 3)), made(method)
    statistics = observer(method)(routed(random_logits(0), top_k=2))
    start = fresh(method)["bias"]
    for layer in range(4):
        after = compiled(method, layers=(1, 3))(statistics, balancer.init(4, layer), np.int32(0))["bias"]
        expected = compiled(method)(statistics, everywhere.init(4), np.int32(0))["bias"] if layer in (1, 2) else start
        np.testing.assert_array_equal(after, expected)
        assert (np.asarray(after) != start).any() == (layer in (1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_tokens_changes_nothing_that_a_method_keeps(method):
    options = {} if method == "quantile" else {"ema": 0.5}
    run = compiled(method, **options)
    observe = observer(method)
    tokens, nobody = (Tokens(mask=np.full(12, valid)) for valid in (True, False))
    some = observe(routed(random_logits(0), top_k=2, tokens=tokens))
    state = run(some, fresh(method, **options), np.int32(0))
    after = run(observe(routed(random_logits(1), state["bias"], top_k=2, tokens=nobody)), state, np.int32(1))
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("method", METHODS)
def test_each_class_is_balanced_by_its_own_tokens_and_an_absent_one_stays(method):
    # class 0 has tokens 0, 3, 6, ...; class 1 the others; class 2 none
    logits = random_logits(2)
    kind = (np.arange(12) % 3 > 0).astype(np.int32)
    bias = np.stack([TILT, TILT[::-1], TILT + 1.0])
    statistics = observer(method, num_classes=3)(routed(logits, bias, top_k=2, tokens=Tokens(kind=kind)))
    state = fresh(method, num_classes=3) | {"bias": bias}
    after = np.asarray(compiled(method, num_classes=3)(statistics, state, np.int32(0))["bias"])
    for c in (0, 1):
        alone = observer(method)(routed(logits, bias[c], top_k=2, tokens=Tokens(mask=kind == c)))
        expected = compiled(method)(alone, fresh(method) | {"bias": bias[c]}, np.int32(0))["bias"]
        np.testing.assert_allclose(after[c], expected, atol=1e-7)
        assert (after[c] != bias[c]).any()
    np.testing.assert_array_equal(after[2], bias[2])


def test_only_one_method_may_own_the_bias():
    with pytest.raises(ValueError, match="bias_smebu and quantile, but only one method may own the bias"):
        balance.make({"bias_smebu": {}, "quantile": {}})


# --- quantile balancing -------------------------------------------------------------------------------------


def random_logits(seed: int, tokens: int = 12, experts: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, experts)).astype(np.float32)


@functools.cache
def router(top_k: int):
    return jax.jit(lambda logits, bias, tokens: route(logits, RouterConfig(top_k=top_k), bias, tokens=tokens))


def routed(logits, bias=None, *, top_k: int, tokens: Tokens = Tokens()):
    bias = np.zeros(logits.shape[1], np.float32) if bias is None else bias
    return router(top_k)(logits, bias, tokens)


@functools.cache
def observer(method: str, **options: Any):
    return jax.jit(made(method, **options).observe)


@functools.cache
def histogram(bins: int):
    return jax.jit(lambda routing: needed_bias_histogram(routing, bins))


def logit(scores: np.ndarray) -> np.ndarray:
    return np.log(scores / (1 - scores)).astype(np.float32)


def test_quantile_bias_by_hand():
    # three tokens of one expert each, all choose expert 0; alpha is their second score: 0.5 0.6 0.4
    scores = np.asarray([[0.9, 0.5, 0.11], [0.8, 0.25, 0.6], [0.7, 0.4, 0.32]])
    # r = alpha - s of expert 0: -0.4 -0.2 -0.3, of 1: 0 0.35 0, of 2: 0.39 0 0.08
    # the target is one of three tokens each: the smallest r of each, -0.4 0 0, here up to one bin of 1e-5 above it
    statistics = observer("quantile", bins=200_000)(routed(logit(scores), top_k=1))
    plain, centred = (
        compiled("quantile", bins=200_000, zero_mean=z)(statistics, fresh("quantile", 3), np.int32(0))["bias"]
        for z in (False, True)
    )
    np.testing.assert_allclose(plain, [-0.4, 0.0, 0.0], atol=1.1e-5)
    np.testing.assert_allclose(centred, [-0.8 / 3, 0.4 / 3, 0.4 / 3], atol=1.1e-5)


def order_statistic(scores: np.ndarray, bias: np.ndarray, top_k: int) -> np.ndarray:
    """The bias with which each expert gets K / E of the tokens, by sorting in float64."""
    tokens, experts = scores.shape
    biased = scores.astype(np.float64) + bias
    alpha = -np.sort(-biased, axis=1)[:, top_k]
    needed = np.sort(alpha[:, None] - scores, axis=0)
    return needed[int(np.ceil(top_k * tokens / experts)) - 1]


@pytest.mark.parametrize("tokens", [64, 61])  # 64 x 3 / 8 = 24 exactly; 61 x 3 / 8 = 22.875 is just below the 23rd
@pytest.mark.parametrize(("middle", "spread"), [(0.0, 0.0), (0.0, 0.1), (40.0, 3.0), (-40.0, 3.0)])
def test_quantile_is_the_order_statistic_within_one_bin_wherever_the_biases_are(tokens, middle, spread):
    # around 40, a fixed range of [-1, 1] or [-2, 2] would clip all of them
    rng = np.random.default_rng(tokens)
    bias = (middle + spread * rng.normal(size=8)).astype(np.float32)
    routing = routed(random_logits(3, tokens, 8), bias, top_k=3)
    found = jax.jit(balanced_bias)(routing.loads, histogram(1000)(routing), bias)
    expected = order_statistic(np.asarray(routing.scores), bias, 3)
    assert (abs(expected) > 20).all() == (middle != 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=(bias.max() - bias.min() + 2) / 1000 + 1e-5)


@pytest.mark.parametrize(("top_k", "reached"), [(1, (1.0, 3.0)), (2, (-2.0, 0.0))])
def test_bins_reach_as_far_as_biases_and_scores_can(top_k, reached):
    # biases 2 2 -1 and scores near 0 and 1: r in [-2, 3]. With K = 1 alpha may be 2 + 1 where s_2 = 0, so r_2 = 3;
    # with K = 2 it may be -1 + 0 where s_0 = 1, so r_0 = -2
    bias = np.asarray([2.0, 2.0, -1.0], np.float32)
    routing = routed(8 * random_logits(4, 400, 3), bias, top_k=top_k)
    alpha = -np.sort(-(np.asarray(routing.scores) + bias), axis=1)[:, top_k]
    r = alpha[:, None] - np.asarray(routing.scores)
    np.testing.assert_allclose([r.min(), r.max()], reached, atol=0.1)
    by_numpy = [np.histogram(r[:, j], bins=7, range=(-2.0, 3.0))[0] for j in range(3)]
    np.testing.assert_array_equal(histogram(7)(routing), by_numpy)


def test_histogram_counts_every_valid_token_once_for_every_expert():
    mask = np.arange(12) % 3 > 0
    logits, garbage = random_logits(5), random_logits(6)
    garbage[mask] = logits[mask]
    whole, other = (histogram(50)(routed(a, TILT, top_k=2, tokens=Tokens(mask=mask))) for a in (logits, garbage))
    np.testing.assert_array_equal(whole, other)
    np.testing.assert_array_equal(whole.sum(1), [8, 8, 8, 8])
    np.testing.assert_array_equal(whole, histogram(50)(routed(logits[mask], TILT, top_k=2)))
    assert whole.dtype == jnp.int32


def test_a_quantile_is_linear_within_its_bin():
    # biases of 0: bins of 0.5 from -1; loads 3 and 2 have the mean 2.5: one and a half of the 4 in the second bin,
    # -0.5 + 0.5 x 1.5 / 4, and two and a half of the 5 in the third, 0 + 0.5 x 2.5 / 5
    loads, counts = np.asarray([3, 2], np.int32), np.asarray([[1, 4, 0, 0], [0, 0, 5, 0]], np.int32)
    found = jax.jit(balanced_bias)(loads, counts, np.zeros(2, np.float32))
    np.testing.assert_allclose(found, [-0.3125, 0.25], rtol=1e-6)


def test_equal_scores_have_the_tied_one_as_the_edge():
    # scores 0.5 four times, K = 2: alpha is the third of equals, 0.5, and every r is 0, in the middle of two bins
    counts = histogram(2)(routed(np.zeros((6, 4), np.float32), top_k=2))
    np.testing.assert_array_equal(counts, [[0, 6]] * 4)


def test_tokens_that_select_every_expert_have_nothing_to_balance():
    statistics = observer("quantile")(routed(random_logits(7), TILT, top_k=4))
    assert int(statistics["quantile"].sum()) == 0
    after = compiled("quantile")(statistics, fresh("quantile") | {"bias": TILT}, np.int32(0))
    np.testing.assert_array_equal(after["bias"], TILT)


def test_quantiles_of_sequences_are_averaged_over_those_that_have_tokens():
    logits, row = random_logits(8, 72, 4), np.repeat(np.arange(3, dtype=np.int32), [24, 40, 8])
    state = fresh("quantile") | {"bias": TILT}

    def bias_of(mask, quantiles_of="step"):
        how = {"bins": 1000, "zero_mean": False, "quantiles_of": quantiles_of}
        tokens = Tokens(mask=jnp.asarray(mask), row=jnp.asarray(row))
        routing = route(jnp.asarray(logits), RouterConfig(top_k=2), jnp.asarray(TILT), tokens=tokens)
        return compiled("quantile", **how)(observer("quantile", **how)(routing), state, np.int32(0))["bias"]

    span = 2 + np.ptp(TILT)
    each = [bias_of(row == n) for n in (0, 1)]  # the third sequence is padding
    np.testing.assert_allclose(bias_of(row < 2, "sequence"), np.mean(each, axis=0), atol=span / 2**16)
    assert np.abs(np.mean(each, axis=0) - bias_of(row < 2)).max() > span / 1000
    np.testing.assert_allclose(bias_of(row < 1, "sequence"), each[0], atol=span / 2**16)


def test_too_many_bins_for_a_sum_over_sequences_are_refused():
    with pytest.raises(ValueError, match=r"quantile\.bins=70000 must be at most 65536 with .*quantiles_of='sequence'"):
        balance.make({"quantile": {"quantiles_of": "sequence", "bins": 70_000}})
    balance.make({"quantile": {"bins": 70_000}})


def test_repeated_quantiles_of_the_same_tokens_end_in_balance():
    # the fixed point: 240 tokens with 2 of 4 experts are 120 each, except for tokens whose r is in the bin of the edge
    bias = np.zeros(4, np.float32)
    logits = random_logits(8, 240) + np.asarray([1.0, 0.5, -0.5, -1.0], np.float32)
    balancer = made("quantile", bins=100_000)

    @jax.jit
    def step(bias):
        routing = routed(logits, bias, top_k=2)
        state = balancer.init(4) | {"bias": bias}
        return balancer.update(balancer.observe(routing), state, jnp.int32(0))["bias"], routing.loads

    first = step(bias)[1]
    for _ in range(20):
        bias, loads = step(bias)
    np.testing.assert_allclose(loads, 120, atol=2)
    assert np.ptp(np.asarray(first)) > 100


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"damping": 0.25}, 0.25),
        ({"warmup_steps": 4}, 0.25),
        ({"damping": 0.5, "warmup_steps": 2}, 0.25),
        ({"freeze_step": 0}, 0.0),
        ({"damping": 0.0}, 0.0),
    ],
)
def test_damping_and_schedule_go_a_share_of_the_way(options, share):
    statistics = observer("quantile")(routed(random_logits(9), TILT, top_k=2))
    state = fresh("quantile") | {"bias": TILT}
    full = np.asarray(compiled("quantile")(statistics, state, np.int32(0))["bias"])
    after = compiled("quantile", **options)(statistics, state, np.int32(0))["bias"]
    np.testing.assert_allclose(after, (1 - share) * TILT + share * full, atol=1e-7)
    assert (after == TILT).all() == (share == 0)


@functools.cache
def skewed_stream(method: str) -> np.ndarray:
    """max_violation in each of 300 steps, with 2048 new tokens whose sigmoids prefer the last of 8 experts."""
    balancer = made(method)
    skew = jnp.linspace(-0.6, 0.6, 8)

    def step(state, key):
        noise = 0.5 * jax.random.normal(key, (2048, 8))
        routing = route(skew + noise, RouterConfig(top_k=2), state["bias"], combine=balancer.combine)
        return balancer.update(balancer.observe(routing), state, jnp.int32(0)), max_violation(routing.loads)

    keys = jax.random.split(jax.random.key(0), 300)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, balancer.init(8), keys))()[1])


def test_quantile_balances_within_three_steps_where_the_sign_takes_hundreds():
    # the floor of 2048 tokens is about sqrt(2 ln 8 (1 - 2/8) 8 / (2048 x 2)) = 0.08
    by_quantile, by_sign = skewed_stream("quantile"), skewed_stream("bias_sign")
    assert by_quantile[0] == by_sign[0] > 1.0
    assert (by_quantile[3:] < 0.2).all()
    assert by_sign[3] > 1.0 and np.argmax(by_sign < 0.2) > 100


def test_the_flipped_control_moves_the_bias_the_other_way():
    assert np.array_equal(moved("bias_sign", SKEWED, flipped=True), -moved("bias_sign", SKEWED))
    assert moved("bias_sign", SKEWED, flipped=True)[-1] > 0  # the most loaded expert
