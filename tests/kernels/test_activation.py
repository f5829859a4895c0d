"""Laws of activations: the equation of each form, the same one wherever experts are multiplied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import dispatch
from moe_jax.config import ModelConfig
from moe_jax.dispatch import ExpertWeights, apply_experts
from moe_jax.dispatch.experts import in_cpp, in_xla
from moe_jax.kernels import native
from moe_jax.kernels.activation import SWIGLU, Activation
from moe_jax.routing import Routing

LIMIT = 0.5  # half of the values below exceed it
CASES = {  # model.activation, model.activation_limit, the equation of its source
    "geglu": ("geglu", 0.0, lambda g, u: jax.nn.gelu(g, approximate=True) * u),
    "clamped swiglu": (
        "swiglu",
        LIMIT,
        lambda g, u: jax.nn.silu(jnp.minimum(g, LIMIT)) * jnp.clip(u, -LIMIT, LIMIT),
    ),
    "clamped swiglu_oai": (
        "swiglu_oai",
        LIMIT,
        lambda g, u: (
            jnp.minimum(g, LIMIT) * jax.nn.sigmoid(1.702 * jnp.minimum(g, LIMIT)) * (jnp.clip(u, -LIMIT, LIMIT) + 1)
        ),
    ),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
TOKENS, SLOTS, EXPERTS, EMBED, FFW = 37, 2, 3, 19, 7


def of(form, limit) -> Activation:
    return Activation.of(ModelConfig(activation=form, activation_limit=limit))


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights_of(*experts):
    shapes = (*experts, EMBED, FFW), (*experts, EMBED, FFW), (*experts, FFW, EMBED)
    return ExpertWeights(*(array(i, *s) / s[-2] ** 0.5 for i, s in enumerate(shapes)))


X, WEIGHTS = array(3, TOKENS, EMBED), weights_of(EXPERTS)
IDS = jnp.asarray(np.random.default_rng(4).integers(0, EXPERTS + 1, (TOKENS, SLOTS)), jnp.int32)  # some slots are empty
GATES = jnp.where(IDS < EXPERTS, jnp.abs(array(5, TOKENS, SLOTS)), 0.0)


def oracle(formula, x, gates, weights):
    """Every expert on every token, in plain jnp."""
    gate, up = (jnp.einsum("td,edf->tef", x, w) for w in (weights.gate, weights.up))
    y = jnp.einsum("tef,efd->ted", formula(gate, up), weights.down)
    share = (jax.nn.one_hot(IDS, EXPERTS) * gates[..., None]).sum(1)
    return jnp.einsum("ted,te->td", y, share)


def applied(x, gates, weights, **options):
    routing = Routing(IDS, gates, *[None] * 5)  # nothing else of it is read
    return apply_experts(x, routing, weights, capacity_factor=float(EXPERTS), **options)[0]


def value_and_gradients(run, *arguments):
    def something(*arguments):
        y = run(*arguments)
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

    every = tuple(range(len(arguments)))
    (_, y), gradients = jax.jit(jax.value_and_grad(something, every, has_aux=True))(*arguments)
    return jax.tree.leaves((y, gradients))


def assert_same(ours, theirs, rtol=1e-4, atol=1e-5):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol, atol * max(1.0, float(jnp.abs(other).max())))


@EACH
@pytest.mark.parametrize("how", ["local in C++", "local in XLA", "capacity"])
def test_experts_compute_the_equation_and_its_gradients(how, case):
    *keys, formula = case
    dispatcher, _, place = how.partition(" in ")
    if place == "C++" and (why := native.missing()):
        pytest.skip(why)
    kernel = "native" if place == "C++" else "xla"
    run = functools.partial(applied, dispatcher=dispatcher, cpu_kernel=kernel, activation=of(*keys))
    ours = value_and_gradients(run, X, GATES, WEIGHTS)
    theirs = value_and_gradients(lambda *arguments: oracle(formula, *arguments), X, GATES, WEIGHTS)
    assert_same(ours, theirs)


@EACH
@pytest.mark.parametrize("kernel", ["native", "xla"])
def test_a_dense_layer_computes_the_equation_and_its_gradients(kernel, case):
    if kernel == "native" and (why := native.missing()):
        pytest.skip(why)
    *keys, formula = case

    def plain(x, w):
        return formula(x @ w.gate, x @ w.up) @ w.down

    def ours(x, w):
        return dispatch.feed_forward(x, w, cpu_kernel=kernel, activation=of(*keys))

    assert_same(*(value_and_gradients(run, X, weights_of()) for run in (ours, plain)))


@pytest.mark.parametrize("dispatcher", ["local", "capacity"])
def test_eight_bits_round_the_products_around_the_activation(dispatcher):
    pytest.importorskip("qwix")
    *keys, formula = CASES["clamped swiglu_oai"]
    exact = oracle(formula, X, GATES, WEIGHTS)
    run = functools.partial(applied, dispatcher=dispatcher, quantization="int8", activation=of(*keys))
    y = jax.jit(run)(X, GATES, WEIGHTS)
    # 1/127 of the largest of a row, in each of three products
    np.testing.assert_allclose(y, exact, atol=0.03 * float(jnp.abs(exact).max()))
    other = oracle(CASES["geglu"][-1], X, GATES, WEIGHTS)
    assert float(jnp.abs(y - other).max()) > 0.3 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("make", [in_cpp, in_xla])
def test_a_value_at_the_limit_has_its_gradient_and_one_beyond_it_has_none(make):
    # gate and up are x times 1: at the limit, just beyond it, and beyond it below; the derivatives of silu(g) u
    if make is in_cpp and (why := native.missing()):
        pytest.skip(why)
    ones = ExpertWeights(*(jnp.ones((1, 1, 1)) for _ in range(3)))
    ids, gates = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1))
    activation = Activation(limit=2.0)

    def total(x):
        return make(activation).routed(x, ids, gates, ones).sum()

    sigmoid = 1 / (1 + np.exp([-2.0, 3.0]))  # of 2 and -3
    at = sigmoid[0] * 2 + (sigmoid[0] + 2 * sigmoid[0] * (1 - sigmoid[0])) * 2
    below = -2 * (sigmoid[1] - 3 * sigmoid[1] * (1 - sigmoid[1]))  # the gate has no lower limit
    got = jax.jit(jax.grad(total))(jnp.array([[2.0], [2.001], [-3.0]]))
    np.testing.assert_allclose(got.ravel(), [at, 0.0, below], rtol=1e-5, atol=1e-7)


def test_a_value_that_is_not_finite_stays_so_behind_a_limit():
    rows = jnp.array([jnp.nan, 1.0])
    assert np.isnan(Activation(limit=2.0)(rows, jnp.ones(2))).tolist() == [True, False]
    assert np.isnan(Activation(limit=2.0)(jnp.ones(2), rows)).tolist() == [True, False]


def test_multiplying_with_the_same_activation_is_the_same_function():
    # or jit would compile anew
    assert in_xla(of("geglu", 2.0)) is in_xla(of("geglu", 2.0))
    assert of("swiglu", 0.0) == SWIGLU
