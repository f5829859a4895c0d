"""Bars that count bytes: one display, to which work within work adds its own line."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_outer: ContextVar[tuple[Any, Any] | None] = ContextVar("outer", default=None)  # the display, and its first bar


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one plain line elsewhere; yields the function that adds bytes.

    Within another `progress` the bar is a line below the first one, and what it counts is counted there as well.
    """
    if not sys.stdout.isatty():
        print(f"{title}: {total} bytes", flush=True)
        yield lambda count: None
    elif found := _outer.get():
        bar, first = found
        task = bar.add_task(f"  {title}", total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)
            bar.advance(first, count)

        yield advance
        bar.remove_task(task)
    else:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(title, total=total)
            token = _outer.set((bar, task))
            try:
                yield lambda count: bar.advance(task, count)
                bar.update(task, completed=total)  # what works within each other is estimated
            finally:
                _outer.reset(token)
