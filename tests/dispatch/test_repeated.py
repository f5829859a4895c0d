"""Laws of a sum of rounds: as many as are needed and always the first, in the output and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import ExpertWeights
from moe_jax.dispatch.repeated import Inputs, Repeated, sum_of_rounds


def plan(needed):
    """Rounds that each add (number + 1) x gate x up, and multiply 10 + number rows."""

    def one(number, inputs):
        return (number + 1) * inputs.x * inputs.gates * inputs.weights.up, jnp.asarray(10 + number, jnp.int32)

    return Repeated(needed, one)


@pytest.mark.parametrize("needed", [0, 1, 2, 4])
def test_all_rounds_add_up_in_the_output_and_in_the_gradients(needed):
    x, gates, up = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[5.0], [6.0]]), jnp.asarray([[7.0, 8.0]])
    unused = jnp.ones(1)

    @jax.jit
    def run(inputs, needed):
        y, *others = sum_of_rounds(plan, inputs, needed)
        return y.sum(), (y, *others)

    inputs = Inputs(x, gates, ExpertWeights(unused, up, unused))
    (_, (y, rounds, rows)), d = jax.value_and_grad(run, has_aux=True)(inputs, jnp.int32(needed))
    ran = range(max(1, needed))
    times = sum(n + 1 for n in ran)
    assert (rounds, rows) == (needed, sum(10 + n for n in ran))
    np.testing.assert_array_equal(y, times * x * gates * up)
    np.testing.assert_array_equal(d.x, times * gates * up)
    np.testing.assert_array_equal(d.gates, times * (x * up).sum(1, keepdims=True))
    np.testing.assert_array_equal(d.weights.up, times * (x * gates).sum(0, keepdims=True))
    np.testing.assert_array_equal(d.weights.gate, 0.0 * unused)
