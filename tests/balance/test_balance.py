"""Balancing methods against the papers' equations, written as loops, and against numbers computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import balance
from moe_jax.balance import chain, registry, wrappers
from moe_jax.balance.bias import load_sign
from moe_jax.balance.wrappers import factor_at
from moe_jax.config import balance_entries
from moe_jax.config.balance import BALANCE_METHODS, BiasSign
from moe_jax.routing import RouterConfig, Rows, Tokens, route

TOKENS, EXPERTS, TOP_K = 12, 4, 2
ROWS = np.repeat(np.arange(4, dtype=np.int32), 3)  # four sequences of three tokens
EVERYWHERE = np.ones(TOKENS, bool)
UNEVEN = np.asarray([1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0], bool)  # 5 valid tokens in the first half, 3 in the second
TILT = np.asarray([0.4, 0.0, -0.1, -0.3], np.float32)  # a bias that changes many selections

sign = jax.jit(load_sign)


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(TOKENS, EXPERTS)).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


@functools.cache
def compiled(score: str, **options):
    """(logits, bias, mask, row, statistics | None, ids | None) -> ((loss, statistics), gradient in logits)."""
    method = options.pop("method", "aux_loss")
    balancer = balance.make({method: options})

    def run(logits, bias, mask, row, statistics, ids):
        select = None if ids is None else lambda *_, **__: ids
        tokens = Tokens(mask=mask, row=row)
        routing = route(logits, RouterConfig(top_k=TOP_K, score=score), bias, tokens=tokens, select=select)
        own = balancer.observe(routing)
        state = balancer.init(EXPERTS)
        used = own if statistics is None else statistics
        return balancer.loss(routing, used, state, jnp.zeros((1, EXPERTS))), own

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def measured(score: str, logits, bias=None, mask=EVERYWHERE, row=ROWS, statistics=None, ids=None, **options):
    """(loss, statistics, gradient in logits)."""
    bias = np.zeros(EXPERTS, np.float32) if bias is None else bias
    (loss, own), gradient = compiled(score, **options)(logits, bias, mask, row, statistics, ids)
    return float(loss), own, np.asarray(gradient)


# --- the papers' equations, as loops in float64 -------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x.astype(np.float64)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def top(biased: np.ndarray) -> list[list[int]]:
    return [sorted(range(EXPERTS), key=lambda e: -token[e])[:TOP_K] for token in biased]


def deepseek_moe(logits: np.ndarray) -> float:
    """DeepSeekMoE (2401.06066) eq. 12-14, with softmax s: f_i = N / (K T) sum_t 1(t selects i), P_i = mean s."""
    s = softmax(logits)
    chosen = top(s)
    total = 0.0
    for i in range(EXPERTS):
        f = EXPERTS / (TOP_K * len(s)) * sum(1 for ids in chosen if i in ids)
        total += f * sum(s[t, i] for t in range(len(s))) / len(s)
    return total


def loss_free_eq2(logits: np.ndarray, bias: np.ndarray) -> float:
    """Loss-Free Balancing (2408.15664) eq. 2 for one sequence, with raw sigmoids and the selected experts."""
    s = sigmoid(logits)
    chosen = top(s + bias)
    total = 0.0
    for i in range(EXPERTS):
        f = EXPERTS / (TOP_K * len(s)) * sum(1 for ids in chosen if i in ids)
        total += f * sum(s[t, i] for t in range(len(s))) / len(s)
    return total


def deepseek_v3(logits: np.ndarray) -> float:
    """DeepSeek-V3 (2412.19437) eq. 17-20 for one sequence: f counts by the unbiased s, P uses s over its sum."""
    s = sigmoid(logits)
    chosen = top(s)
    total = 0.0
    for i in range(EXPERTS):
        f = EXPERTS / (TOP_K * len(s)) * sum(1 for ids in chosen if i in ids)
        total += f * sum(s[t, i] / s[t].sum() for t in range(len(s))) / len(s)
    return total


def by_scope(logits, bias, mask, scope: str, normalised: bool, unbiased: bool) -> float:
    """sum_i f_i P_i of each sequence, weighted by its valid tokens, or of all valid tokens together."""
    s = sigmoid(logits)
    chosen = top(s if unbiased else s + bias)
    shares = s / s.sum(1, keepdims=True) if normalised else s
    valid = [t for t in range(TOKENS) if mask[t]]
    groups = [[t for t in valid if ROWS[t] == r] for r in range(4)] if scope == "sequence" else [valid]
    total = 0.0
    for group in groups:
        for i in range(EXPERTS):
            f = EXPERTS / (TOP_K * len(group)) * sum(1 for t in group if i in chosen[t])
            total += len(group) / len(valid) * f * sum(shares[t, i] for t in group) / len(group)
    return total


def test_softmax_loss_equals_deepseek_moe_eq_12_to_14():
    logits = random_logits(0)
    np.testing.assert_allclose(measured("softmax", logits, weight=0.5)[0], 0.5 * deepseek_moe(logits), rtol=1e-5)


def test_raw_sequence_loss_equals_loss_free_balancing_eq_2():
    # sequences of equal length, so that the mean over tokens is the mean over sequences
    logits = random_logits(1)
    expected = np.mean([loss_free_eq2(logits[r == ROWS], TILT) for r in range(4)])
    loss = measured("sigmoid", logits, TILT, weight=0.5, scope="sequence", normalize=False)[0]
    np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)


def test_unbiased_sequence_loss_equals_deepseek_v3_eq_17_to_20():
    logits = random_logits(2)
    expected = np.mean([deepseek_v3(logits[r == ROWS]) for r in range(4)])
    loss = measured("sigmoid", logits, TILT, weight=0.5, scope="sequence", counts="unbiased")[0]
    np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize("counts", ["biased", "unbiased"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global"])
def test_every_word_of_the_auxiliary_loss_equals_its_loop_with_uneven_padding(scope, normalize, counts):
    logits = random_logits(3)
    options = {"weight": 1.0, "scope": scope, "normalize": normalize, "counts": counts}
    expected = by_scope(logits, TILT, UNEVEN, scope, normalize, counts == "unbiased")
    np.testing.assert_allclose(measured("sigmoid", logits, TILT, UNEVEN, **options)[0], expected, rtol=1e-5)


def test_biased_and_unbiased_counts_differ_where_the_bias_changes_the_selection():
    values = [
        measured("sigmoid", random_logits(3), TILT, UNEVEN, weight=1.0, scope="global", normalize=True, counts=c)[0]
        for c in ("biased", "unbiased")
    ]
    assert abs(values[0] - values[1]) > 1e-3


# --- published constants ------------------------------------------------------------------------------------

# token t prefers expert t mod 4 and next t + 1: every expert is chosen 6 times by 12 tokens
BALANCED = np.tile(3.0 * np.eye(4) + 1.5 * np.roll(np.eye(4), 1, axis=1), (3, 1)).astype(np.float32)


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
def test_normalised_loss_at_perfect_balance_is_the_weight(score):
    # f_i = 1 and sum_i P_i = 1; without division of f by top_k (OLMoE #45) this would be 2 x weight
    loss, statistics, _ = measured(score, BALANCED, weight=0.5)
    np.testing.assert_array_equal(statistics["loads"], [6, 6, 6, 6])
    np.testing.assert_allclose(loss, 0.5, rtol=1e-6)


def test_raw_sigmoid_loss_at_perfect_balance_is_the_weight_times_the_sum_of_mean_scores():
    # each expert's mean score: (sigmoid(3) + sigmoid(1.5) + 2 sigmoid(0)) / 4; four experts of them
    s = sigmoid(np.asarray([3.0, 1.5, 0.0]))
    loss = measured("sigmoid", BALANCED, weight=0.5, normalize=False)[0]
    np.testing.assert_allclose(loss, 0.5 * (s[0] + s[1] + 2 * s[2]), rtol=1e-5)


def test_loss_of_a_collapsed_router_is_the_weight_times_experts_over_top_k():
    # all tokens on experts 0 and 1, half the softmax each: f = (2, 2, 0, 0), P = (1/2, 1/2, 0, 0), sum = 2
    logits = np.tile(np.asarray([50.0, 50.0, 0.0, 0.0], np.float32), (TOKENS, 1))
    np.testing.assert_allclose(measured("softmax", logits, weight=0.5)[0], 0.5 * EXPERTS / TOP_K, rtol=1e-5)


def test_z_loss_of_zero_logits_is_the_square_of_log_experts():
    # logsumexp(0, 0, 0, 0) = log 4 = 1.3863, squared 1.9218; with weight 0.5: 0.9609
    loss = measured("sigmoid", np.zeros((TOKENS, EXPERTS), np.float32), method="z_loss", weight=0.5)[0]
    np.testing.assert_allclose(loss, 0.5 * np.log(4.0) ** 2, rtol=1e-6)


def test_z_loss_equals_st_moe_eq_5_over_valid_tokens():
    logits = random_logits(4)
    expected = np.mean([np.log(np.exp(token.astype(np.float64)).sum()) ** 2 for token in logits[UNEVEN]])
    loss = measured("sigmoid", logits, mask=UNEVEN, method="z_loss", weight=0.5)[0]
    np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)


# --- scopes and accumulation --------------------------------------------------------------------------------


def accumulated(logits, mask, statistics, **options) -> tuple[float, np.ndarray]:
    """The sum over two micro-batches of (share of the valid tokens x loss), and its gradient."""
    total = 0.0
    gradients = []
    for half in (slice(0, 6), slice(6, 12)):
        share = mask[half].sum() / mask.sum()
        row = ROWS[half] - ROWS[half][0]
        part = measured("sigmoid", logits[half], TILT, mask[half], row, statistics, **options)
        total += share * part[0]
        gradients.append(share * part[2])
    return total, np.concatenate(gradients)


ADDITIVE = {
    "sequence": {"weight": 1.0, "scope": "sequence"},
    "global": {"weight": 1.0, "scope": "global"},
    "global unbiased": {"weight": 1.0, "scope": "global", "counts": "unbiased"},
    "z_loss": {"method": "z_loss", "weight": 1.0},
}


@pytest.mark.parametrize("mask", [EVERYWHERE, UNEVEN], ids=["full", "uneven padding"])
@pytest.mark.parametrize("word", ADDITIVE)
def test_losses_of_micro_batches_weighed_by_their_tokens_are_the_loss_of_the_batch(word, mask):
    logits = random_logits(5)
    loss, statistics, gradient = measured("sigmoid", logits, TILT, mask, **ADDITIVE[word])
    total, its_gradient = accumulated(logits, mask, statistics, **ADDITIVE[word])
    np.testing.assert_allclose(total, loss, rtol=1e-5)
    np.testing.assert_allclose(its_gradient, gradient, rtol=1e-5, atol=1e-8)


def test_a_mean_of_micro_batch_means_would_be_wrong_under_uneven_padding():
    # 5 and 3 valid tokens, which is why the losses above are weighted
    logits = random_logits(5)
    options = ADDITIVE["sequence"]
    loss, statistics, _ = measured("sigmoid", logits, TILT, UNEVEN, **options)
    halves = [
        measured("sigmoid", logits[h], TILT, UNEVEN[h], ROWS[h] - ROWS[h][0], statistics, **options)[0]
        for h in (slice(0, 6), slice(6, 12))
    ]
    assert abs(np.mean(halves) - loss) > 1e-3 * loss


def test_microbatch_scope_depends_on_the_split_and_says_so_by_its_name():
    logits = random_logits(5)
    options = {"weight": 1.0, "scope": "microbatch"}
    loss, statistics, _ = measured("sigmoid", logits, TILT, **options)
    assert abs(accumulated(logits, EVERYWHERE, statistics, **options)[0] - loss) > 1e-3 * loss


def test_sequence_scope_does_not_depend_on_the_order_of_sequences():
    logits = random_logits(6)
    order = np.asarray([9, 10, 11, 3, 4, 5, 0, 1, 2, 6, 7, 8])
    values = [
        measured("sigmoid", logits[o], TILT, UNEVEN[o], ROWS[o], **ADDITIVE["sequence"])[0]
        for o in (np.arange(TOKENS), order)
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


def test_a_batch_of_one_sequence_has_one_loss_in_every_scope():
    logits = random_logits(6)
    one = np.zeros(TOKENS, np.int32)
    values = [
        measured("sigmoid", logits, TILT, UNEVEN, one, weight=1.0, scope=scope)[0]
        for scope in ("sequence", "microbatch", "global")
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)


def test_global_scope_needs_the_statistics_of_the_step_and_the_others_do_not():
    for scope, needs in (("sequence", False), ("microbatch", False), ("global", True)):
        config = balance_entries({"aux_loss": {"scope": scope}})
        assert balance.needs_step_statistics(config) is needs
    assert not balance.needs_step_statistics(())


# --- gradients ----------------------------------------------------------------------------------------------


def test_frequencies_have_no_gradient():
    # with f constant, d/dz_ti of sum_i f_i P_i with P the mean softmax p is p_ti (f_i - sum_j f_j p_tj) / T
    logits = random_logits(7)
    p = softmax(logits)
    f = EXPERTS * np.bincount(np.ravel(top(p)), minlength=EXPERTS) / (TOP_K * TOKENS)
    expected = p * (f - (p @ f)[:, None]) / TOKENS
    _, _, gradient = measured("softmax", logits, weight=1.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_gradient_pushes_tokens_away_from_the_overloaded_expert():
    logits = np.tile(np.asarray([2.0, 1.0, 0.0, -1.0], np.float32), (TOKENS, 1))
    gradient = measured("sigmoid", logits, weight=1.0)[2]
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 3] < 0).all()


def normalised_balance(score: str, logits: np.ndarray, ids: np.ndarray) -> float:
    """The loss in float64, from logarithms so that nothing underflows."""
    wide = logits.astype(np.float64)
    log_scores = -np.logaddexp(0.0, -wide) if score == "sigmoid" else wide
    if score == "sqrt_softplus":
        log_scores = 0.5 * np.where(wide < -30, wide, np.log(np.logaddexp(0.0, np.maximum(wide, -30))))
    f = EXPERTS * np.bincount(ids.ravel(), minlength=EXPERTS) / ids.size
    return float(f @ softmax(log_scores).mean(0))


# the lowest shift of the logits with exact values: sqrt_softplus underflows float32 at -174, and below that
# normalises like softmax(logits) instead of softmax(logits / 2)
LOWEST = {"sigmoid": -200, "softmax": -200, "sqrt_softplus": -150}


@pytest.mark.parametrize("shift", [0, -30, -60, -150, -200])
@pytest.mark.parametrize("score", LOWEST)
def test_driving_all_scores_to_zero_does_not_move_the_normalised_loss(score, shift):
    # an epsilon in the denominator would let the loss fall to 0 with the scores (Megatron-LM #1545); the
    # selection is fixed, and from -30 on the exact value does not depend on the shift
    logits = random_logits(8) + np.float32(shift)
    ids = np.asarray(top(random_logits(8)), np.int32)
    loss, _, gradient = measured(score, logits, ids=ids, weight=1.0)
    limit = score if shift >= LOWEST[score] else "sigmoid"  # whose limit is softmax(logits)
    np.testing.assert_allclose(loss, normalised_balance(limit, logits, ids), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("score", LOWEST)
def test_the_gradient_of_the_normalised_loss_does_not_vanish_with_the_scores(score):
    # a router whose scores are driven to zero can still be balanced
    ids = np.asarray(top(random_logits(8)), np.int32)
    shifts = (-30, -60, LOWEST[score])
    gradients = [measured(score, random_logits(8) + np.float32(shift), ids=ids, weight=1.0)[2] for shift in shifts]
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-3, atol=1e-7)


# --- bias_sign: the sign ------------------------------------------------------------------------------------


def test_sign_is_minus_one_above_the_mean_plus_one_below_and_zero_at_it():
    np.testing.assert_array_equal(sign(integers(3, 3, 3, 3)), [0, 0, 0, 0])
    np.testing.assert_array_equal(sign(integers(2, 3, 3, 4)), [1, 0, 0, -1])
    np.testing.assert_array_equal(sign(integers(1, 1, 1, 2)), [1, 1, 1, -1])  # the mean is 1.25
    np.testing.assert_array_equal(sign(integers(2, 2, 2, 1)), [-1, -1, -1, 1])  # the mean is 1.75
    np.testing.assert_array_equal(sign(integers(0, 0, 0, 0)), [0, 0, 0, 0])


def test_sign_is_right_where_float32_is_not():
    # float32 rounds 2^25 + 1 to 2^25 and would see three equal loads, all at their mean
    many = 2**25
    np.testing.assert_array_equal(sign(integers(many - 1, many, many, many + 1)), [1, 0, 0, -1])
    assert np.float32(many + 1) == np.float32(many)


def test_sign_is_right_where_experts_times_load_overflows_int32():
    # 256 x 2^24 = 2^32 is 0 in int32, "underloaded"; the mean is (2^24 + 255 x 2^20) / 256 = 1.06 x 2^20
    loads = np.full(256, 2**20, np.int32)
    loads[7] = 2**24
    expected = np.ones(256)
    expected[7] = -1
    np.testing.assert_array_equal(sign(loads), expected)
    assert np.multiply(np.int32(256), loads)[7] == 0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**28 - 1)), min_size=4, max_size=4))
def test_sign_equals_that_of_unbounded_integers(loads):
    expected = [int(np.sign(sum(loads) - 4 * load)) for load in loads]
    np.testing.assert_array_equal(sign(integers(*loads)), expected)


# --- bias_sign: the rate ------------------------------------------------------------------------------------

SCHEDULES = {
    # linear from 1 at step 0 to 0 at step 4, and 0 from there on
    "linear": ({"schedule": "linear", "freeze_step": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    # (1 + cos(pi step / 6)) / 2
    "cosine": ({"schedule": "cosine", "freeze_step": 6}, [1.0, 0.93301, 0.75, 0.5, 0.25, 0.06699, 0.0, 0.0]),
    # (step + 1) / 4 until 1
    "warmup": ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    # up in two steps, then down from step 2 to step 6
    "warmup and linear": (
        {"warmup_steps": 2, "schedule": "linear", "freeze_step": 6},
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0],
    ),
    "constant and freeze": ({"freeze_step": 3}, [1.0, 1.0, 1.0, 0.0, 0.0]),
    "frozen from the start": ({"freeze_step": 0}, [0.0, 0.0]),
    "constant": ({}, [1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_follows_its_schedule_step_by_step(name):
    options, factors = SCHEDULES[name]
    steps = np.arange(len(factors), dtype=np.int32)
    rates = 0.5 * jax.jit(jax.vmap(functools.partial(factor_at, BiasSign(rate=0.5, **options))))(steps)
    np.testing.assert_allclose(rates, 0.5 * np.asarray(factors), atol=1e-5)
    assert rates.dtype == jnp.float32


# --- bias_sign: the update ----------------------------------------------------------------------------------


@functools.cache
def updates(**options):
    """(loads, bias, step) -> the bias after the update."""
    update = balance.make({"bias_sign": options}).update
    return jax.jit(lambda loads, bias, step: update({"loads": loads}, {"bias": bias}, step)["bias"])


def moved(loads, step: int = 0, bias=None, **options) -> np.ndarray:
    bias = np.zeros(len(loads), np.float32) if bias is None else bias
    return np.asarray(updates(**options)(integers(*loads), bias, np.int32(step)))


def test_update_equals_algorithm_1_from_the_loads_alone():
    # the mean is 3: +u below, -u above, nothing at it; the update uses no routing
    np.testing.assert_allclose(moved([0, 2, 3, 7], rate=0.5), [0.5, 0.5, 0.0, -0.5])


def test_zero_mean_update_takes_the_mean_from_the_increments():
    # signs +1 +1 +1 -1 have mean 1/2
    np.testing.assert_allclose(moved([0, 2, 2, 8], rate=0.5, zero_mean=True), [0.25, 0.25, 0.25, -0.75])
    assert abs(moved([0, 2, 3, 7], rate=0.5, zero_mean=True).sum()) < 1e-6


def test_balanced_loads_move_nothing_even_of_a_bias():
    for zero_mean in (False, True):
        np.testing.assert_array_equal(moved([4, 4, 4, 4], bias=TILT, rate=0.5, zero_mean=zero_mean), TILT)


def test_no_loads_move_nothing():
    for zero_mean in (False, True):
        np.testing.assert_array_equal(moved([0, 0, 0, 0], bias=TILT, rate=0.5, zero_mean=zero_mean), TILT)


def test_a_rate_of_zero_moves_nothing():
    np.testing.assert_array_equal(moved([0, 2, 3, 7], bias=TILT, rate=0.0), TILT)


def test_a_frozen_bias_does_not_move():
    for step, stays in ((9, False), (10, True), (1000, True)):
        after = moved([0, 2, 3, 7], step=step, bias=TILT, rate=0.5, freeze_step=10)
        assert (after == TILT).all() == stays


def test_bias_moves_by_its_rate_where_bfloat16_would_stall():
    # bfloat16 has 8 bits: 0.5 + 0.001 is 0.5 again (Megatron-LM #1482); in float32 ten steps make 0.01
    bias = np.full(4, 0.5, np.float32)
    for step in range(10):
        bias = moved([0, 2, 3, 7], step=step, bias=bias, rate=1e-3)
    assert bias.dtype == np.float32
    np.testing.assert_allclose(bias, [0.51, 0.51, 0.5, 0.49], atol=1e-6)
    assert jnp.bfloat16(0.5) + jnp.bfloat16(1e-3) == jnp.bfloat16(0.5)


def test_zero_mean_leaves_every_selection_as_it_is():
    # the two biases differ by a constant, so 100 steps of the same logits select the same (torchtitan #1506)
    selected = jax.jit(lambda logits, bias: route(logits, RouterConfig(top_k=TOP_K), bias))
    plain, centred = np.zeros((2, EXPERTS), np.float32)
    for step in range(100):
        logits = random_logits(step) + 3 * TILT
        one, other = selected(logits, plain), selected(logits, centred)
        np.testing.assert_array_equal(one.expert_ids, other.expert_ids)
        plain = moved(one.loads, bias=plain, rate=0.01)
        centred = moved(other.loads, bias=centred, rate=0.01, zero_mean=True)
    assert abs(plain.mean()) > 1e-3
    np.testing.assert_allclose(plain - plain.mean(), centred - centred.mean(), atol=1e-5)


# --- composing ----------------------------------------------------------------------------------------------


def test_every_method_of_the_schema_is_implemented():
    assert set(balance.names()) == set(BALANCE_METHODS)


def test_no_methods_count_loads_and_do_nothing_else():
    balancer = balance.make({})
    routing = route(jnp.asarray(random_logits(0)), RouterConfig(top_k=TOP_K))
    statistics = balancer.observe(routing)
    assert list(statistics) == ["loads"]
    assert float(balancer.loss(routing, statistics, balancer.init(EXPERTS), jnp.zeros((1, EXPERTS)))) == 0.0
    assert balancer.select is None


def test_a_sequence_loss_is_the_same_where_the_number_of_rows_is_known():
    loss = balance.make({"aux_loss": {"scope": "sequence", "weight": 1.0}})
    row, mask = jnp.asarray([0, 0, 0, 1, 1, 1]), jnp.asarray([True, True, False, True, True, True])

    def value(logits, tokens):
        routing = route(logits, RouterConfig(top_k=TOP_K), tokens=tokens)
        return loss.loss(routing, loss.observe(routing), loss.init(EXPERTS), jnp.zeros((1, EXPERTS)))

    by_row, known = (Tokens(mask=mask, row=row, rows=rows) for rows in (None, Rows(2)))
    (a, da), (b, db) = (jax.value_and_grad(value)(random_logits(0)[:6], tokens) for tokens in (by_row, known))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(da, db, rtol=1e-5, atol=1e-8)


def test_one_kind_may_appear_twice_under_labels():
    # the sum of a sequence and a global loss, each with its own statistics
    both = balance.make(
        {
            "near": {"method": "aux_loss", "scope": "sequence", "weight": 0.25},
            "far": {"method": "aux_loss", "scope": "global", "counts": "unbiased", "weight": 0.5},
        }
    )

    @jax.jit
    def run(logits, row):
        routing = route(logits, RouterConfig(top_k=TOP_K), tokens=Tokens(row=row))
        statistics = both.observe(routing)
        return both.loss(routing, statistics, both.init(EXPERTS), jnp.zeros((1, EXPERTS))), statistics

    loss, statistics = run(random_logits(0), ROWS)
    near = measured("sigmoid", random_logits(0), weight=1.0, scope="sequence")[0]
    far = measured("sigmoid", random_logits(0), weight=1.0, scope="global", counts="unbiased")[0]
    np.testing.assert_allclose(loss, 0.25 * near + 0.5 * far, rtol=1e-6)
    assert set(statistics) == {"loads", "far"}


def test_statistics_of_a_method_are_under_its_label_and_reach_its_loss():
    # the loss of the step's counts, not of this routing's: f = (4, 0, 0, 0) gives 4 x P_0
    loss = measured(
        "softmax",
        random_logits(0),
        statistics={"loads": integers(6, 6, 6, 6), "aux_loss": integers(9, 0, 0, 0)},
        weight=1.0,
        scope="global",
        counts="unbiased",
    )[0]
    np.testing.assert_allclose(loss, 4 * softmax(random_logits(0))[:, 0].mean(), rtol=1e-5)


REFUSED = {
    "unknown method": ({"bias_sing": {}}, r"'bias_sing', which does not exist; did you mean 'bias_sign'\?"),
    "unknown method of a label": ({"a": {"method": "z_los"}}, r"balance\.a .*did you mean 'z_loss'\?"),
    "unknown option": ({"aux_loss": {"wieght": 1.0}}, r"balance\.aux_loss\.wieght .*did you mean 'weight'\?"),
    "option of another method": (
        {"z_loss": {"rate": 1.0}},
        r"balance\.z_loss\.rate is not a configuration key",
    ),
    "two owners of the bias": (
        {"slow": {"method": "bias_sign"}, "fast": {"method": "bias_sign", "rate": 1.0}},
        r"fast and slow, but only one method may own the bias; remove all but one",
    ),
    "wrong type": ({"bias_sign": {"rate": "fast"}}, r"balance\.bias_sign\.rate='fast' must be a number"),
    "out of range": ({"aux_loss": {"weight": -1.0}}, r"balance\.aux_loss\.weight=-1\.0 must be at least 0"),
    "not finite": (
        {"z_loss": {"weight": float("nan")}},
        r"balance\.z_loss\.weight=nan must be a finite number",
    ),
    "unknown word": ({"aux_loss": {"scope": "globl"}}, r"must be one of .*did you mean 'global'\?"),
    "shared label": ({"bias": {"method": "z_loss"}}, r"a label must be one word other than 'bias', 'loads'"),
    "options that are none": ({"z_loss": 0.1}, r"balance\.z_loss=0\.1 must be a dict of options"),
    "no mapping": ("bias_sign", r"balance='bias_sign' must be a mapping"),
    "schedule without an end": (
        {"bias_sign": {"schedule": "cosine"}},
        r"set balance\.bias_sign\.freeze_step",
    ),
    "warm-up after the end": (
        {"bias_sign": {"warmup_steps": 9, "freeze_step": 5}},
        r"warmup_steps=9 must be at most balance\.bias_sign\.freeze_step=5",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_with_a_sentence_that_names_the_fix(mistake):
    mapping, sentence = REFUSED[mistake]
    with pytest.raises(ValueError, match=sentence):
        balance_entries(mapping)


def test_make_refuses_the_same_mappings_as_the_schema():
    with pytest.raises(ValueError, match="did you mean 'bias_sign'"):
        balance.make({"bias_sing": {}})


def test_two_methods_that_select_are_refused_and_one_is_used(monkeypatch):
    def select(scores, biased, **_):
        return jnp.full((scores.shape[0], 1), 3, jnp.int32)

    monkeypatch.setitem(
        registry.REGISTRY, "z_loss", registry.Entry(lambda options, model: balance.Balancer(select=select), "", "")
    )
    used = balance.make({"z_loss": {}, "bias_sign": {}}).select(
        jnp.zeros((2, 4)), jnp.zeros((2, 4)), top_k=1, tokens=Tokens(), key=None, train=True
    )
    np.testing.assert_array_equal(used, [[3], [3]])
    with pytest.raises(ValueError, match="a and b, but only one method may select experts"):
        balance.make({"a": {"method": "z_loss"}, "b": {"method": "z_loss"}})


def test_methods_meet_in_one_state_and_share_only_bias_and_loads(monkeypatch):
    # a method that counts its updates in its own state, combined with bias_sign
    counting = balance.Balancer(
        own_state=lambda experts, layer: jnp.zeros((), jnp.int32),
        own_update=lambda seen: (seen.bias, seen.state + 1),
    )
    monkeypatch.setitem(registry.REGISTRY, "z_loss", registry.Entry(lambda options, model: counting, "", ""))
    balancer = balance.make({"z_loss": {}, "bias_sign": {"rate": 0.5}})
    state = balancer.init(EXPERTS)
    for step in range(3):
        state = balancer.update({"loads": jnp.asarray([0, 2, 3, 7])}, state, jnp.int32(step))
    assert int(state["z_loss"]) == 3
    np.testing.assert_allclose(state["bias"], [1.5, 1.5, 0.0, -1.5])


def passed(balancer, steps: int = 2, layer: int = 0):
    """The loss of one routing, and the state after some steps with it."""
    routing = route(jnp.asarray(random_logits(0)), RouterConfig(top_k=TOP_K))
    statistics = balancer.observe(routing)
    state = balancer.init(EXPERTS, layer)
    loss = balancer.loss(routing, statistics, state, jnp.zeros((1, EXPERTS)))
    for step in range(steps):
        state = balancer.update(statistics, state, jnp.int32(step))
    return float(loss), state


def test_a_composition_within_another_does_what_it_does_alone():
    inner = balance.make({"bias_smebu": {"rate": 0.5}, "aux_loss": {"weight": 1.0}})
    (loss, state), (its_loss, its_state) = passed(inner), passed(chain({"inner": inner}))
    assert its_loss == loss > 0
    assert state["bias"].any()
    np.testing.assert_array_equal(its_state["bias"], state["bias"])
    np.testing.assert_array_equal(its_state["inner"]["bias_smebu"], state["bias_smebu"])


def test_a_wrapper_of_methods_wraps_a_composition():
    inner = balance.make({"bias_sign": {"rate": 0.5}, "aux_loss": {"weight": 1.0}})
    balancer = chain({"both": wrappers.within(inner, (1, 2))})
    for layer in (0, 1):
        loss, state = passed(balancer, layer=layer)
        assert (loss > 0, bool(state["bias"].any())) == (layer == 1, layer == 1)
