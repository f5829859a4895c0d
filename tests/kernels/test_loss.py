"""Laws of the loss: block by block it is the cross-entropy of all logits, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import head as loss
from moe_jax.kernels.head import row_nats, summed_nats

ROWS, LENGTH, WIDTH, VOCAB = 3, 150, 8, 40


def problem(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    x, head = draw.normal(size=(ROWS, LENGTH, WIDTH)), draw.normal(size=(WIDTH, VOCAB))
    targets, mask = draw.integers(0, VOCAB, (ROWS, LENGTH)), draw.random((ROWS, LENGTH)) < 0.8
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(mask)


def all_at_once(x, head, targets, mask):
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    return row_nats(logits, targets, mask).sum()


@pytest.fixture(params=[1, 3], ids=["one block", "blocks with a rest"])
def blocks(request, monkeypatch):
    """450 tokens are one block, or three of 150."""
    monkeypatch.setattr(loss, "BLOCK_BYTES", 4 * VOCAB * ROWS * LENGTH // request.param + 1)
    return request.param


def value_and_gradients(f, *arguments):
    x, head, *rest = arguments
    return jax.value_and_grad(lambda x, head: 3.0 * f(x, head, *rest), (0, 1))(x, head)  # 3: not the unit gradient


def test_sum_and_gradients_are_those_of_all_logits_at_once(blocks):
    ours, theirs = (value_and_gradients(f, *problem()) for f in (summed_nats, all_at_once))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_gradient_the_sum_is_the_same(blocks):
    assert summed_nats(*problem()) == pytest.approx(float(all_at_once(*problem())), rel=1e-6)


def test_tokens_that_do_not_fill_the_last_block_count_once(monkeypatch):
    # 450 tokens in blocks of at least 128: 3 blocks of 150, or with 449 tokens one empty place
    monkeypatch.setattr(loss, "BLOCK_BYTES", 1)
    x, head, targets, mask = (a[:1, :] if a.ndim != 2 or a.shape[0] == ROWS else a for a in problem())
    short = x[:, :149], head, targets[:, :149], mask[:, :149]
    assert summed_nats(*short) == pytest.approx(float(all_at_once(*short)), rel=1e-6)
    longer = [jnp.concatenate([a, a[:, :100]], 1) for a in (x, targets, mask)]
    many = longer[0], head, longer[1], longer[2]
    assert summed_nats(*many) == pytest.approx(float(all_at_once(*many)), rel=1e-6)


def test_a_masked_target_gives_no_nats_and_no_gradient():
    x, head, targets, _ = problem()
    nothing = jnp.zeros((ROWS, LENGTH), bool)
    value, gradients = value_and_gradients(summed_nats, x, head, targets, nothing)
    assert value == 0
    assert not any(g.any() for g in gradients)


def test_gradients_have_the_dtypes_of_their_arguments():
    x, head, targets, mask = problem(jnp.bfloat16)
    value, (dx, d_head) = value_and_gradients(summed_nats, x, head, targets, mask)
    assert (value.dtype, dx.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


def test_huge_logits_do_not_overflow():
    x, head, targets, mask = problem()
    ours, theirs = (value_and_gradients(f, 1e3 * x, head, targets, mask) for f in (summed_nats, all_at_once))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_all_logits_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_BYTES", 1)
    arguments = problem()
    whole = 4 * VOCAB * ROWS * LENGTH
    gradient = jax.grad(summed_nats, (0, 1))
    blocked = jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    at_once = jax.jit(jax.grad(all_at_once, (0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert blocked < whole < at_once
