"""Laws of smoothing in pictures."""

import numpy as np

from moe_jax.runtime.pictures import smooth


def test_smoothing_keeps_a_steep_start_steep():
    # over steps 0, 1, 1 to 3, 2 to 4 and, where there is no later one, 2 to 4
    drawn = smooth(np.asarray([1.0, 2, 6, 4, 0]), 4)
    np.testing.assert_allclose(drawn, [1, 2, 4, 10 / 3, 10 / 3])


def test_smoothing_keeps_a_constant_and_skips_nan():
    values = np.asarray([[2.0, 2, np.nan, 2, 2, 2], [np.nan, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(smooth(values, 3), [[2.0] * 6, [np.nan, *[1.0] * 5]])
