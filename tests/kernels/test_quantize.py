"""Laws of expert products in eight bits: their distance from the exact ones, and that nothing else is multiplied."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conftest import mesh_sizes, tiny_config
from moe_jax import dispatch
from moe_jax.config import MeshConfig, default, validate
from moe_jax.data.batches import Batch
from moe_jax.dispatch import ExpertWeights, apply_experts
from moe_jax.kernels import quantize
from moe_jax.kernels.quantize import quantized_matmul
from moe_jax.mesh import batch_sharding, make_mesh
from moe_jax.routing import RouterConfig, count, route
from moe_jax.training.compile import make_train_step
from moe_jax.training.state import init_state, step_key

ROWS, EXPERTS, IN, OUT = 150, 4, 24, 16
SIZES = np.asarray([130, 0, 9, 4], np.int32)  # more than a tile, none, a few; the last 7 rows belong to no expert
BOTH = pytest.mark.parametrize("form", ["int8", "fp8"])


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, W, DY = array(0, ROWS, IN), array(1, EXPERTS, IN, OUT), array(2, ROWS, OUT)


@functools.partial(jax.jit, static_argnums=4)
def with_gradients(x, w, sizes, dy, form):
    y, backward = jax.vjp(lambda x, w: quantized_matmul(x, w, sizes, form), x, w)
    return y, *backward(dy)


@functools.partial(jax.jit, static_argnums=4)
def as_on_accelerators(x, w, sizes, dy, form):
    """The branches of other platforms, run on the CPU of the tests."""
    narrow = functools.partial(quantize.quantized, quantization=form)
    y = quantize._ragged_product(narrow(x, scaled_axes=(0,)), narrow(w, scaled_axes=(0, 2)), sizes)
    w = w.swapaxes(1, 2)
    dx = quantize._ragged_product(narrow(dy, scaled_axes=(0,)), narrow(w, scaled_axes=(0, 2)), sizes)
    columns = (narrow(quantize.grouped.zero_tail(a, sizes), scaled_axes=(1,)) for a in (x, dy))
    return y, dx, quantize._ragged_outer(*columns, sizes)


# --- the reference: one expert after the other, rounded by numpy ------------------------------------------------


def rounded(a: np.ndarray, axis: int, form: str) -> np.ndarray:
    """`a` rounded to the format, with one scale for each index of all axes except `axis`."""
    scale = np.abs(a).max(axis, keepdims=True) / (127.0 if form == "int8" else 448.0)
    scale = np.where(scale == 0, np.float32(1), scale)
    if form == "int8":
        return np.round(a / scale) * scale
    return (a / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def straight_through(x, w, sizes, dy, form):
    """y, dx, dw of the rounded operands of each product."""
    used = sizes.sum()
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    by_column = [rounded(a[:used], 0, form) for a in (x, dy)]
    for e, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[e], end)
        y[rows] = rounded(x[rows], 1, form) @ rounded(w[e], 0, form)
        dx[rows] = rounded(dy[rows], 1, form) @ rounded(w[e], 1, form).T
        dw[e] = by_column[0][rows].T @ by_column[1][rows]
    return y, dx, dw


@BOTH
@pytest.mark.parametrize("run", [with_gradients, as_on_accelerators])
def test_product_and_gradients_are_those_of_the_rounded_operands(run, form):
    for ours, theirs in zip(run(X, W, SIZES, DY, form), straight_through(X, W, SIZES, DY, form), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def off(a: np.ndarray, axis: int, form: str) -> np.ndarray:
    """How far rounding may move each value.

    int8: half a step of the scale, largest / 127.
    fp8: e4m3 has 3 bits after the leading one, so half a step is 2^-4 of the value; below the smallest normal
    number the step is 2^-9 of the scale, largest / 448.
    """
    largest = np.abs(a).max(axis, keepdims=True)
    if form == "int8":
        return np.broadcast_to(largest / 254, a.shape)
    return np.maximum(np.abs(a) / 16, largest / 448 / 1024)


@BOTH
def test_the_error_of_a_product_is_within_the_formats_bound(form):
    # |ab - a'b'| <= |a| db + da |b| + da db, summed over the inner dimension; float32 itself adds 1e-5
    e = slice(0, SIZES[0])
    y, dx, dw = (np.asarray(a) for a in with_gradients(X, W, SIZES, DY, form))
    used = slice(0, SIZES.sum())
    columns = [off(a[used], 0, form)[e] for a in (X, DY)]
    cases = [
        (y[e], X[e], off(X[e], 1, form), W[0], off(W[0], 0, form)),
        (dx[e], DY[e], off(DY[e], 1, form), W[0].T, off(W[0], 1, form).T),
        (dw[0], X[e].T, columns[0].T, DY[e], columns[1]),
    ]
    for ours, a, da, b, db in cases:
        bound = np.abs(a) @ db + da @ (np.abs(b) + db) + 1e-5
        assert (np.abs(ours - a @ b) <= bound).all()
        assert np.abs(ours - a @ b).max() > 1e-3  # without rounding it would be closer


@BOTH
def test_empty_experts_rows_of_zeros_and_rows_of_no_expert_give_exactly_zero(form):
    x, dy = X.copy(), DY.copy()
    x[3] = dy[3] = 0  # a row without a scale
    x[:, 5] = 0  # and a column
    x[143:], dy[143:] = 1e30, np.nan  # rows of no expert have arbitrary values
    y, dx, dw = (np.asarray(a) for a in with_gradients(x, W, SIZES, dy, form))
    for value in (y[3], dx[3], dw[:, 5], dw[1], y[143:], dx[143:]):
        np.testing.assert_array_equal(value, 0.0)
    for ours, theirs in zip((y, dx, dw), straight_through(x, W, SIZES, dy, form), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@BOTH
def test_no_rows_give_an_empty_product_and_a_gradient_of_zero(form):
    y, dx, dw = with_gradients(X[:0], W, SIZES * 0, DY[:0], form)
    assert (y.shape, dx.shape) == ((0, OUT), (0, IN))
    np.testing.assert_array_equal(dw, 0.0)


@BOTH
def test_a_value_that_is_not_finite_stays_so(form):
    # a step that is not finite must be detected: row 5 is infinite, and so are its output and the gradient in w
    x = X.copy()
    x[5, 0] = np.inf
    y, _, dw = with_gradients(x, W, SIZES, DY, form)
    assert np.isfinite(y).all(1).tolist() == [row != 5 for row in range(ROWS)]
    assert not np.isfinite(dw[0, 0]).any()


# --- in a layer ---------------------------------------------------------------------------------------------------

TOKENS, SLOTS, EMBED, FFW = 64, 2, 8, 6
WEIGHTS = ExpertWeights(array(1, 8, EMBED, FFW), array(2, 8, EMBED, FFW), array(3, 8, FFW, EMBED))
TOKEN_X, GATES = array(4, TOKENS, EMBED), np.abs(array(5, TOKENS, SLOTS))
IDS = np.random.default_rng(6).random((TOKENS, 8)).argsort(1)[:, :SLOTS].astype(np.int32)
IDS[8:16] = 8  # padding
IDS = np.where(IDS == 3, 2, IDS)  # expert 3 has no tokens


def layer(dispatcher: str, form: str, sizes=None, **options):
    """(x, gates, weights, ids) -> something of y, and y."""
    mesh = None if sizes is None else make_mesh(MeshConfig(**mesh_sizes(sizes)), jax.devices()[: int(np.prod(sizes))])

    def run(x, gates, weights, ids):
        routing = route(jnp.zeros((TOKENS, 8)), RouterConfig(top_k=1))
        gates = jnp.where(ids < 8, gates, 0.0)
        routing = routing._replace(expert_ids=ids, gates=gates, loads=count(ids, 8))
        y, _ = apply_experts(x, routing, weights, mesh=mesh, dispatcher=dispatcher, quantization=form, **options)
        return (y * jnp.arange(1.0, y.size + 1.0).reshape(y.shape) ** 0.5).sum(), y

    return run, mesh


@functools.cache
def applied(dispatcher: str, form: str, sizes=None, **options):
    """y and the gradients in x, gates and weights."""
    run, mesh = layer(dispatcher, form, sizes, **options)
    args = TOKEN_X, GATES, WEIGHTS, IDS
    if mesh is not None:
        tokens, whole = batch_sharding(mesh), NamedSharding(mesh, P())
        args = jax.device_put(args, (tokens, tokens, whole, tokens))
    (_, y), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*args)
    return jax.tree.map(np.asarray, (y, *gradients))


def assert_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def assert_same(ours, theirs) -> None:
    """Scales are of rows and of an expert's columns, and neither knows where it is; dw's are of all rows at hand.

    Sums in another order may round a hidden value to its neighbour.
    """
    assert_close(ours[:3], theirs[:3], 1e-3)
    assert_close(ours[3], theirs[3], 0.05)


@BOTH
@pytest.mark.parametrize(("dispatcher", "options"), [("local", {}), ("capacity", {"capacity_factor": 8.0})], ids=str)
def test_every_dispatch_on_one_device_rounds_what_the_dense_oracle_rounds(dispatcher, options, form):
    assert_same(applied(dispatcher, form, **options), applied("dense", form))


@pytest.mark.parametrize("dispatcher", ["rounds", "gathered"])
def test_in_rounds_outputs_are_those_of_one_device(dispatcher):
    ours = applied(dispatcher, "fp8", (1, 2, 4, 1))
    assert_same(ours, applied("local", "fp8"))
    for gradient in jax.tree.leaves(ours[3]):
        np.testing.assert_array_equal(gradient[3], 0.0)


@pytest.mark.parametrize(("form", "sizes"), [("int8", None), ("fp8", None), ("int8", (1, 2, 2, 2))], ids=str)
def test_a_layer_is_off_by_its_formats_rounding_on_any_mesh(form, sizes):
    # three products in sequence, each of two values rounded by up to 2^-4 (fp8), typically by a quarter of that
    ours, exact = applied("auto", form, sizes), applied("auto", "none")
    assert_close(ours, exact, 0.05 if form == "int8" else 0.12)
    assert np.abs(ours[0] - exact[0]).max() > 1e-3


@BOTH
def test_all_nine_products_of_a_layer_have_operands_of_eight_bits(form):
    # forward gate, up and down, and two backward for each; what is lowered for CPUs, before any optimisation
    run, _ = layer("local", form)
    lowered = jax.jit(jax.grad(run, argnums=(0, 2), has_aux=True)).lower(TOKEN_X, GATES, WEIGHTS, IDS).as_text()
    dots = [line for line in lowered.splitlines() if "dot_general" in line]
    narrow = {"int8": "xi8>", "fp8": "xf8E4M3FN>"}[form]
    operands = [line.partition(" : ")[2].partition("->")[0] for line in dots]
    assert [types.count(narrow) for types in operands] == [2] * 9


def test_without_quantization_qwix_is_not_touched(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)  # an import would raise
    jax.jit(layer("local", "none")[0]).lower(TOKEN_X, GATES, WEIGHTS, IDS)
    monkeypatch.setattr(quantize, "check", lambda _: None)
    with pytest.raises(ImportError):
        jax.jit(layer("local", "int8")[0]).lower(TOKEN_X, GATES, WEIGHTS, IDS)


def test_a_sentence_reports_that_qwix_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantize.check("none")
    with pytest.raises(ValueError, match=r"model\.quantization='fp8' needs qwix, which is not installed: pip install"):
        quantize.check("fp8")


def test_a_run_logs_the_format_of_its_experts_products():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert (
        dispatch.kernel_note("auto", mesh, "float32", "int8") == "experts multiply in int8, quantized by qwix, in XLA"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(num_experts=0), "model.quantization='int8' quantizes the products of routed experts"),
        (dict(cpu_kernel="native"), "model.cpu_kernel='native' computes in float32 and bfloat16"),
    ],
)
def test_what_cannot_be_quantized_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(model=dict(quantization="int8") | model)


# --- in a run -----------------------------------------------------------------------------------------------------


def random_batch() -> Batch:
    """Random tokens, one document a row."""
    window = np.random.default_rng(0).integers(1, 256, (8, 17)).astype(np.int32)
    some = np.ones((8, 16), np.int32)
    rest = dict(segment_ids=some, positions=np.arange(16, dtype=np.int32) * some, mask=some == 1)
    parts = dict(tokens=window[:, :-1], targets=window[:, 1:], domain=some[:, 0] * 0, num_bytes=some.sum(1), **rest)
    return jax.tree.map(jnp.asarray, Batch(**parts))


def test_it_trains():
    model = dict(quantization="fp8", compute_dtype="bfloat16", remat="full")
    config = tiny_config(model=model, optimizer=dict(learning_rate=1e-2), balance=dict(bias_sign={}))
    state, step, batch = init_state(config), make_train_step(config), random_batch()
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch, step_key(config))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3


def test_the_default_quantizes_nothing():
    assert validate(default()).model.quantization == "none"
