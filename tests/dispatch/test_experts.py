"""Laws of what experts may have beside their matrices: biases, no gate, gates on what they read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import mesh_sizes
from moe_jax.config import MeshConfig, ModelConfig
from moe_jax.dispatch import ExpertWeights, apply_experts
from moe_jax.kernels import native
from moe_jax.kernels.activation import Activation
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.routing import Routing

TOKENS, SLOTS, EXPERTS, EMBED, FFW = 64, 2, 4, 8, 6
EMPTY = EXPERTS
MESH = (1, 2, 2, 2)  # data, expert and tensor


def array(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


MATRICES = [array(1, EXPERTS, EMBED, FFW), array(2, EXPERTS, EMBED, FFW), array(3, EXPERTS, FFW, EMBED)]
BIASED = ExpertWeights(*MATRICES, array(6, EXPERTS, FFW), array(7, EXPERTS, FFW), array(8, EXPERTS, EMBED))
GATES = jnp.abs(array(5, TOKENS, SLOTS))


def ids_of() -> np.ndarray:
    """Different experts for a token, some slots empty, some tokens padding, and no token for expert 2."""
    ids = np.random.default_rng(0).random((TOKENS, EXPERTS)).argsort(1)[:, :SLOTS]
    ids[1::5, 1] = EMPTY
    ids[::7] = EMPTY
    return np.where(ids == 2, EMPTY, ids)


IDS = jnp.asarray(ids_of(), jnp.int32)
PADDING = np.asarray((IDS == EMPTY).all(1))
X = jnp.where(PADDING[:, None], 1e3, array(4, TOKENS, EMBED))


@dataclasses.dataclass(frozen=True)
class Case:
    """Experts and how they are used: an activation, which of their arrays they lack, and what the gate weighs."""

    activation: str = "swiglu"
    lacks: tuple[str, ...] = ()
    gate_on: str = "output"

    @property
    def weights(self) -> ExpertWeights:
        return BIASED._replace(**dict.fromkeys(self.lacks))


UNGATED = ("gate", "gate_bias")
CASES = {
    "biases": Case(),
    "biases, gpt-oss": Case("swiglu_oai"),
    "ReLU^2": Case("relu2", (*UNGATED, "up_bias", "down_bias")),
    "ReLU^2 with biases": Case("relu2", UNGATED),
    "gate on input": Case(gate_on="input", lacks=("gate_bias", "up_bias", "down_bias")),
    "gate on input, biases": Case(gate_on="input"),
    "a bias of down only": Case(lacks=("gate_bias", "up_bias")),
}


def hidden(case: Case, gate, up):
    """The activations of the sources, in plain jnp."""
    if case.activation == "relu2":
        return jnp.where(up > 0, up * up, 0.0)
    if case.activation == "swiglu_oai":
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return jax.nn.silu(gate) * up


def oracle(case: Case, x, gates, weights, ids=IDS):
    """Token by token, slot by slot; an empty slot adds nothing."""
    filled = ids < EXPERTS
    w = jax.tree.map(lambda a: a[jnp.minimum(ids, EXPERTS - 1)], weights)  # [T, K, ...]
    rows = jnp.broadcast_to(x[:, None], (*ids.shape, EMBED))
    if case.gate_on == "input":
        rows, gates = rows * gates[..., None], jnp.ones_like(gates)

    def product(rows, matrix, bias):
        y = jnp.einsum("tkd,tkdf->tkf", rows, matrix)
        return y if bias is None else y + bias

    gate = None if w.gate is None else product(rows, w.gate, w.gate_bias)
    y = product(hidden(case, gate, product(rows, w.up, w.up_bias)), w.down, w.down_bias)
    return jnp.where(filled[..., None], gates[..., None] * y, 0.0).sum(1)


def applied(case: Case, x, gates, weights, ids=IDS, **how):
    routing = Routing(ids, jnp.where(ids < EXPERTS, gates, 0.0), *[None] * 5)  # nothing else of it is read
    activation = Activation.of(ModelConfig(activation=case.activation))
    return apply_experts(x, routing, weights, activation=activation, gate_on=case.gate_on, **how)


def value_and_gradients(run, *arguments):
    def something(*arguments):
        y = run(*arguments)
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(something, (0, 1, 2), has_aux=True))(*arguments)
    return jax.tree_util.tree_leaves_with_path((y, gradients))


def assert_same(ours, theirs):
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        scale = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


@functools.cache
def expected(name: str):
    case = CASES[name]
    return value_and_gradients(functools.partial(oracle, case), X, GATES, case.weights)


HOW = {
    "C++": dict(dispatcher="local", cpu_kernel="native"),
    "XLA": dict(dispatcher="local", cpu_kernel="xla"),
    "dense": dict(dispatcher="dense"),
    "capacity": dict(dispatcher="capacity", capacity_factor=float(EXPERTS)),
}


def skip_without_compiler(how):
    if how.get("cpu_kernel") == "native" and (why := native.missing()):
        pytest.skip(why)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_equation_and_padding_gets_none(name, how):
    # the fault of MaxText #3699: rows of padding get a bias, and what is in them makes gradients NaN
    skip_without_compiler(how)
    case = CASES[name]
    ours = value_and_gradients(lambda *a: applied(case, *a, **how)[0], X, GATES, case.weights)
    assert_same(ours, expected(name))
    (_, y), (_, dx), _, *of_weights = ours
    np.testing.assert_array_equal(y[PADDING], 0.0)
    np.testing.assert_array_equal(dx[PADDING], 0.0)
    for path, gradient in of_weights:  # expert 2 has no token
        np.testing.assert_array_equal(gradient[2], 0.0, err_msg=jax.tree_util.keystr(path))


def on_mesh(case: Case, **how):
    mesh = make_mesh(MeshConfig(**mesh_sizes(MESH)))
    tokens, whole = batch_sharding(mesh), NamedSharding(mesh, P())
    x, gates, ids = jax.device_put((X, GATES, IDS), tokens)
    weights = jax.device_put(case.weights, whole)
    return value_and_gradients(lambda *a: applied(case, *a, ids, mesh=mesh, **how)[0], x, gates, weights)


ON_MESH = [  # experts, dispatcher, how CPUs multiply
    ("biases", "rounds", "native"),
    ("biases", "gathered", "xla"),
    ("biases", "capacity", "xla"),
    ("biases", "dense", "xla"),
    ("ReLU^2 with biases", "rounds", "xla"),
    ("gate on input, biases", "gathered", "native"),
]


@pytest.mark.parametrize(("name", "dispatcher", "kernel"), ON_MESH)
def test_on_a_mesh_with_tensor_and_expert_axes_they_are_the_same(name, dispatcher, kernel):
    # the fault of torchtitan #4245: each of the 2 tensor-parallel parts adds the bias of down
    how = dict(dispatcher=dispatcher, cpu_kernel=kernel)
    skip_without_compiler(how)
    room = dict(num_sequences=4, capacity_factor=float(EXPERTS)) if dispatcher == "capacity" else {}
    assert_same(on_mesh(CASES[name], **how, **room), expected(name))


def test_the_bias_of_down_is_weighed_by_the_gate():
    # the fault of Automodel #2591; with matrices of zeros y = sum of gate x b
    weights = jax.tree.map(jnp.zeros_like, BIASED)._replace(down_bias=BIASED.down_bias)
    padded = jnp.concatenate([BIASED.down_bias, jnp.zeros((1, EMBED))])
    want = jnp.einsum("tk,tkd->td", GATES, padded[IDS])
    for how in HOW.values():
        skip_without_compiler(how)
        y = jax.jit(lambda w, how=how: applied(Case(), X, GATES, w, **how)[0])(weights)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_garbage_in_padding_spoils_nothing():
    x = jnp.where(PADDING[:, None], jnp.nan, X)
    for how in (HOW["C++"], HOW["XLA"]):
        skip_without_compiler(how)
        assert_same(
            value_and_gradients(lambda *a, how=how: applied(Case(), *a, **how)[0], x, GATES, BIASED), expected("biases")
        )


def test_nothing_of_an_expert_without_tokens_is_read():
    garbage = jax.tree.map(lambda w: w.at[2].set(jnp.nan), BIASED)
    for how in (HOW["C++"], HOW["XLA"]):
        skip_without_compiler(how)
        ours = value_and_gradients(lambda *a, how=how: applied(Case(), *a, **how)[0], X, GATES, garbage)
        assert_same(ours, expected("biases"))


def test_a_copy_that_is_dropped_has_no_bias():
    # 16 seats of an expert: 0.5 x 64 tokens x 2 slots / 4 experts; the others' copies add nothing
    run = functools.partial(applied, Case(), dispatcher="capacity", capacity_factor=0.5)
    y, traffic = jax.jit(run)(X, GATES, BIASED)
    kept, seats = np.full_like(IDS, EMPTY), dict.fromkeys(range(EXPERTS), 16)
    for slot in range(SLOTS):
        for token in range(TOKENS):
            expert = int(IDS[token, slot])
            if expert < EXPERTS and seats[expert]:
                seats[expert] -= 1
                kept[token, slot] = expert
    assert traffic.dropped == ((IDS < EXPERTS).sum() - (kept < EXPERTS).sum()) > 0
    theirs = jax.jit(functools.partial(oracle, Case()))(X, GATES, BIASED, jnp.asarray(kept))
    np.testing.assert_allclose(y, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dispatcher"),
    [("biases, gpt-oss", "local"), ("ReLU^2 with biases", "capacity"), ("gate on input, biases", "local")],
)
def test_eight_bits_round_the_products_and_no_bias(name, dispatcher):
    pytest.importorskip("qwix")
    case = CASES[name]
    run = functools.partial(applied, case, quantization="int8", dispatcher=dispatcher, capacity_factor=float(EXPERTS))
    y = jax.jit(lambda *a: run(*a)[0])(X, GATES, case.weights)
    exact = expected(name)[0][1]
    # 1/127 of the largest of a row, in each of two or three products, which squares double; biases are thrice that
    np.testing.assert_allclose(y, exact, atol=0.05 * float(jnp.abs(exact).max()))
    bare = case.weights._replace(gate_bias=None, up_bias=None, down_bias=None)
    without = jax.jit(lambda *a: run(*a)[0])(X, GATES, bare)
    assert float(jnp.abs(y - without).max()) > 0.15 * float(jnp.abs(exact).max())


def test_bfloat16_is_off_by_its_rounding():
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (X, BIASED))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    exact = value_and_gradients(functools.partial(oracle, Case()), wide[0], GATES, wide[1])
    for how in (HOW["C++"], HOW["XLA"]):
        skip_without_compiler(how)
        run = lambda *a, how=how: applied(Case(), *a, **how)[0].astype(jnp.float32)  # noqa: E731
        for (path, one), (_, other) in zip(value_and_gradients(run, narrow[0], GATES, narrow[1]), exact, strict=True):
            scale = float(jnp.abs(other).max())
            np.testing.assert_allclose(
                np.asarray(one, np.float32), other, atol=2**-5 * scale, err_msg=jax.tree_util.keystr(path)
            )


def test_experts_split_over_threads_and_chunks_add_up_their_gradients():
    # 1,500 rows of one expert: several parts of several chunks, of which each adds to the biases' gradients
    if why := native.missing():
        pytest.skip(why)
    x, gates, ids = array(9, 1500, EMBED), jnp.abs(array(10, 1500, 1)), jnp.zeros((1500, 1), jnp.int32)
    ours, theirs = (
        value_and_gradients(lambda *a, kernel=kernel: applied(Case(), *a, ids, cpu_kernel=kernel)[0], x, gates, BIASED)
        for kernel in ("native", "xla")
    )
    assert_same(ours, theirs)
