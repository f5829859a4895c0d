"""Laws of routing: the bias affects the selection only, ids stay inside their groups, padding is not routed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_jax.routing import RouterConfig, Routing, Tokens, affinity, count, drop_second, limit_groups, route

# scope: all laws of one score run together, so that each worker compiles for few scores
every_score = pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"], scope="module")
GROUPED = {"top_k": 3, "num_groups": 4, "top_groups": 2, "group_top": 2}  # of 8 experts: 01 23 45 67


def random_logits(seed: int, tokens: int = 6, experts: int = 8, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(tokens, experts)) * scale).astype(np.float32)


def row(*values: float) -> np.ndarray:
    return np.asarray([values], np.float32)


def vector(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def full(value: float) -> np.ndarray:
    return np.full(8, value, np.float32)


SLOPE = np.linspace(-0.2, 0.2, 8, dtype=np.float32)


@functools.cache
def routed(**options):
    """`route` under jit, one compilation for all tests with the same options and shapes."""
    router = RouterConfig(**options)
    return jax.jit(lambda logits, bias=None, **more: route(logits, router, bias, **more))


@functools.cache
def replayed(**options):
    """`route` of (logits, bias, expert_ids) with the selection given."""
    return jax.jit(lambda logits, bias, ids: route(logits, RouterConfig(**options), bias, select=lambda *_, **__: ids))


@functools.cache
def differentiated(select=None, **options):
    """Value and gradient in (logits, bias) of a function that normalised gates do not make constant."""

    def weighted_sum(logits, bias):
        gates = route(logits, RouterConfig(**options), bias, select=select).gates
        return (gates * jnp.arange(1.0, gates.size + 1.0).reshape(gates.shape)).sum()

    return jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1)))


class Replay(NamedTuple):
    """A hashable selector that returns fixed ids."""

    ids: bytes
    shape: tuple[int, int]

    def __call__(self, *_, **__):
        return jnp.asarray(np.frombuffer(self.ids, np.int32).reshape(self.shape))


scored = jax.jit(affinity, static_argnums=1)
dropping = jax.jit(drop_second)


def deepseek_v3_gate(
    logits: np.ndarray,
    bias: np.ndarray,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    group_top: int,
    gate_scale: float,
) -> tuple[list[list[int]], list[list[float]]]:
    """DeepSeek-V3's gate token by token, in float64, as its published inference code computes it."""
    ids, gates = [], []
    size = logits.shape[1] // num_groups
    for token in logits.astype(np.float64):
        scores = 1.0 / (1.0 + np.exp(-token))
        biased = scores + bias
        rank = [sum(sorted(biased[g * size : (g + 1) * size])[-group_top:]) for g in range(num_groups)]
        allowed = sorted(range(num_groups), key=lambda g: -rank[g])[:top_groups]
        masked = [b if e // size in allowed else -np.inf for e, b in enumerate(biased)]
        chosen = sorted(range(len(masked)), key=lambda e: -masked[e])[:top_k]
        total = sum(scores[e] for e in chosen)
        ids.append(chosen)
        gates.append([gate_scale * scores[e] / total for e in chosen])
    return ids, gates


# --- selection and gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_top", [1, 2])  # DeepSeek-V2 ranks a group by its best expert, V3 by its best two
def test_gate_equals_deepseek_v3_written_token_by_token(group_top):
    options = GROUPED | {"group_top": group_top, "gate_scale": 2.5}
    for seed in range(8):
        logits, bias = random_logits(seed), 0.3 * random_logits(seed + 100)[0]
        result = routed(score="sigmoid", **options)(logits, bias)
        ids, gates = deepseek_v3_gate(logits, bias, **options)
        np.testing.assert_array_equal(result.expert_ids, ids)
        np.testing.assert_allclose(result.gates, gates, rtol=1e-5)


def test_groups_are_ranked_by_one_expert_in_v2_and_by_two_in_v3():
    # groups {0.9, 0.0} and {0.6, 0.5}: the best expert is in the first, the better pair (1.1) in the second
    biased = row(0.9, 0.0, 0.6, 0.5)
    limit = jax.jit(limit_groups, static_argnums=(1, 2, 3))
    one, two = (np.asarray(limit(biased, 2, 1, group_top))[0] for group_top in (1, 2))
    np.testing.assert_array_equal(np.isfinite(one), [True, True, False, False])
    np.testing.assert_array_equal(np.isfinite(two), [False, False, True, True])


def test_a_masked_group_never_wins_over_negative_biased_scores():
    # biased scores are 0.5 - 1.5 = -1, but -0.9 in the first group; a mask of 0.0 would beat every one of
    # them and select experts 2 and 3 (DeepSeek-V3 #741, transformers #45440)
    bias = vector(-1.4, -1.4, -1.5, -1.5)
    options = {"top_k": 2, "num_groups": 2, "top_groups": 1, "group_top": 2}
    assert routed(**options)(row(0, 0, 0, 0), bias).expert_ids.tolist() == [[0, 1]]
    zero_masked = np.where([True, True, False, False], 0.5 + bias, 0.0)
    assert np.argsort(-zero_masked, kind="stable")[:2].tolist() == [2, 3]


FLOATS = functools.partial(st.floats, width=32, allow_nan=False)


@settings(deadline=None, max_examples=200)
@given(
    logits=arrays(np.float32, (4, 8), elements=FLOATS(-100, 100)),
    bias=arrays(np.float32, 8, elements=FLOATS(-50, 50)),
    group_top=st.sampled_from([1, 2]),
)
def test_ids_lie_inside_the_allowed_groups_and_are_distinct_under_any_bias(logits, bias, group_top):
    result = routed(**GROUPED | {"group_top": group_top})(logits, bias)
    ids = np.asarray(result.expert_ids)
    biased = np.asarray(result.scores) + bias
    rank = np.sort(biased.reshape(4, 4, 2), axis=-1)[:, :, 2 - group_top :].sum(-1)
    allowed = np.argsort(-rank, axis=1, kind="stable")[:, :2]
    for token in range(4):
        assert set(ids[token] // 2) <= set(allowed[token])
        assert len(set(ids[token])) == 3
    np.testing.assert_allclose(np.asarray(result.gates).sum(1), 1.0, rtol=1e-5)
    assert int(result.loads.sum()) == 12


@every_score
def test_normalised_gates_sum_to_gate_scale(score):
    for scale in (1.0, 20.0):
        gates = routed(top_k=3, score=score, gate_scale=2.5)(random_logits(0, scale=scale)).gates
        np.testing.assert_allclose(np.asarray(gates).sum(1), 2.5, rtol=1e-6)


@every_score
def test_the_bias_affects_selection_and_gates_are_unbiased_with_every_score_function(score):
    # Megatron-LM #1693: the bias must work with every score; vLLM #12002: gates from biased scores
    logits = row(3.0, 2.0, 1.0, 0.0)
    bias = vector(0.0, -9.0, 0.0, 9.0)
    result = routed(top_k=2, score=score)(logits, bias)
    scores = np.asarray(result.scores)[0]
    assert result.expert_ids.tolist() == [[3, 0]]
    np.testing.assert_allclose(result.gates[0], scores[[3, 0]] / (scores[3] + scores[0]), rtol=1e-6)


def test_scores_are_the_published_functions():
    # at logit 0: sigmoid 1/2; softmax of (0, 0) 1/2; sqrt(softplus) sqrt(log 2) = 0.83256
    # at logit log 3: sigmoid 3/4; softmax of (log 3, 0) 3/4; sqrt(log 4) = 1.17741
    logits = row(np.log(3.0), 0.0)
    np.testing.assert_allclose(scored(logits, "sigmoid")[0], [0.75, 0.5], rtol=1e-6)
    np.testing.assert_allclose(scored(logits, "softmax")[0], [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(scored(logits, "sqrt_softplus")[0], [1.17741, 0.83256], rtol=1e-5)


def test_an_unknown_score_is_an_error_that_lists_the_choices():
    with pytest.raises(ValueError, match=r"score='tanh' must be 'sigmoid', 'softmax', 'sqrt_softplus' or 'relu'"):
        routed(top_k=1, score="tanh")(random_logits(0))


def test_unnormalised_softmax_gates_are_the_scores_times_the_scale():
    # softmax of (log 4, log 3, log 2, log 1) is (4, 3, 2, 1) / 10; DeepSeekMoE has gates 0.4 and 0.3, here doubled
    logits = row(*np.log([4.0, 3.0, 2.0, 1.0]))
    result = routed(top_k=2, score="softmax", normalize_gates=False, gate_scale=2.0)(logits)
    np.testing.assert_allclose(result.gates, [[0.8, 0.6]], rtol=1e-6)


@pytest.mark.parametrize(("by", "chosen"), [("scores", [2, 0]), ("logits", [0, 1])])
def test_a_bias_is_added_to_scores_or_to_logits_and_gates_are_of_scores(by, chosen):
    # logits 4, 3 and 0 are scores 0.98, 0.95 and 0.5: a bias of 0.6 makes the last the best score, but not logit
    routing = routed(top_k=2, select_by=by)(jnp.array([[4.0, 3.0, 0.0, -9.0]]), jnp.array([0.0, 0.0, 0.6, 0.0]))
    assert routing.expert_ids[0].tolist() == chosen
    scores = 1 / (1 + np.exp([-4.0, -3.0, 0.0]))[chosen]
    np.testing.assert_allclose(routing.gates[0], scores / scores.sum(), rtol=1e-5)


@every_score
def test_gates_do_not_change_with_a_bias_that_selects_the_same(score):
    logits = random_logits(1)
    run = replayed(top_k=3, score=score)
    ids = np.argsort(-logits, axis=1)[:, :3].astype(np.int32)
    for bias in (full(7.0), 50 * SLOPE):
        np.testing.assert_array_equal(run(logits, full(0.0), ids).gates, run(logits, bias, ids).gates)


@pytest.mark.parametrize("normalize_gates", [True, False])
def test_no_gradient_reaches_the_bias(normalize_gates):
    run = differentiated(top_k=3, score="sigmoid", normalize_gates=normalize_gates)
    _, (to_logits, to_bias) = run(random_logits(0), SLOPE)
    assert np.asarray(to_logits).any()
    np.testing.assert_array_equal(to_bias, np.zeros(8))


def test_no_bias_is_a_bias_of_zero():
    run = routed(top_k=3, score="sigmoid")
    jax.tree.map(np.testing.assert_array_equal, run(random_logits(2)), run(random_logits(2), full(0.0)))


def test_a_bias_common_to_all_experts_selects_nothing_new():
    logits = random_logits(3)
    plain, shifted = (routed(top_k=3, score="sigmoid")(logits, full(c)).expert_ids for c in (0.0, 0.25))
    np.testing.assert_array_equal(plain, shifted)


def test_equal_scores_all_go_to_the_lowest_ids_as_documented():
    # a router of zeros sends every token of step 0 to experts 0, 1 and 2: MaxVio is E / K - 1 = 5 / 3
    result = routed(top_k=3, score="sigmoid")(np.zeros((6, 8), np.float32))
    np.testing.assert_array_equal(result.expert_ids, np.tile([0, 1, 2], (6, 1)))
    np.testing.assert_array_equal(result.loads, [6, 6, 6, 0, 0, 0, 0, 0])
    assert "lowest expert id" in route.__doc__


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_every_token_gets_top_k_distinct_experts(top_k):
    ids = np.asarray(routed(top_k=top_k)(random_logits(4)).expert_ids)
    assert all(len(set(token)) == top_k for token in ids)


@every_score
def test_permuting_experts_permutes_the_routing(score):
    logits, run = random_logits(5), routed(top_k=3, score=score)
    order = np.asarray([3, 0, 7, 1, 6, 2, 5, 4])
    plain, permuted = run(logits, SLOPE), run(logits[:, order], SLOPE[order])
    np.testing.assert_array_equal(order[np.asarray(permuted.expert_ids)], plain.expert_ids)
    np.testing.assert_array_equal(permuted.loads, np.asarray(plain.loads)[order])
    np.testing.assert_allclose(permuted.gates, plain.gates, rtol=1e-6)


def test_a_token_is_routed_as_if_it_were_alone():
    logits = random_logits(6)
    together = routed(**GROUPED)(logits, SLOPE)
    for token in range(6):
        alone = routed(**GROUPED)(logits[token : token + 1], SLOPE)
        np.testing.assert_array_equal(alone.expert_ids[0], together.expert_ids[token])


def test_routing_is_float32_and_loads_are_int32():
    result = routed(top_k=3, score="sigmoid")(random_logits(0))
    wide = result.gates, result.logits, result.scores, result.bias
    assert [a.dtype for a in wide] == [jnp.float32] * 4
    assert (result.expert_ids.dtype, result.loads.dtype) == (jnp.int32, jnp.int32)


# --- gates in turn ------------------------------------------------------------------------------------------


IN_TURN = dict(top_k=2, score="softmax", normalize_gates=False, sparsemixer=0.25)  # near: at most half below the best


def test_gates_in_turn_are_shares_among_the_experts_that_are_left_and_near_the_best():
    # 4 is the best: 3 is a quarter below it, 1.6 more than half. Without it 1.6 is less than half below 3, -1 is not
    logits = row(-1.0, 4.0, 1.6, 3.0)
    result = routed(**IN_TURN)(logits)
    assert result.expert_ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(result.gates, [[1 / (1 + np.exp(3.0 - 4.0)), 1 / (1 + np.exp(1.6 - 3.0))]], rtol=1e-6)
    # below 0 the distance is a share of the lower one: from -3 to -4 a quarter, from -3 to -7 more than half
    result = routed(**IN_TURN)(row(-7.0, -3.0, -9.0, -4.0))
    np.testing.assert_allclose(result.gates, [[1 / (1 + np.exp(-4.0 + 3.0)), 1 / (1 + np.exp(-7.0 + 4.0))]], rtol=1e-6)


def test_an_expert_that_a_bias_chose_has_a_gate_in_turn_though_it_is_not_near():
    logits = row(-1.0, 4.0, 1.6, 3.0)
    result = routed(**IN_TURN)(logits, vector(9.0, 0.0, 0.0, 0.0))
    assert result.expert_ids.tolist() == [[0, 1]]
    first = np.exp(-1.0) / (np.exp(-1.0) + np.exp(4.0) + np.exp(3.0))
    np.testing.assert_allclose(result.gates, [[first, 1 / (1 + np.exp(3.0 - 4.0))]], rtol=1e-6)


def test_gates_in_turn_are_finite_in_empty_slots_and_at_extreme_logits():
    ids = np.asarray([[0, 3, 3], [3, 3, 3], [1, 0, 2]], np.int32)
    logits = random_logits(0, tokens=3, experts=3)
    gates = np.asarray(replayed(**IN_TURN)(logits, np.zeros(3, np.float32), ids).gates)
    assert (gates[ids == 3] == 0).all() and (gates[ids < 3] > 0).all()
    assert gates[2, 2] == 1  # the last that is left
    run = differentiated(select=Replay(ids.tobytes(), ids.shape), **IN_TURN)
    for shift in (-200, -90, 0, 90, 200):
        value, (to_logits, _) = run(logits + np.float32(shift), np.zeros(3, np.float32))
        assert np.isfinite(value) and np.isfinite(to_logits).all()
        assert not np.asarray(to_logits)[1].any()


# --- custom selection, empty slots, padding -----------------------------------------------------------------


def test_an_empty_slot_has_no_gate_and_is_not_counted():
    # token 0 uses one slot of two, token 1 none, token 2 both: loads 2 1 0 and gates that sum to 1, 0 and 1
    ids = np.asarray([[0, 3], [3, 3], [1, 0]], np.int32)
    result = replayed(top_k=2)(np.zeros((3, 3), np.float32), np.zeros(3, np.float32), ids)
    np.testing.assert_array_equal(result.expert_ids, ids)
    np.testing.assert_array_equal(result.loads, [2, 1, 0])
    np.testing.assert_allclose(result.gates, [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]])


@every_score
def test_empty_slots_have_finite_gradients(score):
    ids = np.asarray([[0, 3], [3, 3], [1, 0]], np.int32)
    run = differentiated(top_k=2, score=score, select=Replay(ids.tobytes(), ids.shape))
    _, (to_logits, _) = run(random_logits(0, tokens=3, experts=3), np.zeros(3, np.float32))
    assert np.isfinite(to_logits).all()
    assert not np.asarray(to_logits)[1].any()


def test_a_selector_gets_scores_biased_scores_and_everything_known_of_the_tokens():
    seen = {}

    def select(scores, biased, **rest):
        seen.update(scores=scores, biased=biased, **rest)
        return jnp.asarray(np.tile(np.int32([0, 1]), (6, 1)))

    tokens, key = Tokens(ids=jnp.asarray(np.arange(6, dtype=np.int32))), jax.random.key(0)
    jax.eval_shape(
        lambda logits: route(logits, RouterConfig(top_k=2), tokens=tokens, select=select, key=key, train=True),
        random_logits(0),
    )
    assert seen["scores"].shape == (6, 8)
    assert seen["biased"].shape == (6, 8)
    assert (seen["top_k"], seen["train"], seen["key"] is key, seen["tokens"] is tokens) == (
        2,
        True,
        True,
        True,
    )


def test_padding_is_routed_nowhere_and_counted_nowhere():
    logits = random_logits(7)
    mask = np.asarray([True, True, False, True, False, True])
    run = routed(top_k=3, score="sigmoid")
    result, alone = run(logits, tokens=Tokens(mask=mask)), run(logits[mask])
    ids, gates = np.asarray(result.expert_ids), np.asarray(result.gates)
    np.testing.assert_array_equal(ids[~mask], 8)
    np.testing.assert_array_equal(gates[~mask], 0.0)
    np.testing.assert_array_equal(ids[mask], alone.expert_ids)
    np.testing.assert_array_equal(result.loads, alone.loads)


@settings(deadline=None, max_examples=50)
@given(ids=arrays(np.int32, (6, 2), elements=st.integers(0, 4)))
def test_counts_are_those_of_bincount_without_the_empty_slots(ids):
    np.testing.assert_array_equal(jax.jit(count, static_argnums=1)(ids, 4), np.bincount(ids.ravel(), minlength=5)[:4])


def test_more_tokens_than_float32_can_count_are_counted_exactly():
    # in float32 2^24 + 1 = 2^24: a float count stops there
    ids = np.zeros((2**24 + 1, 1), np.int32)
    loads = jax.jit(count, static_argnums=1)(ids, 2)
    assert loads.tolist() == [2**24 + 1, 0]
    assert np.float32(2**24) + np.float32(1) == np.float32(2**24)


# --- extreme logits -----------------------------------------------------------------------------------------


@every_score
@pytest.mark.parametrize("normalize_gates", [True, False])
def test_gates_and_their_gradients_are_finite_at_extreme_logits(score, normalize_gates):
    run = differentiated(top_k=3, score=score, normalize_gates=normalize_gates)
    for shift in (-200, -100, -90, -60, -45, 0, 60, 100, 200):
        value, (to_logits, _) = run(random_logits(8) + np.float32(shift), full(0.0))
        assert np.isfinite(value), shift
        assert np.isfinite(to_logits).all(), shift


@every_score
def test_gates_and_their_gradients_are_finite_when_logits_are_100_apart(score):
    # all experts chosen, so that a saturated score and one that underflows share a denominator
    value, (to_logits, _) = differentiated(top_k=4, score=score)(row(100, -100, 0, -50), vector(0, 0, 0, 0))
    assert np.isfinite(value)
    assert np.isfinite(to_logits).all()


@every_score
def test_normalised_gates_tend_to_a_softmax_as_all_logits_fall(score):
    # sigmoid(x) = exp(x) (1 - exp(x) + ...) and sqrt(log(1 + exp(x))) = exp(x / 2) (1 - ...): their shares
    # are the softmax of x, and of x / 2; exp(-30) is far below the 6e-8 of float32
    logits = random_logits(9)
    ids = np.tile(np.arange(3, dtype=np.int32), (6, 1))
    weight = np.exp((0.5 if score == "sqrt_softplus" else 1.0) * logits[:, :3].astype(np.float64))
    for shift in (-30, -45, -60, -85, -100, -200):
        gates = replayed(top_k=3, score=score)(logits + np.float32(shift), full(0.0), ids).gates
        np.testing.assert_allclose(gates, weight / weight.sum(1, keepdims=True), rtol=1e-4, err_msg=str(shift))


# --- GShard's random second expert --------------------------------------------------------------------------


@functools.cache
def dropped_second() -> tuple[Routing, Routing]:
    """20,000 tokens whose second gate is 0.1, before and after."""
    # softmax over the chosen pair is (0.9, 0.1) when their logits differ by log 9
    logits = np.tile(row(np.log(9.0), 0.0, -50.0, -50.0), (20_000, 1))
    routing = routed(top_k=2, score="softmax")(logits)
    return routing, dropping(routing, jax.random.key(0))


def test_second_expert_is_kept_with_twice_its_gate():
    # Bernoulli(0.2) over 20,000 tokens: sd sqrt(0.2 x 0.8 / 20,000) = 0.0028, five of them are 0.014
    _, after = dropped_second()
    assert abs(int(after.loads[1]) / 20_000 - 0.2) < 0.014


def test_second_expert_is_always_kept_from_a_gate_of_one_half():
    # the second gate is at most 1/2 and there min(1, 2 g) = 1
    routing = routed(top_k=2, score="softmax")(np.zeros((20_000, 4), np.float32))
    after = dropping(routing, jax.random.key(1))
    np.testing.assert_array_equal(after.loads, [20_000, 20_000, 0, 0])


def test_dropping_the_second_expert_leaves_the_first_gate_as_it_was():
    before, after = dropped_second()
    np.testing.assert_array_equal(np.asarray(after.gates)[:, 0], np.asarray(before.gates)[:, 0])
    np.testing.assert_array_equal(np.asarray(after.expert_ids)[:, 0], np.asarray(before.expert_ids)[:, 0])


def test_a_dropped_second_expert_is_an_empty_slot():
    before, after = dropped_second()
    dropped = np.asarray(after.expert_ids)[:, 1] == 4
    was, now = np.asarray(before.gates)[:, 1], np.asarray(after.gates)[:, 1]
    np.testing.assert_array_equal(now, np.where(dropped, 0.0, was))
    np.testing.assert_array_equal(after.loads, [20_000, 20_000 - dropped.sum(), 0, 0])


def test_the_chance_of_the_second_expert_does_not_depend_on_the_gate_scale():
    # GShard's rule is on the normalised gate: 2 x 0.1, whatever factor multiplies the gates
    before, after = dropped_second()
    scaled = dropping(before._replace(gates=2.5 * np.asarray(before.gates)), jax.random.key(0))
    np.testing.assert_array_equal(scaled.loads, after.loads)


# --- hand-made routings and arguments that do not fit ---------------------------------------------------------


def test_a_routing_has_the_seven_fields_of_the_protocol():
    names = ("expert_ids", "gates", "loads", "logits", "scores", "bias", "tokens")
    assert Routing._fields == names


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=5),
        dict(top_k=2, num_groups=3),
        dict(top_k=3, num_groups=2, top_groups=1),
        dict(top_k=2, num_groups=4, top_groups=2, group_top=2),
    ],
)
def test_route_refuses_what_does_not_fit(options):
    with pytest.raises(ValueError, match="must be"):
        route(jnp.zeros((3, 4), jnp.float32), RouterConfig(**options))
