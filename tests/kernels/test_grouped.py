"""Laws of the grouped matrix product: every row times its group's matrix, at a cost proportional to the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe_jax.kernels import grouped
from moe_jax.kernels.grouped import bias_of_rows, grouped_matmul

ROWS, GROUPS, IN, OUT = 13, 5, 3, 2
TILE = 4  # small tiles, so that 13 rows make groups of several, whole and partial ones


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Tiles of 4 rows for this module; the jitted functions below are traced under it only."""
    saved, grouped.TILE_ROWS = grouped.TILE_ROWS, TILE
    yield saved
    grouped.TILE_ROWS = saved


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, W, DY = array(0, ROWS, IN), array(1, GROUPS, IN, OUT), array(2, ROWS, OUT)


def integers(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def oracle(x, w, sizes, dy):
    """Row by row: y, dx, dw; rows after the last group belong to none."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x[row] @ w[group]
        dx[row] = dy[row] @ w[group].T
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@jax.jit
def with_gradients(x, w, sizes, dy):
    y, backward = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *backward(dy)


@jax.jit
def as_on_accelerators(x, w, sizes, dy):
    """The branch that GPUs compile, run where the tests run."""
    y = grouped._ragged_matmul(x, w, sizes)
    dx = grouped._ragged_transposed(dy, w, sizes)
    return y, dx, grouped._ragged_outer(x, dy, sizes, w.dtype)


@jax.jit
def as_on_tpu(x, w, sizes, dy):
    """The TPU's kernels, interpreted."""
    y = grouped._tpu_matmul(x, w, sizes, interpret=True)
    dx = grouped._tpu_matmul(dy, w, sizes, transposed=True, interpret=True)
    return y, dx, grouped.tpu_outer(x, dy, sizes, w.dtype, interpret=True)


def assert_equals_oracle(run, x, w, sizes, dy) -> None:
    for ours, exact in zip(run(x, w, sizes, dy), oracle(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


# sizes of 5 groups in at most 13 rows: the gaps between 5 sorted cuts; the rows after the last cut are the tail
group_sizes = st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS).map(
    lambda cuts: np.diff(np.asarray([0, *sorted(cuts)], np.int32))
)


# --- values and gradients -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(group_sizes)
def test_product_and_both_gradients_equal_those_row_by_row(sizes):
    assert_equals_oracle(with_gradients, X, W, sizes, DY)


@jax.jit
def biases_with_gradients(bias, sizes, dy):
    rows, backward = jax.vjp(lambda bias: bias_of_rows(bias, sizes, ROWS), bias)
    return rows, *backward(dy)


@settings(deadline=None, max_examples=50)
@given(group_sizes)
def test_a_bias_is_that_of_each_rows_group_and_its_gradient_their_sum(sizes):
    # the rows after the last group have none; of no other group a number is read, not even NaN
    group = np.repeat(np.arange(GROUPS), sizes)
    bias = np.where(sizes[:, None] > 0, W[:, 0], np.nan)
    rows, d_bias = biases_with_gradients(bias, sizes, DY)
    np.testing.assert_array_equal(rows, np.concatenate([bias[group], np.zeros((ROWS - len(group), OUT), np.float32)]))
    exact = np.zeros((GROUPS, OUT))
    np.add.at(exact, group, DY[: len(group)])
    np.testing.assert_allclose(d_bias, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [as_on_accelerators, as_on_tpu])
@settings(deadline=None, max_examples=50)
@given(sizes=group_sizes)
def test_the_branches_of_accelerators_equal_the_oracle_too(run, sizes):
    assert_equals_oracle(run, X, W, sizes, DY)


@pytest.mark.parametrize("run", [with_gradients, as_on_accelerators, as_on_tpu])
def test_an_empty_group_has_a_gradient_of_exactly_zero(run):
    # 4 + 0 + 9 + 0 + 0 rows (tokamax #887 #1016)
    dw = np.asarray(run(X, W, integers(4, 0, 9, 0, 0), DY)[2])
    np.testing.assert_array_equal(dw[[1, 3, 4]], 0.0)
    assert dw[[0, 2]].all()


@pytest.mark.parametrize("run", [with_gradients, as_on_accelerators, as_on_tpu])
def test_rows_after_the_last_group_give_zero_and_take_no_gradient(run):
    # 9 of 13 rows are in groups; the last four have arbitrary values
    x = X.copy()
    x[9:] = 1e30
    y, dx, dw = (np.asarray(a) for a in run(x, W, integers(2, 3, 0, 4, 0), DY))
    np.testing.assert_array_equal(y[9:], 0.0)
    np.testing.assert_array_equal(dx[9:], 0.0)
    np.testing.assert_allclose(dw, run(X, W, integers(2, 3, 0, 4, 0), DY)[2], rtol=1e-6)


@pytest.mark.parametrize("run", [with_gradients, as_on_accelerators, as_on_tpu])
def test_no_rows_give_no_rows_and_a_gradient_of_zero(run):
    y, dx, dw = run(array(0, 0, IN), W, np.zeros(GROUPS, np.int32), array(0, 0, OUT))
    assert (y.shape, dx.shape) == ((0, OUT), (0, IN))
    np.testing.assert_array_equal(dw, np.zeros_like(W))


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_arrays_as_small_as_a_tile_are_right(rows):
    sizes = integers(0, rows - 1, 0, 1, 0)
    assert_equals_oracle(with_gradients, array(3, rows, IN), W, sizes, array(4, rows, OUT))


def test_the_real_tile_is_right_on_groups_that_it_does_not_divide(small_tiles, monkeypatch):
    # 128 + 1, 127, 0, 2 x 128 and 37 of 560 rows
    monkeypatch.setattr(grouped, "TILE_ROWS", small_tiles)
    sizes = integers(129, 127, 0, 256, 37)
    assert_equals_oracle(with_gradients, array(5, 560, IN), W, sizes, array(6, 560, OUT))


@pytest.mark.parametrize("sizes", [(129, 127, 0, 256, 37), (0, 0, 384, 0, 0), (0, 1, 127, 128, 304), (0, 0, 0, 0, 0)])
def test_groups_that_tpu_tiles_do_not_divide_are_right(sizes):
    # 560 rows in tiles of 128, the last one partly empty
    assert_equals_oracle(as_on_tpu, array(5, 560, IN), W, integers(*sizes), array(6, 560, OUT))


def test_dimensions_of_several_tpu_tiles_are_right():
    # 600 and 1100 dimensions of float32 in tiles of 384, partly empty, and of 512
    assert grouped.tpu_tile(200, 600, 1100, 2, 4) == (128, 384, 384)
    x, w, dy = array(7, 200, 600), array(8, 2, 600, 1100), array(9, 200, 1100)
    ours = as_on_tpu(x, w, integers(90, 70), dy)
    for a, exact in zip(ours, oracle(x, w, (90, 70), dy), strict=True):
        np.testing.assert_allclose(a, exact, rtol=1e-5, atol=1e-4)  # sums of 1100 normal products are 30 large


@pytest.mark.parametrize("run", [with_gradients, as_on_accelerators, as_on_tpu])
def test_bfloat16_is_accumulated_in_float32(run):
    # a sum of 1000 ones in bfloat16 stops at 256, where 256 + 1 is 256; 1000 itself is representable
    x, w = jnp.ones((2, 1000), jnp.bfloat16), jnp.ones((2, 1000, 2), jnp.bfloat16)
    y, _, _ = run(x, w, integers(1, 1), jnp.ones((2, 2), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1000.0)
    rows = jnp.ones((1000, 1), jnp.bfloat16)
    _, dx, dw = run(rows, jnp.ones((1, 1, 1), jnp.bfloat16), integers(1000), rows)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(dw, np.float32), 1000.0)


@pytest.mark.parametrize("run", [with_gradients, as_on_accelerators, as_on_tpu])
def test_bfloat16_equals_the_rounded_float32_product(run):
    x, w, dy = (jnp.asarray(a, jnp.bfloat16) for a in (X, W, DY))
    sizes = integers(5, 0, 3, 1, 4)
    ours = run(x, w, sizes, dy)
    wide = with_gradients(*(np.asarray(a, np.float32) for a in (x, w)), sizes, np.asarray(dy, np.float32))
    for narrow, exact in zip(ours, wide, strict=True):
        np.testing.assert_allclose(np.asarray(narrow, np.float32), exact, rtol=2**-8, atol=2**-12)


# --- cost ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(group_sizes)
def test_every_row_of_a_group_is_in_exactly_one_of_its_tiles(sizes):
    group, first, end, count = (np.asarray(a) for a in tiles(sizes))
    covered = np.zeros((GROUPS, ROWS), int)
    for i in range(int(count)):
        covered[group[i], first[i] : min(first[i] + TILE, end[i])] += 1
    expected = np.zeros((GROUPS, ROWS), int)
    expected[np.repeat(np.arange(GROUPS), sizes), np.arange(sizes.sum())] = 1
    np.testing.assert_array_equal(covered, expected)


tiles = jax.jit(functools.partial(grouped._tiles, num_rows=ROWS, tile=TILE))


@settings(deadline=None, max_examples=50)
@given(group_sizes)
def test_the_number_of_tiles_follows_the_rows_and_stays_within_its_bound(sizes):
    group, _, _, count = tiles(sizes)
    assert int(count) == sum(-(-int(size) // TILE) for size in sizes)
    assert int(count) <= group.shape[0] == ROWS // TILE + GROUPS


def test_groups_without_rows_cost_no_tile():
    # 12 rows in three groups of 4 are three tiles, among 5 groups as among 500
    count = jax.jit(functools.partial(grouped._tiles, num_rows=12, tile=TILE))
    for groups in (5, 500):
        sizes = np.zeros(groups, np.int32)
        sizes[[0, 2, groups - 1]] = 4
        assert int(count(sizes)[3]) == 3


def test_arithmetic_of_the_compiled_product_does_not_grow_with_the_number_of_groups():
    # XLA lowers ragged_dot densely on CPU: sixteen times the groups, sixteen times the FLOPs (marin #5394)
    def flops(run, groups: int) -> float:
        shapes = (12, 64), (groups, 64, 64), (groups,), (12, 64)
        dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
        arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        return run.lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(with_gradients, 64) < 1.2 * flops(with_gradients, 4)


@pytest.mark.parametrize(
    ("rows", "groups", "tile"), [(128, 8, 128), (8192, 16, 128), (16384, 16, 256), (32768, 8, 512), (2**20, 8, 512)]
)
def test_a_tpu_tile_has_at_most_a_quarter_of_the_mean_groups_rows(rows, groups, tile):
    assert grouped.tpu_tile(rows, 64, 64, groups, 2)[0] == tile
    assert tile == 128 or tile <= rows / groups / 4


def test_tokamax_keeps_the_laws_if_it_is_used(monkeypatch):
    # here by its own fallback, which is XLA's
    pytest.importorskip("tokamax")
    flags.FLAGS.mark_as_parsed()  # tokamax reads its own flags
    monkeypatch.setattr(grouped, "has_tokamax", lambda: True)
    run = jax.jit(lambda *arrays: as_on_accelerators.__wrapped__(*arrays))
    for sizes in ((4, 0, 9, 0, 0), (2, 3, 0, 4, 0), (0, 0, 0, 0, 0)):
        assert_equals_oracle(run, X, W, integers(*sizes), DY)


# --- on a mesh ------------------------------------------------------------------------------------------------


def test_kernels_without_types_have_the_gradients_of_the_oracle_on_two_axes():
    # rows over a and b, groups over a, in dimension over b: only this test checks the sums of these gradients
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    places = P(("a", "b")), P("a", "b"), P(("a", "b")), P(("a", "b"))
    x, w, dy = array(0, 4 * ROWS, IN + 1), array(1, 2 * GROUPS, IN + 1, OUT), array(2, 4 * ROWS, OUT)
    sizes = integers(4, 0, 9, 0, 0, 1, 2, 3, 4, 3, 0, 0, 0, 0, 0, 13, 0, 0, 0, 0)
    interpreted = pltpu.InterpretParams()  # the interpreter that accepts arrays with a mesh in their type

    @jax.custom_vjp
    def product(x, w, sizes):
        return grouped._tpu_matmul(x, w, sizes, interpret=interpreted)

    def backward(kept, dy):
        x, w, sizes = kept
        dx = grouped._tpu_matmul(dy, w, sizes, transposed=True, interpret=interpreted)
        return dx, grouped.tpu_outer(x, dy, sizes, w.dtype, interpret=interpreted), None

    product.defvjp(lambda *kept: (product(*kept), kept), backward)

    def on_shard(x, w, sizes):
        return product(x, jax.lax.all_gather(w, "b", axis=1, tiled=True), sizes)

    def run(x, w, sizes, dy):
        shards = jax.shard_map(on_shard, mesh=mesh, in_specs=places[:3], out_specs=places[0])
        y, backward = jax.vjp(lambda x, w: shards(x, w, sizes), x, w)
        return y, *backward(dy)

    ours = jax.jit(run)(x, w, sizes, dy)
    # device (a, b) has a quarter of the rows and the groups of a
    parts = zip(*(np.split(a, 4) for a in (x, sizes, dy)), strict=True)
    exact = [oracle(x, np.split(w, 2)[n // 2], s, dy) for n, (x, s, dy) in enumerate(parts)]
    y, dx, dw = zip(*exact, strict=True)
    expected = np.concatenate(y), np.concatenate(dx), np.concatenate([dw[0] + dw[1], dw[2] + dw[3]])
    for got, want in zip(ours, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- with the TPU compiler: FLOPs as a kernel declares them and as XLA counts the rest -------------------------


@pytest.mark.parametrize(
    ("rows", "in_dim", "out_dim", "groups", "dtype"),
    [
        (16384, 512, 256, 64, "bfloat16"),
        (16384, 512, 256, 8, "float32"),
        (4096, 2048, 1408, 32, "bfloat16"),
    ],
)
def test_on_tpu_product_and_gradients_multiply_each_row_once(tpu_devices, rows, in_dim, out_dim, groups, dtype):
    device = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    shapes = (rows, in_dim), (groups, in_dim, out_dim), (groups,), (rows, out_dim)
    arguments = [jax.ShapeDtypeStruct(s, dtype, sharding=device) for s in shapes]
    arguments[2] = jax.ShapeDtypeStruct((groups,), "int32", sharding=device)
    ideal = 2 * rows * in_dim * out_dim
    for n in range(3):  # XLA removes what the result does not depend on
        run = jax.jit(lambda *arrays, n=n: with_gradients(*arrays)[n], out_shardings=device)
        compiled = run.lower(*arguments).compile()
        assert "tpu_custom_call" in compiled.as_text()
        assert ideal <= compiled.cost_analysis()["flops"] < 1.1 * ideal
