"""Laws of attention: which tokens attend to which, with what weight, in the kernel of every platform."""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.config.axes import AXES, BATCH
from moe_jax.kernels import attention, native, native_attention
from moe_jax.kernels.attention import attend, attend_cached, in_jax, kernel_for, splash, visibility


def mesh_of(devices, **sizes) -> Mesh:
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return Mesh(
        np.array(devices).ravel()[: np.prod(shape)].reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def arrays(rows, length, heads, kv_heads, width, value_width, dtype=jnp.float32):
    """query, key, value, and a gradient of the result."""
    draw = np.random.default_rng(0).normal
    shapes = (heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)
    return [jnp.asarray(draw(size=(rows, length, *s)), dtype) for s in shapes]


def segments(rows, length):
    """Three documents of different lengths in every row, and padding at its end."""
    cuts = np.sort(np.random.default_rng(1).integers(1, max(2, length), (rows, 3)), 1)
    number = 1 + (np.arange(length) >= cuts[:, :, None]).sum(1)
    return jnp.asarray(np.where(number == 4, 0, number), jnp.int32)


def oracle(query, key, value, segment_ids, scale=None):
    """Token by token, in float64."""
    query, key, value, segment_ids = (np.asarray(a, np.float64) for a in (query, key, value, segment_ids))
    shared = query.shape[2] // key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    mixed = np.zeros((*query.shape[:3], value.shape[3]))
    for b, i, h in np.ndindex(query.shape[:3]):
        seen = [j for j in range(i + 1) if segment_ids[b, j] == segment_ids[b, i]]
        weight = np.exp(scale * key[b, seen, h // shared] @ query[b, i, h])
        mixed[b, i, h] = weight @ value[b, seen, h // shared] / weight.sum()
    return mixed


def as_on_tpu(query, key, value, segment_ids, scale=None, mesh=None, **options):
    """The TPU's kernel, interpreted."""
    return splash(query, key, value, segment_ids, scale or query.shape[3] ** -0.5, mesh, interpret=True, **options)


def in_xla(query, key, value, segment_ids, scale=None, window=0):
    """The path for platforms without a fitting kernel."""
    return in_jax(query, key, value, segment_ids, scale or query.shape[3] ** -0.5, "xla", window)


def in_cpp(query, key, value, segment_ids, scale=None, **options):
    """A CPU's kernel in C++; without a compiler it is the next one."""
    return attend(query, key, value, segment_ids, scale=scale, cpu_kernel="auto", **options)


def in_blocks(query, key, value, segment_ids, scale=None, **options):
    """A CPU's kernel in XLA."""
    return attend(query, key, value, segment_ids, scale=scale, cpu_kernel="xla", **options)


def on_hopper(query, key, value, segment_ids, window=0):
    """Hopper's kernel, by tokamax's own fallback, which is XLA's."""
    pytest.importorskip("tokamax")
    flags.FLAGS.mark_as_parsed()  # tokamax reads its own flags
    scale = query.shape[3] ** -0.5
    return attention.mosaic(query, key, value, segment_ids, scale, window=window, implementation="xla")


ON_CPU = [in_cpp, in_blocks]
RUNS = [*ON_CPU, as_on_tpu, in_xla]


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(run, query, key, value, segment_ids, gradient):
    mixed, backward = jax.vjp(lambda *a: run(*a, segment_ids), query, key, value)
    return mixed, *backward(gradient)


# --- values and gradients -------------------------------------------------------------------------------------

SHAPES = {  # rows, length, heads, key-value heads, width, width of values
    "one head each": (2, 128, 2, 2, 16, 16),
    "two queries a key, odd length": (2, 37, 4, 2, 16, 16),
    "wider keys than values, several blocks, odd length": (1, 301, 2, 1, 24, 8),
    "wider values than keys": (1, 20, 2, 2, 8, 24),
    "one of everything": (1, 1, 1, 1, 1, 1),
    "nothing fits a vector, several blocks": (1, 197, 3, 1, 19, 37),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """The smallest possible block, so that 301 tokens are three blocks."""
    monkeypatch.setattr(attention, "BLOCK", 128)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_token_gets_the_weighted_values_of_its_segment_up_to_itself(run, shape, small_blocks):
    query, key, value, _ = arrays(*shape)
    segment_ids = segments(*shape[:2])
    mixed = jax.jit(run)(query, key, value, segment_ids)
    np.testing.assert_allclose(mixed, oracle(query, key, value, segment_ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("run", [*ON_CPU, as_on_tpu])
def test_every_kernel_has_the_gradients_of_xla(run, shape, small_blocks):
    *inputs, gradient = arrays(*shape)
    segment_ids = segments(*shape[:2])
    expected = with_gradients(in_xla, *inputs, segment_ids, gradient)
    for ours, theirs in zip(with_gradients(run, *inputs, segment_ids, gradient), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def dense(query, key, value, segment_ids, window, sinks):
    """Every score of a row, and the sink's, in one softmax."""
    key, value = (jnp.repeat(a, query.shape[2] // a.shape[2], 2) for a in (key, value))
    scores = jnp.einsum("bqhk,bshk->bhqs", query, key) * query.shape[3] ** -0.5
    before = jnp.arange(query.shape[1])[:, None] - jnp.arange(query.shape[1])
    seen = (segment_ids[:, None, :, None] == segment_ids[:, None, None]) & (before >= 0) & (before < window)
    last = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([jnp.where(seen, scores, -jnp.inf), last], -1))
    return jnp.einsum("bhqs,bshv->bqhv", weights[..., :-1], value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_all_gradients(run, window, query, key, value, sinks, segment_ids, gradient):
    mixed, backward = jax.vjp(lambda q, k, v, z: run(q, k, v, segment_ids, window, z), query, key, value, sinks)
    return mixed, *backward(gradient)


WITH_SINKS = [in_cpp, in_blocks, as_on_tpu]
OF_WINDOWS = [(run, window) for run in (in_blocks, as_on_tpu, in_xla, on_hopper) for window in (20, 140)]


@pytest.mark.parametrize(("run", "window"), [*((in_cpp, window) for window in (1, 20, 140, 400)), *OF_WINDOWS])
def test_a_token_sees_its_window_and_its_head_s_sink(run, window, small_blocks):
    # a long document between two short ones, then one of the whole row
    *inputs, gradient = arrays(2, 301, 4, 2, 16, 8)
    segment_ids = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], [30, 200, 61, 10]), np.ones(301)]), jnp.int32)
    has = run in WITH_SINKS
    sinks = jnp.array([-1.0, 0.0, 2.0, 5.0]) if has else jnp.full(4, -jnp.inf)

    def one(query, key, value, segment_ids, window, sinks):
        return run(query, key, value, segment_ids, window=window, **(dict(sinks=sinks) if has else {}))

    expected = with_all_gradients(dense, window, *inputs, sinks, segment_ids, gradient)
    found = with_all_gradients(one, window, *inputs, sinks, segment_ids, gradient)
    for ours, theirs in list(zip(found, expected, strict=True))[: None if has else 4]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_with_a_cache_a_token_sees_its_window_and_its_head_s_sink(window):
    query, key, value, _ = arrays(2, 20, 4, 2, 16, 8)
    sinks, ones = jnp.array([-1.0, 0.0, 2.0, 5.0]), jnp.ones((2, 20), jnp.int32)
    expected = dense(query, key, value, ones, window, sinks)
    places = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32), (2, 20))[:, 12:]
    mixed = attend_cached(query[:, 12:], key, value, places, scale=0.25, window=window, sinks=sinks)
    np.testing.assert_allclose(mixed, expected[:, 12:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_the_scale_is_an_argument(run):
    query, key, value, _ = arrays(1, 20, 2, 1, 8, 8)
    segment_ids = segments(1, 20)
    mixed = jax.jit(functools.partial(run, scale=2.0))(query, key, value, segment_ids)
    np.testing.assert_allclose(mixed, oracle(query, key, value, segment_ids, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_bfloat16_is_off_by_its_rounding(run):
    *inputs, gradient = arrays(1, 37, 4, 2, 16, 16, jnp.bfloat16)
    segment_ids = segments(1, 37)
    exact = with_gradients(
        attend, *(a.astype(jnp.float32) for a in (*inputs,)), segment_ids, gradient.astype(jnp.float32)
    )
    for ours, wide in zip(with_gradients(run, *inputs, segment_ids, gradient), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        # of sums of up to 37 weighted values and gradients of order 1
        np.testing.assert_allclose(np.asarray(ours, np.float32), wide, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("run", ON_CPU)
def test_many_short_documents_in_any_order_are_separate(run):
    # 40 documents of 8 tokens, so that most blocks of scores are hidden; then numbers that come back
    *inputs, gradient = arrays(2, 320, 2, 1, 16, 16)
    apart = np.repeat(np.arange(1, 41), 8)
    segment_ids = jnp.asarray(np.stack([apart, 1 + apart % 3]), jnp.int32)
    expected = with_gradients(in_xla, *inputs, segment_ids, gradient)
    for ours, theirs in zip(with_gradients(run, *inputs, segment_ids, gradient), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ON_CPU)
def test_a_value_that_is_not_finite_stays_so(run):
    # document 1 is tokens 0 to 149, document 2 the rest; the key of token 100 is NaN
    query, key, value, gradient = arrays(1, 300, 1, 1, 16, 16)
    segment_ids = jnp.asarray(np.where(np.arange(300) < 150, 1, 2), jnp.int32)[None]
    key = key.at[0, 100].set(jnp.nan)
    mixed, d_query, *_ = with_gradients(run, query, key, value, segment_ids, gradient)
    after = (np.arange(300) >= 100) & (np.arange(300) < 150)
    np.testing.assert_array_equal(np.isnan(mixed[0, :, 0]).any(-1), after)
    assert np.isnan(mixed[0, after]).all()
    assert np.isnan(d_query[0, after]).all()


@pytest.mark.parametrize("run", ON_CPU)
def test_large_scores_neither_overflow_nor_vanish(run):
    # scores of +-10^4: every weight is 0 or 1
    query = jnp.full((1, 3, 1, 1), 100.0)
    key = jnp.array([-100.0, 100.0, 0.0]).reshape(1, 3, 1, 1)
    value = jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    mixed = run(query, key, value, jnp.ones((1, 3), jnp.int32), scale=1.0)
    np.testing.assert_allclose(mixed.ravel(), [1.0, 2.0, 2.0], rtol=1e-6)


def test_padding_and_documents_do_not_see_each_other():
    seen = np.asarray(visibility(jnp.array([[1, 1, 2, 0, 0]])))[0, 0]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(seen, np.array(expected, bool))


@pytest.mark.parametrize(
    ("kv_heads", "axes"), [(1, dict(tensor=2)), (2, dict(tensor=2)), (2, dict(sequence=2, tensor=2))], ids=str
)
def test_on_a_mesh_the_kernel_has_the_values_and_gradients_of_one_device(kv_heads, axes):
    # rows over data, heads over the others; only this test checks how the kernel's results vary
    shape = (2, 20, 4, 2 * kv_heads, 8, 8)
    *inputs, gradient = arrays(*shape)
    segment_ids = segments(*shape[:2])
    mesh, sinks = mesh_of(jax.devices(), data=2, **axes), jnp.linspace(-1.0, 2.0, 4)

    def one(query, key, value, segment_ids, window, sinks):
        return attend(query, key, value, segment_ids, window=window, sinks=sinks)

    def many(query, key, value, segment_ids, window, sinks):
        return as_on_tpu(query, key, value, segment_ids, mesh=mesh, window=window, sinks=sinks)

    expected, on_mesh = (with_all_gradients(run, 6, *inputs, sinks, segment_ids, gradient) for run in (one, many))
    for ours, theirs in zip(on_mesh, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# --- which kernel ---------------------------------------------------------------------------------------------


def machine(platform: str, kind: str, tensor: int = 1, capability: str = "9.0"):
    """A mesh of devices that are not present."""
    device = SimpleNamespace(platform=platform, device_kind=kind, id=0, compute_capability=capability)
    mesh = mock.create_autospec(Mesh, instance=True)
    sizes = (*[1] * (len(AXES) - 1), tensor)
    mesh.devices, mesh.shape = np.full(sizes, device), dict(zip(AXES, sizes, strict=True))
    mesh.size = tensor
    return mesh


@pytest.mark.parametrize(
    ("mesh", "shape", "dtype", "kernel"),
    [
        (None, (1, 8, 4, 2, 64, 64), "bfloat16", "native"),
        (None, (1, 8, 4, 2, 64, 64), "float16", "blocks"),
        (machine("cpu", "cpu"), (1, 8, 4, 2, 64, 64), "bfloat16", "native"),
        (machine("cpu", "cpu", 2), (1, 8, 4, 2, 64, 64), "bfloat16", "blocks"),
        (machine("tpu", "TPU v5"), (1, 7, 4, 2, 192, 128), "float32", "splash"),
        (machine("tpu", "TPU v5", 2), (1, 8, 4, 2, 64, 64), "bfloat16", "splash"),
        (machine("tpu", "TPU v5", 4), (1, 8, 4, 2, 64, 64), "bfloat16", "xla"),  # one key head on two devices
        (machine("gpu", "NVIDIA H100"), (1, 128, 4, 2, 192, 128), "bfloat16", "mosaic"),
        (machine("gpu", "NVIDIA H100", 2), (1, 128, 4, 2, 64, 64), "bfloat16", "mosaic"),
        (machine("gpu", "NVIDIA H100", 4), (1, 128, 4, 2, 64, 64), "bfloat16", "cudnn"),  # one key head on two devices
        (machine("gpu", "NVIDIA H100"), (1, 128, 4, 2, 96, 96), "bfloat16", "cudnn"),
        (machine("gpu", "NVIDIA H100"), (1, 128, 4, 2, 64, 64), "float32", "xla"),
        (machine("gpu", "NVIDIA A100", capability="8.0"), (1, 128, 4, 2, 64, 64), "bfloat16", "cudnn"),
        (machine("gpu", "NVIDIA B200", capability="10.0"), (1, 128, 4, 2, 64, 64), "bfloat16", "cudnn"),
        (machine("gpu", "NVIDIA H100"), (1, 8, 4, 2, 64, 64), "bfloat16", "cudnn"),
        (machine("gpu", "NVIDIA H100"), (1, 8, 4, 2, 64, 64), "float32", "xla"),
        (machine("gpu", "NVIDIA H100"), (1, 7, 4, 2, 64, 64), "bfloat16", "xla"),
        (machine("gpu", "NVIDIA H100"), (1, 8, 4, 2, 192, 128), "bfloat16", "xla"),
        (machine("gpu", "AMD Instinct"), (1, 8, 4, 2, 64, 64), "bfloat16", "xla"),
    ],
)
def test_the_kernel_is_that_of_the_devices_compiled_for(mesh, shape, dtype, kernel, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(attention, "has_tokamax", lambda: True)
    query, key, value, _ = arrays(*shape, dtype=dtype)
    assert kernel_for(query, key, value, mesh) == kernel


def test_without_tokamax_cudnn_attends(monkeypatch):
    monkeypatch.setattr(attention, "has_tokamax", lambda: False)
    query, key, value, _ = arrays(1, 128, 4, 2, 64, 64, dtype=jnp.bfloat16)
    assert kernel_for(query, key, value, machine("gpu", "NVIDIA H100")) == "cudnn"


@pytest.mark.parametrize("length", [1, 37, 128])
def test_a_window_reaches_back_to_the_first_token_of_a_segment(length):
    segment_ids = segments(3, length)
    visible = visibility(segment_ids)[:, 0].sum(-1)
    np.testing.assert_array_equal(attention._places_in_segments(segment_ids), visible - 1)  # all but the token itself


def test_tokamax_attends_like_xla():
    # here by its own fallback, which is XLA's
    pytest.importorskip("tokamax")
    flags.FLAGS.mark_as_parsed()  # tokamax reads its own flags
    *inputs, gradient = arrays(2, 37, 4, 2, 16, 8)
    segment_ids = segments(2, 37)

    def run(query, key, value, segment_ids):
        return attention.mosaic(query, key, value, segment_ids, 0.25, implementation="xla")

    expected = with_gradients(in_xla, *inputs, segment_ids, gradient)
    for ours, theirs in zip(with_gradients(run, *inputs, segment_ids, gradient), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["value", "heads", "length"])
def test_the_compiled_code_refuses_sizes_that_do_not_fit(wrong):
    if why := native.missing():
        pytest.skip(why)
    query, key, value, _ = arrays(1, 8, 4, 2, 8, 8)
    segment_ids = segments(1, 8)
    arguments = {
        "value": (query, key, value[:, :, :1], segment_ids),
        "heads": (query[:, :, :3], key, value, segment_ids),
        "length": (query, key, value, segment_ids[:, :5]),
    }
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="sizes of the arrays do not fit together"):
        jax.block_until_ready(native_attention.attend(*arguments[wrong], 1.0))


def test_without_a_compiler_a_cpu_attends_in_xla(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "there is no compiler")
    query, key, value, _ = arrays(1, 8, 2, 2, 8, 8)
    assert kernel_for(query, key, value, None) == "blocks"
    with pytest.raises(ValueError, match=r'model\.cpu_kernel="native" cannot run: there is no compiler'):
        attend(query, key, value, segments(1, 8), cpu_kernel="native")


@pytest.mark.parametrize(
    ("width", "value_width", "length", "window"), [(128, 128, 2048, 0), (64, 64, 1000, 200), (192, 128, 1024, 0)]
)
def test_on_tpu_scores_are_never_in_memory(tpu_devices, width, value_width, length, window):
    mesh = mesh_of(tpu_devices("v5p:2x2x1"), data=2, tensor=2)

    def abstract(place, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, place))

    heads = functools.partial(abstract, P(BATCH, None, "tensor"), 4, length)
    query, key, value = heads(8, width), heads(4, width), heads(4, value_width)
    segment_ids = abstract(P(BATCH), 4, length, dtype=jnp.int32)

    def total(query, key, value, segment_ids):
        sinks = jnp.arange(8, dtype=jnp.float32) if window else None
        mixed = attend(query, key, value, segment_ids, window=window, sinks=sinks, mesh=mesh)
        return mixed.astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(query, key, value, segment_ids).compile()
    scores_of_a_device = 2 * 4 * length**2 * 2  # rows, heads, bfloat16
    assert compiled.memory_analysis().temp_size_in_bytes < scores_of_a_device
    assert "all-gather" not in compiled.as_text()
