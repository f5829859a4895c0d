"""Show the progress of a run: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# name of a value -> its format, beside the bar (SHORT) and in plain lines (LONG)
SHORT = {"bits_per_byte": "bits/byte {:.2f}", "moe/max_violation": "violation {:.2f}"}
LONG = {
    "loss": "loss {:.3f}",
    "bits_per_byte": "bits/byte {:.3f}",
    "moe/max_violation": "max violation {:.2f}",
    "moe/dead_experts": "dead {:.0f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "gflops_per_second": "{:,.1f} GFLOP/s",
    "mfu": "MFU {:.1%}",
    "eval/bits_per_byte": "held-out bits/byte {:.3f}",
}


class Display:
    """Shows the progress of a run."""

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self._output = cast(IO[str], _Output(sys.stdout))  # has the methods of a file that are used
        self._console = Console(file=self._output)
        self._quiet = quiet
        self._total = total
        self._bar: Progress | None = None
        self._name = name
        self._task: Any = None

    @contextlib.contextmanager
    def running(self, done: int) -> Iterator["Display"]:
        """Show the bar while the block runs."""
        if self._quiet or not self._console.is_terminal:
            yield self
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as bar:
            self._bar = bar
            self._task = bar.add_task(self._name, total=self._total, completed=done, note="compiling")
            yield self
        self._bar = None

    def step(self, done: int) -> None:
        """Show that `done` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers of a logged step."""
        if self._bar is None:
            self.say(f"{self._name} step {step}/{self._total}  {summary_line(values, LONG)}")
        elif note := summary_line(values, SHORT):
            self._bar.update(self._task, note=note)

    def say(self, message: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        elif not self._quiet:
            print(message, file=self._output, flush=True)


class _Output:
    """A stream whose reader may disappear: a closed terminal or a pipe without a reader does not end the run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as a file does; once the reader has disappeared, do nothing."""
        with self._ignoring_lost_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as a file does; once the reader has disappeared, do nothing."""
        with self._ignoring_lost_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _ignoring_lost_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)  # takes what the stream has buffered, and all further output
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def summary_line(values: Mapping[str, Any], formats: Mapping[str, str]) -> str:
    """The values that have a format, on one line."""
    return "  ".join(text.format(float(values[k])) for k, text in formats.items() if values.get(k) is not None)
