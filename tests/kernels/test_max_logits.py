"""The largest logit of every head, against all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import max_logits
from moe_jax.kernels.attention import visibility
from moe_jax.kernels.max_logits import largest_logits

SEGMENTS = jnp.array([[1] * 7 + [2] * 6 + [0] * 3, [1] * 16], jnp.int32)


def visible(segments, window=0):
    """bool [B, S, S]: whether a query sees a key, and is no padding."""
    return np.asarray(visibility(segments, window)[:, 0] & (segments > 0)[:, :, None])


def dense_logits(query, key, scale):
    """[B, H, S, S], from [B, S, H, K] and [B, S, G, K]."""
    key = np.repeat(np.asarray(key, np.float64), query.shape[2] // key.shape[2], 2)
    return scale * np.einsum("bqhk,bshk->bhqs", np.asarray(query, np.float64), key)


def largest_of(logits, seen):
    return np.where(seen[:, None], logits, -np.inf).max((0, 2, 3))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_it_is_the_largest_over_the_keys_that_a_query_sees(kv_heads, window, monkeypatch):
    monkeypatch.setattr(max_logits, "BLOCK", 6)  # 16 tokens are 3 blocks, of which the last has padding
    draw = np.random.default_rng(kv_heads)
    query, key = (jnp.asarray(draw.normal(size=(2, 16, heads, 8)), jnp.float32) for heads in (4, kv_heads))
    found = largest_logits(query, key, SEGMENTS, 0.5, window)
    want = largest_of(dense_logits(query, key, 0.5), visible(SEGMENTS, window))
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_blocks_that_no_query_sees_are_left_out():
    assert max_logits._visible_blocks(4, 8, 0).tolist() == [[q, k] for q in range(4) for k in range(q + 1)]
    # the first query of block 3, at 24, sees 17 to 24 of a window of 8: blocks 2 and 3
    assert max_logits._visible_blocks(4, 8, 8).tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]
    assert max_logits._visible_blocks(3, 8, 1).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_nothing_is_differentiated_and_padding_has_none():
    query = jnp.ones((2, 16, 4, 8))
    assert not jax.grad(lambda q: largest_logits(q, q, SEGMENTS, 1.0).sum())(query).any()
    assert (largest_logits(query, query, jnp.zeros_like(SEGMENTS), 1.0) == -jnp.inf).all()
