"""Moving quantiles: thresholds by hand, what a sequence sees of itself, and balance within every sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import tiny_config
from moe_jax import balance
from moe_jax.balance.measures import max_violation
from moe_jax.balance.sequence import moving_quantiles
from moe_jax.config import ModelConfig
from moe_jax.routing import RouterConfig, Rows, Tokens, counts_by_row, route


def quantiles(scores, valid=None, first=None, level=0.5, ema=1.0, bins=10) -> np.ndarray:
    """Of one expert over the tokens of one row."""
    scores = jnp.asarray(scores)[None, :, None]
    valid = jnp.asarray([[True] * scores.shape[1] if valid is None else valid])
    first = jnp.asarray([[False] * scores.shape[1] if first is None else first])
    return np.asarray(moving_quantiles(scores, valid, first, level, ema, bins))[0, :, 0]


def test_the_threshold_is_the_centre_of_the_bin_that_holds_the_quantile_so_far():
    # medians of .92 | .12 .92 | .12 .52 .92 | .12 .12 .52 .92; of an even number, the lower one
    np.testing.assert_allclose(quantiles([0.92, 0.12, 0.52, 0.12]), [0.95, 0.15, 0.55, 0.15], rtol=1e-6)
    np.testing.assert_allclose(quantiles([0.92, 0.12, 0.52, 0.12], level=0.75), [0.95, 0.95, 0.95, 0.55], rtol=1e-6)
    np.testing.assert_allclose(quantiles([0.0, 1.0], level=0.9), [0.05, 0.95], rtol=1e-6)


def test_earlier_tokens_weigh_less():
    # weights 1/4 1/2 1 of .92 .92 .12: the last one outweighs both
    np.testing.assert_allclose(quantiles([0.92, 0.92, 0.12], ema=0.5), [0.95, 0.95, 0.15], rtol=1e-6)
    np.testing.assert_allclose(quantiles([0.92, 0.92, 0.12], ema=0.9), [0.95, 0.95, 0.95], rtol=1e-6)


def test_padding_neither_counts_nor_ages_and_a_new_sequence_starts_afresh():
    # weights 1/2 and 1, so .12 has the share 2/3; with 1/4, had the padding aged it, 4/5
    seen = quantiles([0.92, 0.32, 0.12], valid=[True, False, True], ema=0.5, level=0.7)
    np.testing.assert_allclose(seen[2], 0.95)
    np.testing.assert_allclose(quantiles([0.92, 0.92, 0.12], first=[False, False, True]), [0.95, 0.95, 0.15])


def selected(scores, tokens, biased=None, top_k=1, **options) -> np.ndarray:
    select = balance.make({"moving_quantile": options}, ModelConfig(top_k=top_k)).select
    scores = jnp.asarray(scores, jnp.float32)
    biased = scores if biased is None else jnp.asarray(biased, jnp.float32)
    return np.asarray(select(scores, biased, top_k=top_k, tokens=tokens, train=True))


def test_an_expert_is_chosen_by_how_far_it_exceeds_its_own_scores_so_far():
    # beta of token 1, medians of which the later score weighs more: .85 and .55; .82 - .85 < .58 - .55, so expert 1
    scores = [[0.85, 0.35], [0.82, 0.58]]
    assert selected(scores, Tokens(), strength=1.0, bins=10)[1].tolist() == [1]
    assert selected(scores, Tokens(), strength=0.1, bins=10)[1].tolist() == [0]
    # the bias is added
    assert selected(scores, Tokens(), np.add(scores, [[0.2, 0.0]]), strength=1.0, bins=10)[1].tolist() == [0]


def test_sequences_do_not_see_each_other_however_they_are_described():
    scores = np.random.default_rng(0).random((12, 4))
    row = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 4)
    both = [selected(scores, tokens, top_k=2, strength=1.0) for tokens in (Tokens(row=row), Tokens(rows=Rows(3)))]
    alone = [selected(scores[n : n + 4], Tokens(), top_k=2, strength=1.0) for n in (0, 4, 8)]
    np.testing.assert_array_equal(both[0], both[1])
    np.testing.assert_array_equal(both[0], np.concatenate(alone))


def test_a_sequence_with_its_own_favourites_is_balanced_the_more_the_greater_the_strength():
    # eight sequences of 256 tokens, each with other favourites, so that all together are nearly balanced
    favourites = 1.5 * jax.random.normal(jax.random.key(0), (8, 1, 8))
    logits = (favourites + jax.random.normal(jax.random.key(1), (8, 256, 8))).reshape(-1, 8)

    def worst(strength: float) -> float:
        select = balance.make({"moving_quantile": {"strength": strength}}, ModelConfig(top_k=2)).select
        routing = route(logits, RouterConfig(top_k=2), tokens=Tokens(rows=Rows(8)), select=select)
        return float(max_violation(counts_by_row(routing.expert_ids, 8, 8)).mean())

    none, some, all_of_it = map(worst, (0.0, 0.3, 1.0))
    assert none > 1.5
    assert some < 0.9 * none
    assert all_of_it < 0.3 * none


def test_quantile_balancing_beside_it_is_refused_and_other_biases_are_not():
    with pytest.raises(ValueError, match=r"balance\.quantile computes the bias for a choice by scores plus bias alone"):
        tiny_config(balance={"moving_quantile": {}, "quantile": {}})
    tiny_config(balance={"moving_quantile": {}, "bias_sign": {}})
