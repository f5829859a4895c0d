"""Laws of the measures: hand-computed values, the same for numpy and jax arrays, leading dimensions kept."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import metrics
from moe_jax.routing import Tokens, route

MEASURES = {name: getattr(metrics, name) for name in ("max_violation", "load_entropy", "dead_experts")}
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
        routing = route(logits, tokens=Tokens(mask=mask), **options)
        return metrics.aux_loss_value(routing), routing.loads

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


@pytest.mark.parametrize("measure", [metrics.bias_range, jax.jit(metrics.bias_range)], ids=["numpy", "jax"])
def test_bias_range_is_the_largest_difference_that_selection_sees(measure):
    # 0.5 - (-0.25); adding 10 to all changes nothing; a single expert has none; layers stay apart
    bias = np.asarray([0.5, -0.25, 0.0], np.float32)
    np.testing.assert_allclose(measure(bias), 0.75)
    np.testing.assert_allclose(measure(bias + np.float32(10.0)), 0.75)
    np.testing.assert_allclose(measure(bias[:1]), 0.0)
    np.testing.assert_allclose(measure(np.stack([bias, 2 * bias])), [0.75, 1.5])


@KINDS
def test_layers_stay_apart(measured):
    # balanced, collapsed and unloaded layers side by side, none pooled with another
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
    for name in ("max_violation", "load_entropy"):
        assert measured(name, [[4, 4], [8, 0]]).dtype == np.float32


def test_totals_of_an_evaluation_beyond_int32_are_measured_in_int64():
    # 2^33 copies: (6 - 3) / 3 with every load times 2^30
    loads = np.asarray([1, 2, 3, 6], np.int64) * 2**30
    np.testing.assert_allclose(metrics.max_violation(loads), 1.0, atol=1e-6)
    np.testing.assert_allclose(metrics.load_entropy(loads), metrics.load_entropy(loads // 2**30), rtol=1e-6)


def test_measures_do_not_depend_on_the_order_of_experts():
    loads = np.asarray([5, 0, 2, 9], np.int64)
    for measure in (metrics.max_violation, metrics.load_entropy, metrics.dead_experts):
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
