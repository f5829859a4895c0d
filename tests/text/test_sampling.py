"""Laws of sampling, on logits made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.text.sampling import Sampling, allowed, next_tokens

# shares 0.5, 0.25, 0.125, 0.125, in another order
LOGITS = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.25]], jnp.float32))
KEY = jax.random.key(0)


def draw(logits, sampling, rows, positions=None, key=KEY):
    rows = jnp.asarray(rows, jnp.int32)
    positions = jnp.zeros_like(rows) if positions is None else jnp.asarray(positions, jnp.int32)
    logits = jnp.broadcast_to(logits, (len(rows), logits.shape[-1]))
    return np.asarray(next_tokens(logits, sampling, key, rows, positions))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [1, 1, 1, 1]),
        (Sampling(top_k=1), [0, 1, 0, 0]),
        (Sampling(top_k=2), [0, 1, 0, 1]),
        (Sampling(top_k=3), [1, 1, 0, 1]),  # of two equal tokens the first
        (Sampling(top_k=9), [1, 1, 1, 1]),
        (Sampling(top_p=0.4), [0, 1, 0, 0]),
        (Sampling(top_p=0.5), [0, 1, 0, 0]),  # 0.5 reaches it
        (Sampling(top_p=0.6), [0, 1, 0, 1]),
        (Sampling(top_p=0.8), [1, 1, 0, 1]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(top_k=2, top_p=0.7), [0, 1, 0, 1]),  # of 2/3 and 1/3
        (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),
    ],
)
def test_only_the_likeliest_tokens_that_reach_k_or_p_are_kept(sampling, expected):
    assert allowed(LOGITS, sampling)[0].astype(int).tolist() == expected


def test_what_is_not_kept_is_never_drawn_and_what_is_comes_by_its_share():
    drawn = draw(LOGITS, Sampling(top_k=2), np.arange(4000))
    assert set(drawn) == {1, 3}
    assert abs((drawn == 1).mean() - 2 / 3) < 4 * (2 / 9 / 4000) ** 0.5  # four standard deviations


def test_temperature_divides_the_logits():
    drawn = draw(LOGITS, Sampling(temperature=0.5), np.arange(4000))  # shares squared: 16, 4, 1, 1 of 22
    assert abs((drawn == 1).mean() - 16 / 22) < 4 * (16 * 6 / 22**2 / 4000) ** 0.5


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-9)])
def test_one_token_left_is_the_greedy_one(sampling):
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert np.array_equal(draw(logits[:1], sampling, [0]), [1]) and np.array_equal(draw(logits[1:], sampling, [1]), [0])


def test_a_draw_depends_on_row_and_position_only():
    alone = draw(LOGITS, Sampling(), [7], [3])
    among = draw(LOGITS, Sampling(), [1, 7, 2], [0, 3, 9])
    assert alone[0] == among[1]
    many = [draw(LOGITS, Sampling(), [row] * 64, np.arange(64)).tolist() for row in (0, 1)]
    assert many[0] != many[1]


def test_a_token_without_probability_is_never_drawn():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]])
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.999999)):
        assert 1 not in draw(logits, sampling, np.arange(500))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1),
        dict(temperature=1e-300),
        dict(temperature=1e38),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0),
        dict(top_p=1.1),
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}=.* must be"):
        Sampling(**wrong)
