"""What a run tells while it works: metrics.jsonl, layers.jsonl, TensorBoard, and a progress bar or plain lines."""

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.files import copy_tree, is_remote, remove_tree, write_whole

FLUSH_SECONDS = 60.0
METRICS, LAYERS = "metrics.jsonl", "layers.jsonl"


class RunLog:
    """The log files of one run, opened so that every step appears in them exactly once.

    Lines of `first_step` and later, left by a process that was killed after its last checkpoint, are
    dropped: those steps are about to be done again. A bucket cannot be appended to: there the files are written
    on this machine, and put into the bucket whole at every `flush`, at `close`, and once a minute.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._workdir = workdir
        self._folder = Path(tempfile.mkdtemp(prefix="moe_jax_log_")) if is_remote(workdir) else workdir
        there = {name: read_jsonl(workdir / name) for name in (METRICS, LAYERS)}
        self.former: dict[str, Any] = there[METRICS][-1] if there[METRICS] else {}  # the newest line there was
        self._files = {name: _reopen(there[name], self._folder / name, first_step) for name in there}
        self._board = _tensorboard(self._folder / "tensorboard", first_step)
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, Any], layers: Mapping[str, Any] | None = None) -> None:
        """One strict-JSON object a step: non-finite numbers are null.

        Args:
            step: 0-based.
            values: name -> scalar.
            layers: name -> array [L, E], for the second file; None for a model without experts.
        """
        self._line(METRICS, {"step": step, **{k: plain(v) for k, v in values.items()}})
        if layers:
            self._line(LAYERS, {"step": step, **{k: plain(v) for k, v in layers.items()}})
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, float(value), step)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _line(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps(record, allow_nan=False) + "\n")
        self._files[name].flush()

    def flush(self) -> None:
        """Everything logged so far is in the workdir: due before a checkpoint says that these steps are done."""
        self._flushed = time.monotonic()
        if self._folder is not self._workdir:
            copy_tree(self._folder, self._workdir)

    def close(self) -> None:
        """Flush and close every file."""
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        self.flush()
        if self._folder is not self._workdir:
            remove_tree(self._folder)


def plain(value: Any) -> Any:
    """A number or array as JSON: ints, floats, nested lists; null where not finite."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim:
        return [plain(v) for v in array]
    number = array.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a log file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):  # only a killed writer leaves half a line
            records.append(json.loads(line))
    return records


def _reopen(records: list[dict[str, Any]], path: Path, first_step: int) -> Any:
    """The file at `path` for appending, with the records before `first_step`; replaced in one move."""
    kept = [r for r in records if r["step"] < first_step]
    write_whole(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept))
    return open(path, "a")


def _tensorboard(directory: Path, first_step: int) -> Any:
    """A TensorBoard writer if the `tensorboard` extra is installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=first_step)


class Display:
    """Tells a person how far the run is: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self._console = Console(file=sys.stdout)
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
        """`done` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a logged step."""
        if self._bar is not None:
            self._bar.update(self._task, note=summary_line(values, SHORT))
        elif not self._quiet:
            self.say(f"{self._name} step {step}/{self._total}  {summary_line(values, LONG)}")

    def say(self, message: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        elif not self._quiet:
            print(message, flush=True)


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


def summary_line(values: Mapping[str, Any], shown: Mapping[str, str]) -> str:
    """The few numbers a person watches, those that there are."""
    return "  ".join(text.format(float(values[k])) for k, text in shown.items() if values.get(k) is not None)
