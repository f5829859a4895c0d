"""Selectors: published arithmetic computed by hand, balance, padding, and what expert choice leaks of the future."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax import balance
from moe_jax.balance.measures import max_violation
from moe_jax.balance.selectors import balanced_table, cutoffs, leak_bits, rank_in_group
from moe_jax.config import ModelConfig
from moe_jax.routing import RouterConfig, Routing, Rows, Tokens, count, route

KEY = jax.random.key(0)


@functools.cache
def selected(name: str, top_k: int, **options):
    """(scores, tokens, state, key) -> ids, compiled."""
    select = balance.make({name: options}, ModelConfig(top_k=top_k)).select

    def ids(scores, tokens, state, key):
        bias = jnp.zeros(scores.shape[1]) if state is None else state["bias"]
        return select(scores, scores + bias, top_k=top_k, tokens=tokens, key=key, train=True, state=state)

    return jax.jit(ids)


def chosen(name: str, scores, top_k: int = 1, tokens: Tokens = Tokens(), state=None, key=KEY, **options) -> np.ndarray:
    tokens = jax.tree.map(jnp.asarray, tokens)
    return np.asarray(selected(name, top_k, **options)(jnp.asarray(scores, jnp.float32), tokens, state, key))


def experts(ids: np.ndarray, num_experts: int) -> list[list[int]]:
    """The experts of each token, empty slots left out."""
    return [sorted(int(e) for e in row if e < num_experts) for row in ids]


def loads(ids: np.ndarray, num_experts: int) -> list[int]:
    return count(jnp.asarray(ids), num_experts).tolist()


def random_scores(seed: int, tokens: int, num_experts: int, tilt: float = 1.0) -> np.ndarray:
    """Sigmoid scores of a router that prefers the last experts."""
    logits = np.random.default_rng(seed).normal(size=(tokens, num_experts)) + tilt * np.linspace(-1, 1, num_experts)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


# --- expert_choice ------------------------------------------------------------------------------------------

FOUR = [[0.9, 0.2], [0.8, 0.7], [0.3, 0.6], [0.1, 0.5]]


def test_each_expert_takes_its_best_tokens_up_to_its_capacity():
    # C = 1 x 4 / 2 = 2: expert 0 takes .9 and .8, expert 1 takes .7 and .6; token 3 gets none
    ids = chosen("expert_choice", FOUR)
    assert experts(ids, 2) == [[0], [0, 1], [1], []]
    assert ids.shape == (4, 2)
    # half of it is C = 1, twice of it every token
    assert experts(chosen("expert_choice", FOUR, capacity_factor=0.5), 2) == [[0], [1], [], []]
    assert experts(chosen("expert_choice", FOUR, capacity_factor=2.0), 2) == [[0, 1]] * 4


def test_equal_scores_go_to_the_earlier_token():
    assert experts(chosen("expert_choice", np.full((4, 2), 0.5)), 2) == [[0, 1], [0, 1], [], []]


def test_padding_is_not_chosen_and_leaves_no_room():
    # two valid tokens: C = 1, not 2
    mask = np.asarray([False, True, True, False])
    assert experts(chosen("expert_choice", FOUR, tokens=Tokens(mask=mask)), 2) == [[], [0, 1], [], []]


def test_experts_choose_within_each_sequence_if_that_is_the_scope():
    # two sequences of two: C = 1, so expert 0 takes .9 | .3 and expert 1 takes .7 | .6
    row = np.asarray([0, 0, 1, 1])
    expected = [[0], [1], [0, 1], []]
    for tokens in (Tokens(row=row), Tokens(row=row, rows=Rows(2)), Tokens(rows=Rows(2))):
        assert experts(chosen("expert_choice", FOUR, tokens=tokens, scope="sequence"), 2) == expected
    assert experts(chosen("expert_choice", FOUR, tokens=Tokens(row=row)), 2) == [[0], [0, 1], [1], []]


def test_sequences_are_the_same_where_their_number_is_known():
    row = np.repeat(np.arange(8, dtype=np.int32), 6)
    for seed in range(5):
        mask = np.random.default_rng(seed).random(48) < 0.8
        both = (Tokens(mask=mask, row=row, rows=rows) for rows in (None, Rows(8)))
        one, other = (chosen("expert_choice", random_scores(seed, 48, 4), 2, t, scope="sequence") for t in both)
        np.testing.assert_array_equal(one, other)


def test_expert_choice_is_in_perfect_balance_at_once():
    ids = chosen("expert_choice", random_scores(0, 64, 8), top_k=2)
    assert loads(ids, 8) == [16] * 8


def test_the_leak_of_expert_choice_is_the_bound_of_equation_7():
    # 9 layers x 2 x log2(7 / 8 x 8) = 18 x 2.807 = 50.53
    np.testing.assert_allclose(leak_bits(16, 2, 9), 50.53, atol=0.01)
    assert leak_bits(4, 2) == leak_bits(4, 3) == leak_bits(4, 4) == 0.0


def test_the_choices_of_experts_carry_more_bits_than_the_bound():
    # E experts choose K T / E of T tokens: log2 C(T, KT/E)^E / T bits per token, exactly
    for num_tokens in (64, 1024):
        ways = math.comb(num_tokens, num_tokens * 2 // 16)
        assert 16 * math.log2(ways) / num_tokens > leak_bits(16, 2)


def test_the_last_token_reroutes_earlier_ones_under_expert_choice_but_not_under_top_k():
    # the last of 32 tokens becomes the best of every expert, and takes a place from the weakest in each
    scores = random_scores(1, 32, 4)
    changed = scores.copy()
    scores[-1], changed[-1] = 0.0, 1.0
    before, after = (experts(chosen("expert_choice", s, 2), 4)[:-1] for s in (scores, changed))
    rerouted = [set(b) - set(a) for b, a in zip(before, after, strict=True)]
    assert sorted(e for lost in rerouted for e in lost) == [0, 1, 2, 3]  # each expert drops one earlier token
    top = [route(jnp.asarray(s), RouterConfig(top_k=2)).expert_ids[:-1] for s in (scores, changed)]
    np.testing.assert_array_equal(*top)


def test_rank_in_group_counts_the_better_ones_of_the_same_group():
    # group 0: .3 .9 -> 1 0; group 2: .5 .5 .7 -> 1 2 0
    values, group = jnp.asarray([0.3, 0.5, 0.9, 0.5, 0.7]), jnp.asarray([0, 2, 0, 2, 2])
    assert rank_in_group(values, group, 3).tolist() == [1, 1, 0, 2, 0]


# --- sinkhorn -----------------------------------------------------------------------------------------------


def balanced(matrix: np.ndarray, rounds: int) -> np.ndarray:
    """Sinkhorn in float64, as in Megatron-LM."""
    v = np.ones(matrix.shape[1])
    for _ in range(rounds):
        u = 1 / len(matrix) / (matrix * v).sum(1)
        v = 1 / matrix.shape[1] / (matrix * u[:, None]).sum(0)
    return u[:, None] * matrix * v


def test_one_round_of_sinkhorn_divides_by_the_mass_of_each_expert():
    # sigmoids of log 4, -log 4 and log 1.5, -log 1.5: the matrix is 4 1/4, 3/2 2/3. Rows sum to 1: .94 .06, .69 .31;
    # columns have 1.63 and .37: token 0 compares .94/1.63 = .58 with .06/.37 = .16, token 1 .42 with .84
    ids = chosen("sinkhorn", [[0.8, 0.2], [0.6, 0.4]], iterations=1)
    assert ids.tolist() == [[0], [1]]


@pytest.mark.parametrize("rounds", [1, 2, 10])
@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
def test_sinkhorn_balances_the_exponentials_of_the_logits_whatever_the_score(score, rounds):
    logits = np.random.default_rng(2).normal(size=(64, 8)) + np.linspace(-1, 1, 8)
    best = np.argsort(-balanced(np.exp(logits), rounds), axis=1)[:, :2]
    select = balance.make({"sinkhorn": {"iterations": rounds}}, ModelConfig(score=score)).select
    routing = route(jnp.asarray(logits, jnp.float32), RouterConfig(top_k=2, score=score), select=select, train=True)
    np.testing.assert_array_equal(routing.expert_ids, best)


def test_sinkhorn_leaves_padding_out_of_the_masses():
    scores = random_scores(4, 48, 4)
    mask = np.arange(48) % 3 > 0
    alone = chosen("sinkhorn", scores[mask], 2)
    np.testing.assert_array_equal(chosen("sinkhorn", scores, 2, Tokens(mask=mask))[mask], alone)


# --- bip ----------------------------------------------------------------------------------------------------

SIXTEENTHS = np.asarray([[15, 1], [13, 2], [11, 4], [10, 8]]) / 16


def test_bip_prices_the_crowded_expert_by_the_token_that_is_one_too_many():
    # p = second best = 1 2 4 8; s - p = 14 11 7 2 at expert 0, whose third best is q_0 = 7; expert 1 has 0 0 0 0.
    # s - q = 8 6 4 3 against 1 2 4 8: token 2 is indifferent, and goes to the lower id
    assert chosen("bip", SIXTEENTHS, iterations=1).tolist() == [[0], [0], [0], [1]]
    assert chosen("bip", SIXTEENTHS[:, ::-1], iterations=1).tolist() == [[1], [1], [0], [0]]


def test_bip_never_pays_for_a_starved_expert():
    # one round, q = 0 for all: no expert has more than kT/E = 2 of the best, and scores decide, here 2 to 2
    assert chosen("bip", [[0.9, 0.1], [0.8, 0.2], [0.1, 0.8], [0.2, 0.9]]).tolist() == [[0], [0], [1], [1]]


def bip_reference(scores: np.ndarray, top_k: int, rounds: int) -> np.ndarray:
    q = np.zeros(scores.shape[1], np.float32)
    room = top_k * scores.shape[0] // scores.shape[1]
    for _ in range(rounds):
        p = np.maximum(np.sort(scores - q, axis=1)[:, ::-1][:, top_k], 0)
        q = np.maximum(np.sort(scores - p[:, None], axis=0)[::-1][room], 0)
    return np.argsort(-(scores - q), axis=1, kind="stable")[:, :top_k]


@pytest.mark.parametrize("rounds", [1, 4, 16])
def test_bip_equals_the_published_iteration(rounds):
    scores = random_scores(5, 64, 8)
    np.testing.assert_array_equal(chosen("bip", scores, 2, iterations=rounds), bip_reference(scores, 2, rounds))


def test_bip_with_as_many_experts_a_token_as_there_are_needs_no_price():
    assert experts(chosen("bip", random_scores(6, 8, 4), top_k=4), 4) == [[0, 1, 2, 3]] * 8


def test_bip_leaves_padding_out_of_the_prices():
    scores = random_scores(7, 48, 4)
    mask = np.arange(48) % 3 > 0
    np.testing.assert_array_equal(chosen("bip", scores, 2, Tokens(mask=mask))[mask], bip_reference(scores[mask], 2, 4))


# --- expert_threshold ---------------------------------------------------------------------------------------


def test_a_cutoff_leaves_the_share_k_of_e_above():
    # half of four scores: two are in the last quarter, so 3/4; and with two of each expert in the second: 1/4
    histogram = jnp.asarray([[0, 2, 0, 2], [2, 2, 0, 0]], jnp.int32)
    np.testing.assert_allclose(cutoffs(histogram, 1), [0.75, 0.25])
    # a quarter is one score, half of the two in the last bin that has any
    four = jnp.asarray([[0, 2, 0, 2], [2, 2, 0, 0], [4, 0, 0, 0], [0, 0, 0, 4]], jnp.int32)
    np.testing.assert_allclose(cutoffs(four, 1), [0.875, 0.375, 0.1875, 0.9375])


def test_a_cutoff_is_right_for_more_tokens_than_float32_counts():
    # 2^27 + 2^27 + 2^28 scores in three bins of four: half are above 1/4
    histogram = jnp.asarray([[2**28, 0, 2**27, 2**27]] * 2, jnp.int32)
    np.testing.assert_allclose(cutoffs(histogram, 1), [0.5, 0.5])


def threshold_state(**options):
    return balance.make({"expert_threshold": options}, ModelConfig(top_k=1))


def step(balancer, state, histogram, index: int = 0):
    statistics = {"loads": jnp.ones(2, jnp.int32), "expert_threshold": jnp.asarray(histogram, jnp.int32)}
    return balancer.update(statistics, state, jnp.int32(index))


def test_the_first_cutoff_becomes_the_threshold_at_once_and_later_ones_move_it_on():
    balancer = threshold_state(bins=10, ema=0.9)
    state = balancer.init(2)
    first, second = np.zeros((2, 2, 10), np.int32)
    first[:, [2, 7]] = 4  # half above .7
    second[:, [1, 5]] = 4  # half above .5
    state = step(balancer, state, first)
    np.testing.assert_allclose(state["bias"], [-0.7, -0.7], rtol=1e-6)
    state = step(balancer, state, second)
    np.testing.assert_allclose(state["bias"], [-0.68, -0.68], rtol=1e-6)  # .9 x .7 + .1 x .5


def test_a_frozen_threshold_stays():
    balancer = threshold_state(bins=10, freeze_step=1)
    histogram = np.full((2, 10), 3)
    moved = step(balancer, balancer.init(2), histogram, 0)
    np.testing.assert_allclose(moved["bias"], [-0.5, -0.5])
    other = np.zeros((2, 10))
    other[:, 9] = 1
    np.testing.assert_array_equal(step(balancer, moved, other, 1)["bias"], moved["bias"])
    np.testing.assert_array_equal(step(balancer, balancer.init(2), other, 1)["bias"], [0, 0])


def test_a_token_uses_every_expert_whose_threshold_it_passes():
    # thresholds .5 .6 .7; .7 itself does not pass .7
    scores = [[0.9, 0.9, 0.9], [0.6, 0.5, 0.7], [0.1, 0.2, 0.3]]
    state = {"bias": jnp.asarray([-0.5, -0.6, -0.7])}
    assert experts(chosen("expert_threshold", scores, state=state), 3) == [[0, 1, 2], [0], []]
    # with one slot, the expert whose threshold is exceeded most: .4 .3 .2
    ids = chosen("expert_threshold", scores, state=state, slots=1)
    assert ids.tolist() == [[0], [0], [3]]


def test_before_a_cutoff_is_seen_a_token_uses_its_k_best_scores():
    scores = [[0.9, 0.5, 0.7], [0.1, 0.2, 0.3]]
    ids = chosen("expert_threshold", scores, 2, state={"bias": jnp.zeros(3)})
    assert experts(ids, 3) == [[0, 2], [1, 2]]
    assert ids.shape == (2, 3)


def test_the_histogram_counts_valid_scores_only_and_keeps_both_ends():
    balancer = threshold_state(bins=10)
    logits = jnp.asarray([[-40.0, 40.0], [0.0, 0.0], [3.0, 3.0]])  # scores 0 and 1, .5 and .5
    routing = route(logits, RouterConfig(top_k=1), tokens=Tokens(mask=jnp.asarray([True, True, False])))
    histogram = balancer.observe(routing)["expert_threshold"]
    assert histogram.tolist() == [[1, 0, 0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]]


def test_thresholds_of_one_batch_give_the_next_k_experts_per_token_on_average():
    balancer = balance.make({"expert_threshold": {}}, ModelConfig(top_k=2))

    @jax.jit
    def step(state, key):
        logits = jax.random.normal(key, (4096, 8)) + jnp.linspace(-1, 1, 8)
        select = functools.partial(balancer.select, state=state)
        routing = route(logits, RouterConfig(top_k=2), state["bias"], select=select, train=True)
        return balancer.update(balancer.observe(routing), state, jnp.int32(0)), routing.loads

    state, first = step(balancer.init(8), jax.random.key(0))
    _, second = step(state, jax.random.key(1))
    # 1024 an expert, with a standard deviation of sqrt(2 x 4096 x 1/4 x 3/4) = 39 of the cutoff and the sample
    np.testing.assert_allclose(second, np.full(8, 1024), atol=4 * 39)
    assert max_violation(first) > 1.0


# --- hash ---------------------------------------------------------------------------------------------------


def hash_tables(vocab: int, num_experts: int, top_k: int, layers: int = 1) -> np.ndarray:
    init = balance.make({"hash": {}}, ModelConfig(vocab_size=vocab, top_k=top_k)).init
    return np.asarray(jax.vmap(lambda layer: init(num_experts, layer)["hash"]["table"])(jnp.arange(layers)))


@pytest.mark.parametrize(
    ("vocab", "num_experts", "top_k"), [(264, 8, 2), (264, 8, 3), (50, 6, 4), (7, 5, 5), (9, 4, 1)]
)
def test_the_first_tables_use_all_experts_equally_and_none_twice_for_a_token(vocab, num_experts, top_k):
    for table in hash_tables(vocab, num_experts, top_k, layers=3):
        assert (table.shape, table.dtype) == ((vocab, top_k), np.int32)
        times = np.bincount(table.ravel(), minlength=num_experts)
        assert times.max() - times.min() <= 1
        assert all(len(set(row)) == top_k for row in table.tolist())


def test_layers_have_different_tables_and_every_run_the_same():
    one, other = hash_tables(264, 8, 2, layers=2)
    assert (one != other).any()
    np.testing.assert_array_equal(hash_tables(264, 8, 2)[0], one)


def test_experts_are_those_of_the_token_id_whatever_the_scores():
    table = jnp.asarray([[0, 1], [2, 3], [3, 0]], jnp.int32)
    state = {"bias": jnp.zeros(4), "hash": {"table": table}}
    for seed in range(2):
        # id 5 is beyond the table: 5 mod 3 = 2
        ids = chosen("hash", random_scores(seed, 4, 4), 2, Tokens(ids=np.asarray([2, 0, 0, 5])), state)
        assert ids.tolist() == [[3, 0], [0, 1], [0, 1], [3, 0]]


def test_without_a_table_ids_take_experts_in_turn():
    # id n gets 2n and 2n + 1, modulo 5
    ids = chosen("hash", random_scores(0, 4, 5), 2, Tokens(ids=np.asarray([0, 1, 2, 3])))
    assert ids.tolist() == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_hash_without_token_ids_is_refused():
    with pytest.raises(ValueError, match=r"hash chooses experts by token id, but tokens\.ids is None; give the ids"):
        chosen("hash", random_scores(0, 4, 4))


def table_violation(table: np.ndarray, frequencies: np.ndarray, num_experts: int) -> float:
    times = np.zeros(num_experts)
    np.add.at(times, table, frequencies[:, None])
    return times.max() / times.mean() - 1


def test_the_most_frequent_token_fills_one_expert_and_the_rest_the_other():
    # 8 | 4 + 2 + 1 + 1: in perfect balance
    table = balanced_table([1, 4, 8, 2, 1], num_experts=2, top_k=1)
    assert len({int(table[t, 0]) for t in (0, 1, 3, 4)}) == 1
    assert table[2, 0] != table[0, 0]


def test_a_balanced_table_balances_the_frequencies_of_language():
    frequencies = 1 / (10 + np.arange(20_000.0))
    table = balanced_table(frequencies, num_experts=64, top_k=4)
    assert (table.shape, table.dtype) == ((20_000, 4), np.int32)
    assert table_violation(table, frequencies, 64) < 1e-3
    assert all(len(set(row)) == 4 for row in table.tolist())
    # a random table of the same size is far from it
    rows = np.random.default_rng(0).random((20_000, 64)).argsort(1)[:, :4]
    assert table_violation(rows, frequencies, 64) > 0.05


def test_tokens_that_never_occur_are_spread_over_all_experts():
    # token 5 counts 1000 in two experts, the 62 others 500 in two each: 8000 an expert, 14 x 500 beside 1000, or 16
    frequencies = np.zeros(63)
    frequencies[5] = 1000
    table = balanced_table(frequencies, num_experts=8, top_k=2)
    others = np.bincount(np.delete(table, 5, axis=0).ravel(), minlength=8)
    assert sorted(others) == [14, 14, 16, 16, 16, 16, 16, 16]
    assert balanced_table(np.zeros(16), 4, 1).ravel().tolist() != [0] * 16


def test_a_token_that_is_too_frequent_is_beyond_any_table():
    # half of all copies are of token 0, an expert's share is a quarter: violation 1
    assert table_violation(balanced_table([3, 1, 1, 1], 4, 1), np.asarray([3.0, 1, 1, 1]), 4) == 1.0


def test_a_balanced_table_depends_on_its_seed_alone():
    frequencies = np.random.default_rng(0).integers(1, 50, 500)
    one, same, other = (balanced_table(frequencies, 8, 2, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize(
    ("frequencies", "top_k", "sentence"),
    [([1.0, -1.0], 1, "at least 0"), ([1.0, math.nan], 1, "finite"), ([1.0, 2.0], 5, r"top_k=5 .* num_experts=4")],
)
def test_a_table_of_impossible_numbers_is_refused(frequencies, top_k, sentence):
    with pytest.raises(ValueError, match=sentence):
        balanced_table(frequencies, 4, top_k)


# --- random and forced --------------------------------------------------------------------------------------


def test_random_experts_are_distinct_and_uniform():
    ids = chosen("random", random_scores(0, 8192, 8, tilt=5.0), top_k=3)
    assert (np.diff(np.sort(ids, axis=1)) > 0).all()
    # 3072 an expert, with a standard deviation of sqrt(8192 x 3/8 x 5/8) = 44
    np.testing.assert_allclose(loads(ids, 8), np.full(8, 3072), atol=4 * 44)


def test_random_experts_depend_on_the_key_alone():
    drawn = functools.partial(chosen, "random", top_k=2)
    one, same = (drawn(random_scores(seed, 16, 8), key=jax.random.key(1)) for seed in (0, 9))
    other = drawn(random_scores(0, 16, 8), key=jax.random.key(2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    with pytest.raises(ValueError, match="random draws experts, but key is None; give a key"):
        chosen("random", random_scores(0, 4, 4), key=None)


def test_forced_experts_come_in_turn_over_the_valid_tokens():
    # valid tokens 0 1 2 get 0 1 2 | 3 0 1 | 2 3 0; the experts of padding do not matter
    mask = np.asarray([True, False, True, True])
    ids = chosen("forced", random_scores(0, 4, 4), 3, Tokens(mask=mask))
    assert ids[mask].tolist() == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    assert loads(ids[mask], 4) == [3, 2, 2, 2]


# --- device_capacity ----------------------------------------------------------------------------------------


def sent(scores, ids, tokens: Tokens = Tokens(), key=KEY, train: bool = True, **options) -> np.ndarray:
    scores, ids = jnp.asarray(scores, jnp.float32), jnp.asarray(ids, jnp.int32)
    num_experts = scores.shape[1]
    drop = balance.make({"device_capacity": options}).drop
    gates = jnp.ones(ids.shape)
    routing = Routing(ids, gates, count(ids, num_experts), scores, scores, jnp.zeros(num_experts), tokens)
    return np.asarray(drop(routing, {}, key, train))


# experts 0 and 1 are on device 0; three of four tokens choose it
AFFINITY = [[0.9, 0.1, 0.1, 0.1], [0.1, 0.3, 0.1, 0.1], [0.5, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.2]]
CHOICE = [[0], [1], [0], [3]]


def test_a_device_keeps_its_copies_of_highest_affinity():
    # four copies on two devices: budgets of 2; device 0 has .9 .3 .5 and drops .3, device 1 is below its budget
    kept = sent(AFFINITY, CHOICE, num_devices=2, protected=0.0)
    assert kept.ravel().tolist() == [True, False, True, True]
    # half of it is 1: only .9 stays on device 0
    half = sent(AFFINITY, CHOICE, num_devices=2, protected=0.0, capacity_factor=0.5)
    assert half.ravel().tolist() == [True, False, False, True]


def test_empty_slots_fill_no_budget():
    # three copies on two devices: round(1.5) = 2
    kept = sent(AFFINITY, [[0], [1], [0], [4]], num_devices=2, protected=0.0)
    assert kept.ravel().tolist() == [True, False, True, False]


def test_evaluation_and_protected_sequences_keep_all_copies():
    for options in ({"train": False, "protected": 0.0}, {"protected": 1.0}):
        assert sent(AFFINITY, CHOICE, num_devices=2, **options).all()


def test_where_no_devices_are_named_they_are_the_groups_and_else_the_experts():
    # each expert a device, with a budget of 1: expert 0 keeps .9 of .9 .5
    assert sent(AFFINITY, CHOICE, protected=0.0).ravel().tolist() == [True, True, False, True]
    grouped = balance.make({"device_capacity": {"protected": 0.0}}, ModelConfig(num_groups=2)).drop
    ids, scores = jnp.asarray(CHOICE), jnp.asarray(AFFINITY)
    routing = Routing(ids, jnp.ones(ids.shape), count(ids, 4), scores, scores, jnp.zeros(4), Tokens())
    assert grouped(routing, {}, KEY, True).ravel().tolist() == [True, False, True, True]


def test_protected_sequences_are_drawn_whole_and_first_of_the_budget():
    # 200 sequences of two tokens, affinity falling; all 400 copies on device 0, whose budget is 200
    affinity = np.zeros((400, 4))
    affinity[:, 0] = np.linspace(1.0, 0.1, 400)
    row = np.repeat(np.arange(200, dtype=np.int32), 2)
    choice = np.zeros((400, 1))
    how = {"num_devices": 2, "protected": 0.1}
    kept = sent(affinity, choice, Tokens(row=jnp.asarray(row)), **how)[:, 0]
    assert kept.sum() == 200
    late = kept[200:].reshape(-1, 2)  # these would be dropped without protection
    np.testing.assert_array_equal(late[:, 0], late[:, 1])
    # a tenth of 100 sequences, with a standard deviation of 3
    assert 1 <= late[:, 0].sum() <= 22
    same = sent(affinity, choice, Tokens(row=jnp.asarray(row), rows=Rows(200)), **how)[:, 0]
    np.testing.assert_array_equal(same, kept)
    assert (sent(affinity, choice, Tokens(row=jnp.asarray(row)), key=jax.random.key(1), **how)[:, 0] != kept).any()


# --- on many devices ----------------------------------------------------------------------------------------

LOCAL = {
    "expert_choice": {"scope": "sequence"},
    "sinkhorn": {},
    "expert_threshold": {},
    "relu": {"slots": 3},
    "top_p": {},
    "moving_quantile": {},
    "hash": {},
    "random": {},
}


@pytest.mark.parametrize("name", LOCAL)
def test_selection_gathers_no_scores_over_the_mesh_and_is_that_of_one_device(name):
    balancer = balance.make({name: LOCAL[name]}, ModelConfig(top_k=2))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    state = balancer.init(8) | {"bias": -jnp.linspace(0.3, 0.7, 8)}
    where = np.arange(64, dtype=np.int32)
    inputs = random_scores(8, 64, 8), where < 60, where

    def select(scores, mask, where):
        tokens = Tokens(mask, where // 8, where, rows=Rows(8))
        return balancer.select(scores, scores + state["bias"], top_k=2, tokens=tokens, key=KEY, train=True, state=state)

    everywhere = jax.jit(select, in_shardings=split, out_shardings=split).lower(*inputs).compile()
    assert "all-gather" not in everywhere.as_text()
    assert "all-to-all" not in everywhere.as_text()
    ids = everywhere(*jax.device_put(inputs, split))
    np.testing.assert_array_equal(ids, jax.jit(select)(*inputs))
    assert ids.sharding.is_equivalent_to(split, 2)
    assert not ids.sharding.is_equivalent_to(whole, 2)
