"""Laws of the measures: values computed by hand, the same for numpy and jax arrays, with leading dimensions kept."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import counts as counts_
from moe_jax.analysis import gradients
from moe_jax.balance import measures
from moe_jax.routing import RouterConfig, Tokens, route

NAMES = """max_violation min_violation mean_violation coefficient_of_variation load_entropy effective_experts gini
dead_experts starved_experts max_expert_share""".split()
MEASURES = {name: getattr(measures, name) for name in NAMES}
COMPILED = {name: jax.jit(measure) for name, measure in MEASURES.items()}
KINDS = pytest.mark.parametrize(
    "measured",
    [
        lambda name, loads: MEASURES[name](np.asarray(loads, np.int64)),
        lambda name, loads: COMPILED[name](np.asarray(loads, np.int32)),
    ],
    ids=["numpy_int64", "jax_int32"],
)


@functools.cache
def measured_aux_loss(**options):
    """(logits, mask) -> the auxiliary loss's value, and the loads."""

    def run(logits, mask):
        routing = route(logits, RouterConfig(**options), tokens=Tokens(mask=mask))
        return measures.aux_loss_value(routing), routing.loads

    return jax.jit(run)


@KINDS
@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([3, 3, 3, 3], 0.0),  # max = mean
        ([8, 0, 0, 0], 3.0),  # (8 - 2) / 2 = E - 1
        ([1, 2, 3, 6], 1.0),  # (6 - 3) / 3
        ([0, 0, 0, 0], 0.0),  # no load at all
        ([7], 0.0),  # one expert is always at its mean
        ([0], 0.0),
    ],
)
def test_max_violation_is_the_largest_load_over_the_mean_less_one(measured, loads, expected):
    np.testing.assert_allclose(measured("max_violation", loads), expected, atol=1e-6)


@KINDS
@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([5, 5, 5, 5], 1.0),
        ([9, 0, 0, 0], 0.0),
        ([4, 4, 0, 0], 0.5),  # log 2 / log 4
        ([2, 1, 1, 0], 0.75),  # (0.5 log 2 + 2 x 0.25 log 4) / log 4 = 1.5 log 2 / (2 log 2)
        ([0, 0, 0, 0], 1.0),  # no load is uniform
        ([3], 1.0),
        ([0], 1.0),
    ],
)
def test_load_entropy_is_one_when_uniform_and_zero_when_collapsed(measured, loads, expected):
    np.testing.assert_allclose(measured("load_entropy", loads), expected, atol=1e-6)


@KINDS
@pytest.mark.parametrize(("loads", "expected"), [([1, 2, 3], 0), ([0, 5, 0], 2), ([0, 0, 0], 3), ([0], 1), ([1], 0)])
def test_dead_experts_are_those_without_a_token(measured, loads, expected):
    assert int(measured("dead_experts", loads)) == expected


@KINDS
@pytest.mark.parametrize(
    ("name", "loads", "expected"),
    [
        ("min_violation", [1, 2, 3, 6], -2 / 3),  # (1 - 3) / 3
        ("min_violation", [0, 4], -1.0),
        ("mean_violation", [1, 2, 3, 6], 0.5),  # (2 + 1 + 0 + 3) / 3 / 4
        ("mean_violation", [8, 0, 0, 0], 1.5),  # (3 + 1 + 1 + 1) / 4 = 2 (E - 1) / E
        ("coefficient_of_variation", [1, 2, 3, 6], math.sqrt(14 / 4) / 3),  # squares 4 + 1 + 0 + 9, over E not E - 1
        ("coefficient_of_variation", [8, 0, 0, 0], math.sqrt(3)),  # sqrt(E - 1)
        ("effective_experts", [4, 4, 0, 0], 2.0),  # exp(log 2)
        ("effective_experts", [2, 1, 1, 0], 2**1.5),  # entropy 1.5 log 2
        ("effective_experts", [9, 0, 0], 1.0),
        ("gini", [9, 0, 0, 0], 0.75),  # 1 - 1 / E
        ("gini", [1, 2, 3, 6], 1 / 3),  # pairs differ by 1+2+5+1+4+3 = 16, of F by 16 / 12; 2 x that / (2 x 4)
        ("starved_experts", [0, 1, 29, 30, 15], 0.4),  # mean 15: 0 and 1 are below 1.5
        ("starved_experts", [2, 1, 29, 28, 15], 0.2),  # 2 is not
        ("max_expert_share", [1, 2, 3, 6], 0.5),
    ],
)
def test_a_measure_is_what_the_hand_computes(measured, name, loads, expected):
    np.testing.assert_allclose(measured(name, loads), expected, rtol=1e-6)


@KINDS
@pytest.mark.parametrize("loads", [[5, 5, 5], [0, 0, 0], [7]])
def test_even_or_no_loads_are_in_balance_by_every_measure(measured, loads):
    even = dict(effective_experts=len(loads), load_entropy=1.0, max_expert_share=1 / len(loads))
    for name in set(NAMES) - {"dead_experts"}:
        np.testing.assert_allclose(measured(name, loads), even.get(name, 0.0), atol=1e-6)


@pytest.mark.parametrize("measure", [measures.bias_range, jax.jit(measures.bias_range)], ids=["numpy", "jax"])
def test_bias_range_is_the_largest_difference_that_selection_sees(measure):
    # 0.5 - (-0.25); adding 10 to all changes nothing; a single expert has a range of 0; layers stay separate
    bias = np.asarray([0.5, -0.25, 0.0], np.float32)
    np.testing.assert_allclose(measure(bias), 0.75)
    np.testing.assert_allclose(measure(bias + np.float32(10.0)), 0.75)
    np.testing.assert_allclose(measure(bias[:1]), 0.0)
    np.testing.assert_allclose(measure(np.stack([bias, 2 * bias])), [0.75, 1.5])


@KINDS
def test_layers_stay_separate(measured):
    # balanced, collapsed and unloaded layers, none pooled with another
    loads = [[4, 4], [8, 0], [0, 0]]
    np.testing.assert_allclose(measured("max_violation", loads), [0.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(measured("load_entropy", loads), [1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_array_equal(measured("dead_experts", loads), [0, 1, 2])


def test_measures_of_numpy_loads_are_numpy_and_of_jax_loads_are_jax():
    loads = np.asarray([[4, 4], [8, 0]], np.int64)
    for name, measure in MEASURES.items():
        assert isinstance(measure(loads), np.ndarray)
        assert isinstance(COMPILED[name](loads.astype(np.int32)), jax.Array)


@KINDS
def test_measures_are_float32_from_integers_of_any_width(measured):
    for name in set(NAMES) - {"dead_experts"}:
        assert measured(name, [[4, 4], [8, 0]]).dtype == np.float32


def test_totals_of_an_evaluation_beyond_int32_are_measured_in_int64():
    # 2^33 copies: (6 - 3) / 3 with every load times 2^30
    loads = np.asarray([1, 2, 3, 6], np.int64) * 2**30
    np.testing.assert_allclose(measures.max_violation(loads), 1.0, atol=1e-6)
    np.testing.assert_allclose(measures.load_entropy(loads), measures.load_entropy(loads // 2**30), rtol=1e-6)


def test_measures_do_not_depend_on_the_order_of_experts():
    loads = np.asarray([5, 0, 2, 9], np.int64)
    for measure in MEASURES.values():
        np.testing.assert_allclose(measure(loads), measure(loads[[2, 0, 3, 1]]), rtol=1e-6)


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_aux_loss_value_is_one_at_perfect_balance(score, top_k):
    # token t prefers expert t: every f_i = 1, and the normalised scores sum to 1
    # and expert t + 1 next
    logits = (3.0 * np.eye(4) + 1.5 * np.roll(np.eye(4), 1, axis=1)).astype(np.float32)
    value, loads = measured_aux_loss(top_k=top_k, score=score)(logits, None)
    np.testing.assert_array_equal(loads, [top_k] * 4)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_aux_loss_value_of_a_collapsed_router_is_the_number_of_experts():
    # all tokens on expert 0 with probability ~ 1: f_0 = E, P_0 = 1
    logits = np.tile(np.asarray([[50.0, 0.0, 0.0, 0.0]], np.float32), (4, 1))
    value, _ = measured_aux_loss(top_k=1, score="softmax")(logits, None)
    np.testing.assert_allclose(value, 4.0, rtol=1e-6)


def test_aux_loss_value_does_not_see_padding():
    logits = np.asarray([[2.0, 0.0], [0.0, 1.0], [9.0, -9.0]], np.float32)
    run = measured_aux_loss(top_k=1, score="sigmoid")
    padded, _ = run(logits, np.asarray([True, True, False]))
    alone, _ = run(logits[:2], np.asarray([True, True]))
    np.testing.assert_allclose(padded, alone, rtol=1e-6)


# --- the same measures for training, evaluation and simulation ------------------------------------------------


LOADS = np.asarray([[4, 4, 4, 4, 9], [8, 8, 0, 0, 9]])  # the fifth column is a zero-computation expert


@pytest.mark.parametrize("of_loads", [measures.of_loads, jax.jit(measures.of_loads, static_argnums=1)])
def test_of_loads_averages_layers_takes_the_worst_and_leaves_out_zero_computation_experts(of_loads):
    kind = np.int64 if of_loads is measures.of_loads else np.int32
    values = of_loads(LOADS.astype(kind), 4, kind(8))
    expected = dict(
        max_violation=0.5,  # 0 and 1
        max_violation_worst=1.0,
        min_violation=-0.5,
        min_violation_worst=-1.0,
        mean_violation=0.5,
        mean_violation_worst=1.0,
        load_cv=0.5,
        load_entropy=0.75,  # 1 and log 2 / log 4
        effective_experts=3.0,  # 4 and 2
        gini=0.25,  # 0 and 4 pairs x 8 / 16 x 2 / (2 x 4)
        dead_experts=2,
        starved_experts=0.25,
        max_expert_share=0.5,
        violation_floor=measures.violation_floor(8, 2, 4),  # 16 copies of 8 tokens, whatever top_k chose elsewhere
    )
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6, err_msg=name)


def test_without_the_number_of_tokens_there_is_no_floor():
    assert "violation_floor" not in measures.of_loads(LOADS, 4)


def test_training_and_evaluation_log_the_same_numbers():
    loads = np.random.default_rng(0).integers(0, 50, (3, 8))
    ours = measures.of_loads(loads, 8, 77, 2)
    theirs = jax.jit(measures.of_loads, static_argnums=1)(loads, 8, 77, 2)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


def test_no_tokens_give_finite_numbers():
    values = jax.jit(measures.of_loads, static_argnums=1)(np.zeros((2, 4), np.int32), 4, 0, 2)
    assert all(np.isfinite(v) for v in values.values())
    assert values["violation_floor"] == values["max_violation"] == 0


# --- the MaxVio of random choice ------------------------------------------------------------------------------


def simulated_max_violation(tokens, top_k, experts, repeats):
    """Mean MaxVio of `repeats` batches whose tokens choose at random, and its standard error."""
    draw = np.random.default_rng(0)
    violations = []
    for _ in range(repeats):
        if top_k == 1:
            loads = draw.multinomial(tokens, np.full(experts, 1 / experts))
        else:
            ids = np.argsort(draw.random((tokens, experts)), axis=1)[:, :top_k]
            loads = np.bincount(ids.ravel(), minlength=experts)
        violations.append(measures.max_violation(loads))
    return np.mean(violations), np.std(violations) / math.sqrt(repeats)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "repeats"),
    [
        (64, 1, 64, 4000),  # mean load 1
        (64, 8, 64, 600),  # 8
        (256, 1, 64, 4000),  # 4
        (256, 2, 8, 2000),
        (2048, 1, 16, 4000),
        (131072, 1, 256, 1000),
    ],
)
def test_the_floor_is_what_uniform_choice_gives(tokens, top_k, experts, repeats):
    expected, error = simulated_max_violation(tokens, top_k, experts, repeats)
    assert error < 0.01 * expected
    np.testing.assert_allclose(measures.violation_floor(tokens, top_k, experts), expected, rtol=0.03)


def test_one_token_overloads_its_expert_by_all_others():
    # one copy, E experts: (1 - 1/E) / (1/E) = E - 1
    np.testing.assert_allclose(measures.violation_floor(1, 1, 4), 3.0, rtol=1e-3)


def test_where_every_expert_is_chosen_or_none_the_floor_is_zero():
    assert (
        measures.violation_floor(100, 4, 4)
        == measures.violation_floor(0, 2, 4)
        == measures.violation_floor(9, 1, 1)
        == 0
    )


def test_the_floor_falls_with_the_square_root_of_tokens_however_many():
    # float32 must be precise enough: a quarter of the violation for sixteen times the tokens, up to 2^40 tokens
    tokens = 2.0 ** np.arange(16, 41, 4)
    floors = jax.jit(measures.violation_floor, static_argnums=2)(tokens.astype(np.float32), 2, 64)
    np.testing.assert_allclose(floors[:-1] / floors[1:], 4.0, rtol=0.02)


def test_device_violation_is_that_of_consecutive_blocks():
    # blocks (1 + 2, 3 + 6) = (3, 9), mean 6: (9 - 6) / 6; each expert its own device is max_violation
    loads = np.asarray([[1, 2, 3, 6]])
    np.testing.assert_allclose(measures.device_violation(loads, 2), [0.5])
    np.testing.assert_allclose(measures.device_violation(loads, 4), measures.max_violation(loads))
    with pytest.raises(ValueError, match="num_devices=3 must divide the 4 experts"):
        measures.device_violation(loads, 3)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_sequence_violations_average_sequences_that_have_tokens(kind):
    # 0 and 1; the third sequence is padding. Pooled, (12, 4) would also give 0.5; the second layer differs
    rows = kind([[[4, 4], [8, 0], [0, 0]], [[8, 0], [0, 8], [0, 0]]])
    np.testing.assert_allclose(measures.sequence_violations(rows)["max_violation"], [0.5, 1.0], rtol=1e-6)
    floor = measures.violation_floor(8, 1, 2)
    np.testing.assert_allclose(measures.sequence_floor(rows, 1), [floor, floor], rtol=1e-6)


# --- the bias -------------------------------------------------------------------------------------------------


def test_a_bias_for_each_class_has_a_range_for_each_class():
    # the classes' biases differ by 10, but no token compares them
    bias = np.asarray([[[0.0, 0.5], [10.0, 10.25]]], np.float32)
    np.testing.assert_allclose(measures.bias_range(bias), [[0.5, 0.25]])
    np.testing.assert_allclose(measures.bias_mean(bias), [[0.25, 10.125]])
    np.testing.assert_allclose(measures.bias_std(bias), [[0.25, 0.125]])


def test_flip_rate_counts_biases_that_reversed_and_not_those_that_rest():
    before = np.asarray([[1, -1, 1, 0], [1, 1, 1, 1]], np.int8)
    after = np.asarray([[-1, 1, 1, 1], [1, 1, 0, 1]], np.int8)
    np.testing.assert_allclose(measures.flip_rate(before, after), [2 / 3, 0.0], rtol=1e-6)


# --- the chosen experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_decisions_changed_is_the_share_that_the_other_does_not_make(kind):
    # order does not matter; 1 of 2 kept, 2 of 2, and the padding's are not counted: 1 - 3 / 4
    ids, other = kind([[0, 1], [2, 3], [0, 1]]), kind([[1, 3], [3, 2], [2, 3]])
    mask = kind([True, True, False])
    np.testing.assert_allclose(measures.decisions_changed(ids, other, 4, mask), 0.25)
    np.testing.assert_allclose(measures.decisions_changed(ids, other, 4), 0.5)  # 3 of 6


def test_empty_slots_are_no_decisions():
    # 4 is empty: the only decision of the first token is kept, of the second none; another number of slots is fine
    ids, other = np.asarray([[4, 1], [3, 4]]), np.asarray([[1, 4, 4], [0, 4, 4]])
    np.testing.assert_allclose(measures.decisions_changed(ids, other, 4), 0.5)
    assert measures.decisions_changed(np.full((2, 2), 4), ids, 4) == 0.0


def test_saturation_is_the_overlap_over_k_layer_by_layer():
    # layer 0: 2 of 2 and 1 of 2; layer 1: none, and padding
    then = np.asarray([[[0, 1], [2, 3]], [[0, 1], [4, 4]]], np.uint16)
    now = np.asarray([[[1, 0], [0, 3]], [[2, 3], [4, 4]]], np.uint16)
    np.testing.assert_allclose(measures.saturation(then, now, 4), [0.75, 0.0])


# --- specialisation -------------------------------------------------------------------------------------------


def test_the_domain_matrix_is_the_load_over_the_balanced_load():
    # domain 0 has 8 copies, 4 each at balance; domain 1 has 2
    np.testing.assert_allclose(counts_.domain_matrix(np.asarray([[6, 2], [0, 2]])), [[1.5, 0.0], [0.5, 2.0]])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("loads", "bits"),
    [
        ([[5, 0], [0, 5]], 1.0),  # the expert determines which of two equal domains
        ([[2, 6], [1, 3]], 0.0),  # independent
        ([[0, 0], [0, 0]], 0.0),
        ([[3, 4]], 0.0),  # one domain
        ([[2, 0], [1, 1]], 0.311278),  # H(domain) - H(domain | expert) = 1 - 3/4 H(1/3)
    ],
)
def test_mutual_information_in_bits(kind, loads, bits):
    np.testing.assert_allclose(measures.mutual_information(kind(loads)), bits, atol=1e-6)


@pytest.mark.parametrize("pairs", [counts_.pair_counts, jax.jit(counts_.pair_counts, static_argnums=1)])
def test_coactivation_is_the_share_of_an_experts_tokens_that_another_has_too(pairs):
    # expert 0 has tokens 0 and 1, both with 1; expert 1 has 3 tokens, 2 with 0 and 1 with 2; 3 is dead; 4 is empty
    counts = np.asarray(pairs(np.asarray([[0, 1], [1, 0], [2, 1], [4, 4]], np.int32), 4))
    np.testing.assert_array_equal(counts, [[2, 2, 0, 0], [2, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    expected = [[1, 1, 0, 0], [2 / 3, 1, 1 / 3, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(counts_.coactivation(counts), expected, rtol=1e-6)


def test_counts_of_pairs_add_up_over_batches_and_stay_separate_by_layer():
    ids = np.asarray(list(itertools.permutations(range(3), 2)))[None].repeat(2, 0)
    whole = counts_.pair_counts(ids, 3)
    assert whole.shape == (2, 3, 3)
    np.testing.assert_array_equal(whole, counts_.pair_counts(ids[:, :2], 3) + counts_.pair_counts(ids[:, 2:], 3))


# --- interference ---------------------------------------------------------------------------------------------


A, B = (
    {"x": jnp.asarray([3.0, 0.0]), "y": jnp.asarray([[4.0]])},
    {"x": jnp.asarray([0.0, 6.0]), "y": jnp.asarray([[8.0]])},
)


def test_cosine_and_ratio_of_two_gradients():
    # product 4 x 8 = 32, norms 5 and 10
    np.testing.assert_allclose(gradients.cosine(A, B), 32 / 50, rtol=1e-6)
    np.testing.assert_allclose(gradients.norm_ratio(A, B), 0.5, rtol=1e-6)
    np.testing.assert_allclose(gradients.cosine(A["x"], -A["x"]), -1.0, rtol=1e-6)


def test_gradients_whose_squares_underflow_are_not_nothing():
    tiny = jax.tree.map(lambda x: 1e-30 * x, A)
    np.testing.assert_allclose(gradients.cosine(tiny, B), 32 / 50, rtol=1e-5)
    np.testing.assert_allclose(gradients.norm_ratio(tiny, B), 0.5e-30, rtol=1e-5)


def test_without_a_balancing_gradient_there_is_no_angle_and_the_ratio_is_zero():
    nothing = jax.tree.map(jnp.zeros_like, A)
    assert np.isnan(gradients.cosine(nothing, A)) and np.isnan(gradients.cosine(A, nothing))
    assert gradients.norm_ratio(nothing, A) == gradients.norm_ratio(nothing, nothing) == 0.0
    assert np.isinf(gradients.norm_ratio(A, nothing))
