"""What a run says of itself: metrics.jsonl, layers.jsonl, TensorBoard, and a progress bar or plain lines."""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_jax.runtime.files import is_remote, remove_tree, size_of, tree

FLUSH_SECONDS = 60.0


METRICS, LAYERS = "metrics.jsonl", "layers.jsonl"


PART_BYTES = 8 * 2**20  # in a bucket a log file is put there in parts of about this size


BOARD_SCALARS = 10**5  # and TensorBoard's file after so many numbers


BLOCK_BYTES = 2**16


STEP = re.compile(rb'\{"step": (\d+)\b')  # how a line begins


class RunLog:
    """The log files of one run, opened so that every step appears in them exactly once.

    Lines of `first_step` and later, left by a process that was killed after its last checkpoint, are
    dropped: those steps are about to be done again. A bucket cannot be appended to: there the files are written
    on this machine, in parts, and those that changed are put into the bucket at every `flush`, at `close`, and once a
    minute.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._workdir = workdir
        self._folder = Path(tempfile.mkdtemp(prefix="moe_jax_log_")) if is_remote(workdir) else workdir
        self._files = {name: _StepFile(workdir, self._folder, name, first_step) for name in (METRICS, LAYERS)}
        self._board = _Board(self._folder / "tensorboard", first_step, in_parts=is_remote(workdir))
        self._flushed = time.monotonic()
        self._there: dict[Path, tuple[int, int]] = {}  # what is in the bucket: a file's size and time of change

    def write(self, step: int, values: Mapping[str, Any], layers: Mapping[str, Any] | None = None) -> None:
        """One strict-JSON object a step: non-finite numbers are null.

        Args:
            step: 0-based.
            values: name -> scalar.
            layers: name -> array [L, E], for the second file; None for a model without experts.
        """
        self._files[METRICS].write(step, {k: plain(v) for k, v in values.items()})
        if layers:
            self._files[LAYERS].write(step, {k: plain(v) for k, v in layers.items()})
        self._board.write(step, values)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to what was logged of a step, the newest in the log: what is known of it only later."""
        self._files[METRICS].amend(step, {k: plain(v) for k, v in values.items()})
        self._board.write(step, values)

    def newest(self) -> dict[str, Any]:
        """The newest line of metrics.jsonl; empty where there is none."""
        return self._files[METRICS].newest()

    def flush(self) -> None:
        """Everything logged so far is in the workdir: due before a checkpoint says that these steps are done."""
        self._flushed = time.monotonic()
        if self._folder is self._workdir:
            return
        for file in tree(self._folder):
            state = file.stat().st_size, file.stat().st_mtime_ns
            if self._there.get(file) != state:
                _copy(file, self._workdir / file.relative_to(self._folder))
                self._there[file] = state

    def close(self) -> None:
        """Flush and close every file."""
        for file in self._files.values():
            file.close()
        self._board.close()
        self.flush()
        if self._folder is not self._workdir:
            remove_tree(self._folder)


class _StepFile:
    """A file of JSON lines, one a step: as a whole, or in a bucket in parts, of which only the newest changes."""

    def __init__(self, home: Path, folder: Path, name: str, first_step: int) -> None:
        """Open it for writing in `folder`, without the lines of first_step and later."""
        self._home, self._folder, self._most_bytes = home, folder, _most_bytes(home)
        for part in parts(home / name):
            if _first_step_of(part) >= first_step and part.name != name:
                part.unlink()
        newest = (parts(home / name) or [home / name])[-1]
        self._name, self._part = name, newest.name
        self._file: BinaryIO | None = None
        size = size_of(newest) if newest.is_file() else 0
        end = _end_before(newest, first_step) if size else 0
        if end < size or size < self._most_bytes:  # else it is left where it is, and the next line begins a part
            self._open().truncate(end)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        if self._size() > self._most_bytes:
            self.close()
            name = Path(self._name)
            self._part = f"{name.stem}.{step:08d}{name.suffix}"
        self._put(self._open().seek(0, os.SEEK_END), {"step": step, **values})

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the newest line if it is of this step; else append them as a line of it."""
        file = self._open()
        start, record = next(_records_from_end(file), (0, {}))
        if record.get("step") == step:
            self._put(start, record | dict(values))
        else:
            self.write(step, values)

    def newest(self) -> dict[str, Any]:
        """The newest line."""
        return newest((self._home if self._file is None else self._folder) / self._part)

    def close(self) -> None:
        """Close it; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _size(self) -> int:
        if self._file is None:
            return size_of(self._home / self._part)
        return self._file.seek(0, os.SEEK_END)

    def _open(self) -> BinaryIO:
        if self._file is None:
            there, here = self._home / self._part, self._folder / self._part
            if there.is_file() and not here.is_file():
                _copy(there, here)
            here.touch()
            self._file = open(here, "r+b")  # noqa: SIM115
        return self._file

    def _put(self, position: int, record: Mapping[str, Any]) -> None:
        """Have the file end with a record from a position on; in one write, so that a kill loses no other line."""
        file = self._open()
        file.seek(position)
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.truncate()
        file.flush()


def _most_bytes(home: Path) -> float:
    return PART_BYTES if is_remote(home) else math.inf


def parts(path: Path) -> list[Path]:
    """The files that make up a log file, in order: itself, and what a bucket has after it (name.00001230.jsonl)."""
    later = re.compile(rf"{re.escape(path.stem)}\.\d{{8,}}{re.escape(path.suffix)}")
    there = list(path.parent.iterdir()) if path.parent.is_dir() else []
    return [p for p in there if p.name == path.name] + sorted(
        (p for p in there if later.fullmatch(p.name)), key=_first_step_of
    )


def _first_step_of(part: Path) -> int:
    """The step of a part's first line; that of the file without a number is 0."""
    number = part.name.split(".")[1]
    return int(number) if number.isdigit() else 0


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as one, target.open("wb") as other:
        shutil.copyfileobj(one, other, 2**20)


def lines_from_end(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, end) of every whole line, the last first, with a block in memory; half a line at the end is left out."""
    end, position = None, file.seek(0, os.SEEK_END)
    while position:
        begin = max(0, position - BLOCK_BYTES)
        file.seek(begin)
        block = file.read(position - begin)
        cut = len(block)
        while (cut := block.rfind(b"\n", 0, cut)) >= 0:
            if end is not None:
                yield begin + cut + 1, end
            end = begin + cut + 1
        position = begin
    if end is not None:
        yield 0, end


def _records_from_end(file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """(start, object) of every readable line, the last first."""
    for start, end in lines_from_end(file):
        file.seek(start)
        with contextlib.suppress(ValueError):
            record = json.loads(file.read(end - start))
            if isinstance(record, dict):
                yield start, record


def _end_before(path: Path, first_step: int) -> int:
    """Where a log file's lines of `first_step` and later begin, in bytes; no line is read further than its step."""
    if first_step == 0:
        return 0
    with path.open("rb") as file:
        for start, end in lines_from_end(file):
            file.seek(start)
            found = STEP.match(file.read(32))
            if found and int(found[1]) < first_step:
                return end
    return 0


def newest(path: Path) -> dict[str, Any]:
    """The newest readable line of a log file; empty where there is none."""
    for part in reversed(parts(path)):
        with part.open("rb") as file:
            for _, record in _records_from_end(file):
                return record
    return {}


def has_evaluation(line: Mapping[str, Any], done: int) -> bool:
    """Whether a line of metrics.jsonl is that of the evaluation after so many steps."""
    return line.get("step") == done - 1 and "eval/loss" in line


def set_aside(workdir: Path, first_step: int) -> Path:
    """Keep the log files under other names (metrics.jsonl.1, ...), and go on with what precedes `first_step`.

    Returns:
        the first of the names.
    """
    files = [file for name in (METRICS, LAYERS) for file in parts(workdir / name)]
    number = next(n for n in itertools.count(1) if not any(_aside(file, n).exists() for file in files))
    for file in files:
        file.rename(_aside(file, number))
        if first_step:
            _copy(_aside(file, number), file)
    return _aside(files[0], number)


def _aside(file: Path, number: int) -> Path:
    return file.parent / f"{file.name}.{number}"


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
    return [line for line in lines_of(path) if line is not None]


def lines_of(path: Path) -> Iterator[dict[str, Any] | None]:
    """Every line of a log file as an object, in order; None for one that is none, as a killed writer leaves."""
    for part in parts(path):
        with part.open("rb") as lines:
            for line in filter(bytes.strip, lines):
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                yield value if isinstance(value, dict) else None


class _Board:
    """TensorBoard's file of the same numbers, if the `tensorboard` extra is installed; in a bucket in parts as well."""

    def __init__(self, folder: Path, first_step: int, in_parts: bool) -> None:
        self._folder, self._in_parts, self._written = folder, in_parts, 0
        self._writer = _summary_writer(folder, purge_step=first_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a step."""
        if self._writer is None:
            return
        if self._in_parts and self._written > BOARD_SCALARS:
            self._writer.close()
            self._writer, self._written = _summary_writer(self._folder), 0
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, float(value), step)
        self._written += len(values)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _summary_writer(folder: Path, **options: Any) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), **options)


class Display:
    """Shows a person how far the run is: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str, total: int, quiet: bool = False) -> None:
        self._output = cast(IO[str], _Output(sys.stdout))  # as much of a file as is needed
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
        """`done` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def report(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a logged step."""
        if self._bar is None:
            self.say(f"{self._name} step {step}/{self._total}  {summary_line(values, LONG)}")
        elif note := summary_line(values, SHORT):
            self._bar.update(self._task, note=note)

    def say(self, message: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, highlight=False, markup=False)
        elif not self._quiet:
            print(message, file=self._output, flush=True)


class _Output:
    """A stream to a person, who may leave: a terminal that was closed, or a pipe without a reader, ends no run."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a file does, while someone reads."""
        with self._while_read():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a file does, while someone reads."""
        with self._while_read():
            self._stream.flush()

    @contextlib.contextmanager
    def _while_read(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)  # for what the stream still holds, and for all that follows
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


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
