"""Laws of prefetching: the same results in the same order, computed ahead, and none beyond the end."""

import threading

import pytest

from conftest import HANG_SECONDS
from moe_jax.runtime.prefetch import prefetched


@pytest.mark.parametrize(("first", "last"), [(0, 0), (3, 3), (0, 1), (2, 9)])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_result_is_computed_once_and_in_order(first, last, depth):
    asked = []

    def make(n):
        asked.append(n)
        return n * n

    assert list(prefetched(make, first, last, depth)) == [(n, n * n) for n in range(first, last)]
    assert asked == list(range(first, last))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_results_are_computed_while_one_is_used(depth):
    made = threading.Semaphore(0)
    numbers = prefetched(lambda n: made.release(), 0, 100, depth)
    next(numbers)
    for _ in range(1 + depth):
        assert made.acquire(timeout=HANG_SECONDS)
    numbers.close()  # waits for what is under way
    assert not made.acquire(blocking=False)  # and no more


def test_a_failure_is_raised_when_its_number_is_due():
    def make(n):
        return 1 / (2 - n)

    numbers = prefetched(make, 0, 5)
    assert [next(numbers), next(numbers)] == [(0, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(numbers)
