"""Compute the next results while the current one is used."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
DEPTH = 2  # with one result ready, the next one is computed without waiting for the caller


def prefetched(make: Callable[[int], T], first: int, last: int, depth: int = DEPTH) -> Iterator[tuple[int, T]]:
    """Yield (n, make(n)) for every n from `first` to before `last`, computing `depth` of them ahead in another thread.

    Args:
        make: called exactly once for every n, in order.
        first: the first n.
        last: one more than the last n.
        depth: at least 1; the number of results held beside the one in use.

    Raises:
        the exception that `make(n)` raised, when n is due.
    """
    with ThreadPoolExecutor(1, "data") as pool:
        ahead = collections.deque(pool.submit(make, n) for n in range(first, min(first + depth, last)))
        for n in range(first, last):
            result = ahead.popleft().result()
            if n + depth < last:
                ahead.append(pool.submit(make, n + depth))
            yield n, result
