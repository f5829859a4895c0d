"""The next things are made while the present one is used."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


DEPTH = 2  # one that is being made does not wait for one that is slow to be fetched


def prefetched(make: Callable[[int], T], first: int, last: int, depth: int = DEPTH) -> Iterator[tuple[int, T]]:
    """(n, make(n)) for every n from `first` to before `last`, `depth` of them made ahead in a thread of their own.

    Args:
        make: called once for every n, in order, never for another.
        depth: at least 1; so many results are held beside the one in use.

    Raises:
        whatever `make(n)` raises, when n is due.
    """
    with ThreadPoolExecutor(1, "data") as pool:
        ahead = collections.deque(pool.submit(make, n) for n in range(first, min(first + depth, last)))
        for n in range(first, last):
            result = ahead.popleft().result()
            if n + depth < last:
                ahead.append(pool.submit(make, n + depth))
            yield n, result
