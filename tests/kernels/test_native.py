"""Laws of the experts in C++: the results of XLA at every size, dtype and skew; no error without a compiler."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import dispatch
from moe_jax.config import MeshConfig
from moe_jax.dispatch import ExpertWeights, Work
from moe_jax.dispatch.experts import in_cpp, in_xla
from moe_jax.dispatch.local import local
from moe_jax.kernels import native, native_experts
from moe_jax.kernels.activation import SWIGLU
from moe_jax.mesh import make_mesh


@pytest.fixture
def compiler():
    if why := native.missing():
        pytest.skip(why)


SIZES = {  # tokens, slots, experts, embed, ffw
    "one of everything": (1, 1, 1, 1, 1),
    "nothing fits a vector": (37, 2, 5, 19, 7),
    "whole vectors": (64, 2, 4, 64, 32),
    "several blocks of the inner dimension": (40, 1, 2, 300, 270),
    "one expert in several chunks and parts": (1500, 2, 3, 24, 17),
}


def problem(tokens, slots, experts, embed, ffw, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(tokens, embed)), dtype)
    ids = draw.integers(0, experts + 1, (tokens, slots))  # some slots are empty
    ids[: tokens // 2] = 0  # and the first expert has half of the rest
    gates = jnp.where(ids < experts, jnp.asarray(draw.random((tokens, slots)), jnp.float32), 0.0)
    shapes = (experts, embed, ffw), (experts, embed, ffw), (experts, ffw, embed)
    weights = ExpertWeights(*(jnp.asarray(draw.normal(size=s) / s[1] ** 0.5, dtype) for s in shapes))
    return x, jnp.asarray(ids, jnp.int32), gates, weights


def value_and_gradients(multiply, x, ids, gates, weights):
    def something(x, gates, weights):
        y = multiply(x, ids, gates, weights)
        return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(something, (0, 1, 2), has_aux=True))(x, gates, weights)
    return jax.tree.leaves((y, gradients))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_xla(compiler, sizes):
    for ours, theirs in zip(
        value_and_gradients(native_experts.experts, *problem(*sizes)),
        value_and_gradients(in_xla().routed, *problem(*sizes)),
        strict=True,
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())))


def test_bfloat16_is_off_by_its_rounding(compiler):
    inputs = problem(*SIZES["one expert in several chunks and parts"], jnp.bfloat16)
    x, ids, gates, weights = inputs
    wide = x.astype(jnp.float32), ids, gates, jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    exact = value_and_gradients(in_xla().routed, *wide)
    for ours, theirs in zip(value_and_gradients(native_experts.experts, *inputs), exact, strict=True):
        # the residuals of the backward pass are rounded too: 2^-8 of the largest
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=2**-7 * float(jnp.abs(theirs).max()))


def test_an_expert_without_tokens_has_a_gradient_of_exactly_zero(compiler):
    x, ids, gates, weights = problem(8, 1, 3, 16, 16)
    *_, d_gate, d_up, d_down = value_and_gradients(
        native_experts.experts, x, jnp.where(ids == 1, 3, ids), gates, weights
    )
    for gradient in (d_gate, d_up, d_down):
        np.testing.assert_array_equal(gradient[1], 0.0)


def test_a_value_that_is_not_finite_stays_so(compiler):
    # row 5 is NaN: so is its output, and no other
    x, ids, gates, weights = problem(8, 1, 3, 16, 16)
    y = native_experts.experts(x.at[5].set(jnp.nan), jnp.zeros_like(ids), jnp.ones_like(gates), weights)
    assert np.isnan(y).any(1).tolist() == [False] * 5 + [True] + [False] * 2


def test_large_activations_saturate(compiler):
    # silu(1e4) = 1e4 and silu(-1e4) = 0
    weights = ExpertWeights(*(jnp.ones((1, 1, 1)) for _ in range(3)))
    y = native_experts.experts(jnp.array([[1e4], [-1e4]]), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), weights)
    np.testing.assert_allclose(y, [[1e8], [0.0]], rtol=1e-6, atol=1e-20)  # sigmoid ends at e^-87


def test_native_needs_a_compiler_and_auto_falls_back_to_xla(compiler, monkeypatch):
    assert not native.chosen("xla", None, jnp.dtype("float32"))
    assert native.chosen("auto", None, jnp.dtype("bfloat16"))
    assert not native.chosen("auto", None, jnp.dtype("float16"))  # which the C++ code does not support
    monkeypatch.setattr(native, "missing", lambda: "there is no compiler")
    assert not native.chosen("auto", None, jnp.dtype("float32"))
    with pytest.raises(ValueError, match=r'model\.cpu_kernel="native" cannot run: there is no compiler'):
        native.chosen("native", None, jnp.dtype("float32"))
    with pytest.raises(ValueError, match=r"float16.*set it to"):
        native.chosen("native", None, jnp.dtype("float16"))


@pytest.mark.parametrize(
    ("compiler_command", "message"),
    [("/no/such/compiler", "No such file"), ("false", "false failed"), ("true", "No such file")],
)
def test_a_compiler_that_fails_is_reported_and_not_an_error(tmp_path, compiler_command, message):
    environment = os.environ | {"CXX": compiler_command, "XDG_CACHE_HOME": str(tmp_path)}
    code = "from moe_jax.kernels import native; print(native.missing())"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert message in out.stdout


def test_dispatch_reports_the_rows_it_multiplied(compiler):
    # 3 copies: in C++ no row is padding, in XLA tiles are 128 rows
    ids = jnp.array([[0], [1], [1]])
    weights = ExpertWeights(*(jnp.ones((2, 4, 4)) for _ in range(3)))
    for multiply, rows in ((in_cpp(), 3), (in_xla(), 256)):
        of = dict(weights=weights, multiply=multiply, mesh=None, sequence_length=3, capacity_factor=1.0)
        _, traffic = local(Work(jnp.ones((3, 4)), ids, jnp.ones((3, 1)), **of))
        assert int(traffic.rows) == rows


def test_a_dense_layer_equals_an_expert_that_gets_every_token(compiler):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(20, 8)), jnp.float32)
    weights = ExpertWeights(*(jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((8, 12), (8, 12), (12, 8))))

    def value_and_gradients(kernel):
        run = jax.value_and_grad(lambda x, w: (dispatch.feed_forward(x, w, cpu_kernel=kernel) ** 2).sum(), (0, 1))
        return jax.tree.leaves(jax.jit(run)(x, weights))

    for ours, theirs in zip(value_and_gradients("native"), value_and_gradients("xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_run_logs_how_its_experts_multiply(compiler, monkeypatch):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert dispatch.kernel_note("auto", mesh, "float32") == "experts multiply in C++"
    assert dispatch.kernel_note("xla", mesh, "float32") == "experts multiply in XLA: model.cpu_kernel='xla', float32"
    monkeypatch.setattr(native, "missing", lambda: "there is no compiler")
    assert dispatch.kernel_note("auto", mesh, "float32") == "experts multiply in XLA: there is no compiler"


# --- the boundary: what the C++ reads ----------------------------------------------------------------------------


def test_other_dtypes_are_cast_before_the_compiled_code_reads_them(compiler):
    # without the cast, float16 gates would be read as float32 and past their end, int64 and int16 ids as int32
    x, ids, gates, weights = problem(*SIZES["nothing fits a vector"])
    exact = native_experts.experts(x, ids, gates, weights)
    for narrow in (jnp.float16, jnp.bfloat16):
        rounded = gates.astype(narrow)
        want = native_experts.experts(x, ids, rounded.astype(jnp.float32), weights)
        np.testing.assert_array_equal(native_experts.experts(x, ids, rounded, weights), want)
    for other in (jnp.int8, jnp.int16, jnp.uint32):
        np.testing.assert_array_equal(native_experts.experts(x, ids.astype(other), gates, weights), exact)
    with jax.enable_x64(True):
        wide = jnp.asarray(ids, jnp.int64), jnp.asarray(gates, jnp.float64)
        np.testing.assert_array_equal(native_experts.experts(x, *wide, weights), exact)
        widened = jax.tree.map(lambda w: w.astype(jnp.float64), weights)
        np.testing.assert_array_equal(native_experts.experts(x, ids, gates, widened), exact)


def test_gradients_have_the_dtypes_of_the_inputs(compiler):
    x, ids, gates, weights = problem(*SIZES["nothing fits a vector"])
    run = jax.grad(lambda *args: native_experts.experts(args[0], ids, *args[1:]).sum(), (0, 1, 2))
    given = x.astype(jnp.bfloat16), gates.astype(jnp.float16), weights
    for gradient, argument in zip(jax.tree.leaves(run(*given)), jax.tree.leaves(given), strict=True):
        assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)


def test_dtypes_and_sizes_that_do_not_fit_are_refused_in_a_sentence(compiler):
    x, ids, gates, weights = problem(8, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="not float16 and int32; cast them"):
        native_experts.experts(x.astype(jnp.float16), ids, gates, weights)
    with pytest.raises(ValueError, match="not float32 and float32; cast them"):
        native_experts.experts(x, ids.astype(jnp.float32), gates, weights)
    transposed = weights._replace(down=weights.down[:, :5])
    for wrong in (
        (x[:5], ids, gates, weights),
        (x[:, :5], ids, gates, weights),
        (x, ids[:, 0], gates, weights),
        (x, ids, gates[:, :1], weights),
        (x, ids, gates, transposed),
        (x, ids, gates, jax.tree.map(lambda w: w[0], weights)),
    ):
        with pytest.raises(ValueError, match=r"have the shapes .*, which must be \[T, D\]"):
            native_experts.experts(*wrong)


@pytest.mark.parametrize("wrong", ["gates", "expert_ids", "down", "sizes"])
def test_the_compiled_code_itself_refuses_other_element_types_and_sizes(compiler, wrong):
    x, ids, gates, weights = problem(8, 2, 3, 16, 16)
    arguments = {
        "gates": (x, ids, gates.astype(jnp.bfloat16), weights),
        "expert_ids": (x, ids.astype(jnp.int16), gates, weights),
        "down": (x, ids, gates, weights._replace(down=weights.down.astype(jnp.bfloat16))),
        "sizes": (x, ids, gates[:5], weights),
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"dtype|sizes of the arrays do not fit together"):
        jax.block_until_ready(native_experts._experts(*arguments[wrong], SWIGLU, False))


@pytest.mark.parametrize("flags", ["-mno-avx512bf16", pytest.param("-mno-avx512f", marks=pytest.mark.slow)])
def test_other_processors_compute_the_same(compiler, flags, tmp_path):
    # those without products of bfloat16, and with vectors half as wide
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the flags are of x86")
    environment = os.environ | {"CXXFLAGS": f"-O1 {flags}", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, str(Path(__file__).parent / "compare_with_xla.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
