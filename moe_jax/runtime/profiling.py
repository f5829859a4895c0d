"""A trace of some steps, in files that Perfetto and XProf open."""

import tempfile
from pathlib import Path

import jax

from moe_jax.runtime import processes
from moe_jax.runtime.files import copy_tree, is_remote, remove_tree

STEP = "train"  # the viewers' name of a step
LEAD = 2  # steps of an attempt before the trace: the first compiles, and the second may still be slow


class Profiler:
    """Traces the steps from `first` to before `last` in process 0; none if the two are equal."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        """Args: folder: created if absent; gets plugins/profile/<time>/ with perfetto_trace.json.gz."""
        self._folder = folder
        self._first = first
        self._last = last
        self._local: Path | None = None  # the folder of the trace that is under way

    def before(self, step: int) -> None:
        """Start the trace if this step is the first to trace; to be called before every step."""
        if step == self._first < self._last and processes.index() == 0:
            self._start()

    def is_last(self, step: int) -> bool:
        """Whether the trace is complete once this step is finished, so that `close` must be called."""
        return self.is_tracing and step + 1 == self._last

    @property
    def is_tracing(self) -> bool:
        """Whether a trace is under way."""
        return self._local is not None

    def close(self) -> None:
        """Write the trace that is under way, if there is one."""
        if self._local is None:
            return
        local = self._local
        self._local = None
        jax.profiler.stop_trace()
        if local != self._folder:
            copy_tree(local, self._folder)
            remove_tree(local)

    def _start(self) -> None:
        self._local = Path(tempfile.mkdtemp(prefix="moe_jax_profile_")) if is_remote(self._folder) else self._folder
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the thousands of Python calls of a step would hide its operations
        jax.profiler.start_trace(self._local, create_perfetto_trace=True, profiler_options=options)


def named(step: int) -> jax.profiler.StepTraceAnnotation:
    """An annotation around the call of the train step, by which viewers separate steps; free without a trace."""
    return jax.profiler.StepTraceAnnotation(STEP, step_num=step)


def steps_to_trace(count: int, first: int, last: int) -> tuple[int, int]:
    """(start, stop) of the `count` steps to trace, in an attempt that does the steps from `first` to before `last`.

    Raises:
        ValueError: the attempt has too few steps.
    """
    if count and first + LEAD + count > last:
        raise ValueError(
            f"--profile={count} must leave {LEAD} steps before it, and this start has {max(0, last - first)} to do; "
            "trace fewer steps, or train more."
        )
    return first + LEAD, first + LEAD + count
