"""Work on many files at once, in processes that end with this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

A = TypeVar("A")
B = TypeVar("B")

WORTH_IT = 64 * 2**20  # bytes of input from which on processes are worth their start


class Map(Protocol):
    """`map`, with results in the order of their arguments."""

    def __call__(self, function: Callable[[A], B], arguments: Iterable[A], /) -> Iterator[B]:
        """The result of each argument."""


def number_of(processes: int, num_bytes: int) -> int:
    """How many processes to use: the given number, or for 0 one a core if the input is large, else 1."""
    return processes or (cores() if num_bytes >= WORTH_IT else 1)


def cores() -> int:
    """The number of cores that this process may use, where the system says so, else of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def each_in(processes: int) -> Iterator[Map]:
    """`map`, in this process or in `processes` others; work that has not begun when the block ends is dropped."""
    if processes < 2:
        yield map
        return
    threads = max(1, cores() // processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin, (threads,)) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    """What a worker does first: it leaves signals to its parent, and ends when that is killed."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the library that tokenizes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)  # otherwise it would write on, while the command is repeated
