"""Laws of gathering by runs: it is a sum by source, and each direction is the other's transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.sorting import sum_of_runs, to_runs

N, D = 5, 3
# where each row of a run comes from: N is no row. Runs of 1 to 4, at the ends too; one run of all; nothing; one row
SOURCES = {
    "several": [0, 0, 0, 0, 2, 3, 3, 3, 4, 4, N, N],
    "without empty rows": [1, 1, 1, 2, 4, 4, 4, 4],
    "one run": [2, 2, 2],
    "nothing": [N, N, N, N],
    "one row": [4],
}


def maps(source: list[int]) -> tuple[jax.Array, jax.Array]:
    source = np.asarray(source, np.int32)
    first = [int(np.argmax(source == n)) if n in source else len(source) for n in range(N)]
    return jnp.asarray(source), jnp.asarray(first, jnp.int32)


@pytest.mark.parametrize("longest", [4, 5, 8])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_sum_of_runs_is_the_sum_by_source(source, longest):
    runs = np.arange(1.0, len(source) * D + 1, dtype=np.float32).reshape(-1, D) ** 2  # exact in float32
    expected = np.zeros((N + 1, D), np.float32)
    np.add.at(expected, source, runs)
    np.testing.assert_array_equal(sum_of_runs(jnp.asarray(runs), *maps(source), longest), expected[:N])


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_each_direction_is_the_transpose_of_the_other(source):
    rows, runs = jnp.arange(1.0, N * D + 1).reshape(N, D), jnp.arange(2.0, len(source) * D + 2).reshape(-1, D)
    spread, back = jax.vjp(lambda rows: to_runs(rows, *maps(source), 4), rows)
    summed, forth = jax.vjp(lambda runs: sum_of_runs(runs, *maps(source), 4), runs)
    np.testing.assert_array_equal(spread, np.concatenate([rows, np.zeros((1, D))])[np.asarray(source)])
    np.testing.assert_array_equal(back(runs)[0], summed)
    np.testing.assert_array_equal(forth(rows)[0], spread)


def test_a_run_is_summed_in_float32():
    # in bfloat16 256 + 1 is 256
    runs = jnp.asarray([[256.0], [1.0], [1.0], [2.0]], jnp.bfloat16)
    summed = sum_of_runs(runs, *maps([0, 0, 0, 0]), 4)
    assert (summed.dtype, float(summed[0, 0])) == (jnp.bfloat16, 260.0)
