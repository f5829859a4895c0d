"""Laws of the loss: block by block it is the cross-entropy of all logits, and so is its gradient."""

import functools
import re
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from moe_jax.config import MeshConfig
from moe_jax.kernels import head as loss
from moe_jax.kernels import native
from moe_jax.kernels.head import row_nats
from moe_jax.mesh import make_mesh, parameter_spec, spec

ROWS, LENGTH, WIDTH, VOCAB = 3, 150, 8, 40


def problem(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    x, head = draw.normal(size=(ROWS, LENGTH, WIDTH)), draw.normal(size=(WIDTH, VOCAB))
    targets, mask = draw.integers(0, VOCAB, (ROWS, LENGTH)), draw.random((ROWS, LENGTH)) < 0.8
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets), jnp.asarray(mask)


def all_at_once(x, head, targets, mask):
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    return row_nats(logits, targets, mask).sum()


@pytest.fixture(params=["native", "xla"])
def summed_nats(request):
    """The function under test, in C++ and in XLA."""
    if request.param == "native" and (why := native.missing()):
        pytest.skip(why)
    return functools.partial(loss.summed_nats, cpu_kernel=request.param)


@pytest.fixture(params=[1, 3], ids=["one block", "blocks with a rest"])
def blocks(request, monkeypatch):
    """450 tokens are one block, or three of 150."""
    monkeypatch.setattr(loss, "CPU_BLOCK_BYTES", 4 * VOCAB * ROWS * LENGTH // request.param + 1)
    return request.param


def value_and_gradients(f, *arguments):
    x, head, *rest = arguments
    return jax.value_and_grad(lambda x, head: 3.0 * f(x, head, *rest), (0, 1))(x, head)  # 3: not the unit gradient


def test_sum_and_gradients_are_those_of_all_logits_at_once(summed_nats, blocks):
    ours, theirs = (value_and_gradients(f, *problem()) for f in (summed_nats, all_at_once))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_gradient_the_sum_is_the_same(summed_nats, blocks):
    assert summed_nats(*problem()) == pytest.approx(float(all_at_once(*problem())), rel=1e-6)


def test_tokens_that_do_not_fill_the_last_block_count_once(summed_nats, monkeypatch):
    # 450 tokens in blocks of at least 128: 3 blocks of 150, or with 449 tokens one empty place
    monkeypatch.setattr(loss, "CPU_BLOCK_BYTES", 1)
    x, head, targets, mask = (a[:1, :] if a.ndim != 2 or a.shape[0] == ROWS else a for a in problem())
    short = x[:, :149], head, targets[:, :149], mask[:, :149]
    assert summed_nats(*short) == pytest.approx(float(all_at_once(*short)), rel=1e-6)
    longer = [jnp.concatenate([a, a[:, :100]], 1) for a in (x, targets, mask)]
    many = longer[0], head, longer[1], longer[2]
    assert summed_nats(*many) == pytest.approx(float(all_at_once(*many)), rel=1e-6)


def test_a_masked_target_gives_no_nats_and_no_gradient(summed_nats):
    x, head, targets, _ = problem()
    nothing = jnp.zeros((ROWS, LENGTH), bool)
    value, gradients = value_and_gradients(summed_nats, x, head, targets, nothing)
    assert value == 0
    assert not any(g.any() for g in gradients)


def test_a_weight_multiplies_the_nats_and_the_gradient_of_its_target(summed_nats, blocks):
    x, head, targets, mask = problem()
    weights = mask * jnp.asarray(np.random.default_rng(1).uniform(0.1, 3.0, mask.shape), jnp.float32)
    ours = value_and_gradients(summed_nats, x, head, targets, weights)

    def oracle(x, head, targets, weights):
        logs = jax.nn.log_softmax(x @ head)
        return -(weights * jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]).sum()

    theirs = value_and_gradients(oracle, x, head, targets, weights)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert row_nats(x @ head, targets, weights).sum() == pytest.approx(
        float(oracle(x, head, targets, weights)), rel=1e-6
    )


def test_weights_of_0_and_1_give_the_bits_of_a_mask(summed_nats, blocks):
    x, head, targets, mask = problem()
    ours = value_and_gradients(summed_nats, x, head, targets, mask.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(value_and_gradients(summed_nats, *problem())), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_have_the_dtypes_of_their_arguments(summed_nats):
    x, head, targets, mask = problem(jnp.bfloat16)
    value, (dx, d_head) = value_and_gradients(summed_nats, x, head, targets, mask)
    assert (value.dtype, dx.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


def test_huge_logits_do_not_overflow(summed_nats):
    x, head, targets, mask = problem()
    ours, theirs = (value_and_gradients(f, 1e3 * x, head, targets, mask) for f in (summed_nats, all_at_once))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_all_logits_are_never_in_memory(summed_nats, monkeypatch):
    monkeypatch.setattr(loss, "CPU_BLOCK_BYTES", 1)
    arguments = problem()
    whole = 4 * VOCAB * ROWS * LENGTH
    gradient = jax.grad(summed_nats, (0, 1))
    blocked = jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    at_once = jax.jit(jax.grad(all_at_once, (0, 1))).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert blocked < whole < at_once


@pytest.mark.parametrize("tokens", [1, 5, 97, 200])
@pytest.mark.parametrize("vocab", [1, 3, 17, 300])
def test_any_number_of_tokens_and_words(summed_nats, tokens, vocab):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(1, tokens, 19)), jnp.float32)
    head = jnp.asarray(draw.normal(size=(19, vocab)), jnp.float32)
    arguments = x, head, jnp.asarray(draw.integers(0, vocab, (1, tokens))), jnp.ones((1, tokens), bool)
    ours, theirs = (value_and_gradients(f, *arguments) for f in (summed_nats, all_at_once))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_off_by_its_rounding(summed_nats):
    x, head, *rest = problem(jnp.bfloat16)
    value, gradients = value_and_gradients(summed_nats, x, head, *rest)
    wide, exact = value_and_gradients(all_at_once, x.astype(jnp.float32), head.astype(jnp.float32), *rest)
    assert value == pytest.approx(float(wide), rel=1e-6)  # products of bfloat16 are exact in float32
    for ours, theirs in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2**-7 * float(jnp.abs(theirs).max()))


def test_a_value_that_is_not_finite_stays_so(summed_nats):
    x, head, targets, mask = problem()
    value, (dx, _) = value_and_gradients(
        summed_nats, x.at[1, 2, 3].set(jnp.nan), head, targets, mask.at[1, 2].set(True)
    )
    assert np.isnan(value)
    assert np.isnan(dx[1, 2]).all() and np.isfinite(dx[0]).all()


def test_a_program_for_another_platform_has_no_kernel_of_this_cpu():
    device = SimpleNamespace(platform="tpu")
    mesh = mock.create_autospec(Mesh, instance=True)
    mesh.devices, mesh.size = np.full((1, 1, 1, 1), device), 1
    gradient = jax.grad(functools.partial(loss.summed_nats, mesh=mesh), (0, 1))
    assert "ffi_call" not in str(jax.make_jaxpr(gradient)(*problem()))


def test_a_valid_target_outside_of_the_vocabulary_is_refused_and_a_masked_one_ignored():
    if why := native.missing():
        pytest.skip(why)
    x, head, targets, mask = problem()
    outside = targets.at[0, 0].set(VOCAB)
    gradient = jax.grad(functools.partial(loss.summed_nats, cpu_kernel="native"))
    assert np.isfinite(gradient(x, head, outside, mask.at[0, 0].set(False))).all()
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="a target is outside of the vocabulary"):
        jax.block_until_ready(gradient(x, head, outside, mask.at[0, 0].set(True)))


# --- on a mesh ----------------------------------------------------------------------------------------------------

MESHES = [
    dict(data=4),
    dict(data=2, tensor=2),
    dict(data=2, expert=2, sequence=2),
    dict(replica=2, data=2, expert=2),
    dict(expert=2, sequence=2, tensor=2),
    dict(tensor=8),
]


def on_mesh(sizes, dtype=jnp.float32, **how):
    """The function under test on a mesh, from arguments that are split as the model's are."""
    mesh = make_mesh(MeshConfig(**(dict(data=1) | sizes)))
    rows = NamedSharding(mesh, spec("pieces"))
    place = NamedSharding(mesh, parameter_spec(mesh, loss.WEIGHT_DIMS, (WIDTH, VOCAB)))

    def put(x, head, targets, mask):
        return jax.device_put((x, head, targets, mask), (rows, place, rows, rows))

    return jax.jit(functools.partial(loss.summed_nats, mesh=mesh, **how)), put


def problem_of_8_rows(dtype=jnp.float32):
    x, head, targets, mask = problem(dtype)
    return jnp.resize(x, (8, 25, WIDTH)), head, jnp.resize(targets, (8, 25)), jnp.resize(mask, (8, 25))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_on_a_mesh_sum_and_gradients_are_those_of_one_device(sizes, kernel, monkeypatch):
    monkeypatch.setattr(loss, "LEAST_ROWS", 4)
    monkeypatch.setattr(loss, "CPU_BLOCK_BYTES", 4 * VOCAB * 10)
    f, put = on_mesh(sizes, cpu_kernel=kernel)
    arguments = problem_of_8_rows()
    theirs = value_and_gradients(all_at_once, *arguments)
    ours = value_and_gradients(f, *put(*arguments))
    assert f(*put(*arguments)) == pytest.approx(float(theirs[0]) / 3, rel=1e-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert ours[1][1].sharding.is_equivalent_to(put(*arguments)[1].sharding, 2)


def test_on_a_mesh_the_head_is_gathered_once_and_its_gradient_scattered_once(monkeypatch):
    monkeypatch.setattr(loss, "LEAST_ROWS", 4)
    monkeypatch.setattr(loss, "CPU_BLOCK_BYTES", 4 * VOCAB * 10)
    f, put = on_mesh(dict(data=4))
    text = jax.jit(jax.grad(f, (0, 1))).lower(*put(*problem_of_8_rows())).compile().as_text()
    found = {
        kind: re.findall(rf"= (\w+\[[\d,]*\])\S* {kind}(?:-start)?\(", text)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert found["all-gather"] == [f"f32[{WIDTH},{VOCAB}]"]
    assert found["reduce-scatter"] == [f"f32[{WIDTH // 4},{VOCAB}]"]
    assert set(found["all-reduce"]) <= {"f32[]", f"f32[{WIDTH // 4},{VOCAB}]"}  # of the sum, and of the part
    assert not re.search(rf"\[(50|200|2,25|8,25),{VOCAB}\]", text), "logits of more than a block"
