"""Signals that end a run: noted when they arrive, handled between two steps."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moe_jax.runtime import processes

# from clusters, from Ctrl-C, from a terminal that was closed, and from Slurm with --signal=USR1@60
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
Stopped = Callable[[], int | None]  # () -> the signal that ends the run, None while none has arrived


class Abandoned(Exception):
    """Raised where work is left unfinished because a signal ends the run; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"left unfinished because of {signal.Signals(number).name}")
        self.number = number


def never() -> None:
    """A `Stopped` for which no signal ever arrives."""


def can_be_noted() -> bool:
    """Whether this is the main thread, the only one in which Python allows signal handlers."""
    return threading.current_thread() is threading.main_thread()


@contextmanager
def noted() -> Iterator[Stopped]:
    """Note signals while the block runs, instead of ending the process; yields `stopped`, which returns the first one.

    Several processes must end after the same step. JAX's preemption service chooses it: the service catches SIGTERM
    (its handler stays), and the other signals are passed on to it as SIGTERM. It counts the calls of `stopped` and
    chooses one of them for all processes, so all must call it equally often and in the same places.

    Outside the main thread the surrounding program keeps its handlers. A SIGHUP that is ignored (`nohup`) stays
    ignored.
    """
    caught: list[int] = []
    calls = itertools.count()
    many = processes.count() > 1

    def note(number: int, _: Any) -> None:
        caught.append(number)

    def pass_on(_: int, __: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stopped() -> int | None:
        if many and not caught and _all_agree(next(calls)):
            caught.append(signal.SIGTERM)
        return caught[0] if caught else None

    kinds = [kind for kind in ENDING if not (many and kind == signal.SIGTERM)] if can_be_noted() else []
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        kinds = [kind for kind in kinds if kind != signal.SIGHUP]
    before = {kind: signal.signal(kind, pass_on if many else note) for kind in kinds}
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _all_agree(call: int) -> bool:
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(call)
