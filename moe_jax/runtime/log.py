"""The log files of a run, metrics.jsonl and layers.jsonl, and the sinks beside them."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_jax.runtime.files import files_below, is_remote, remove_tree, size_of
from moe_jax.runtime.sinks import Sink, board

METRICS = "metrics.jsonl"
LAYERS = "layers.jsonl"
FLUSH_SECONDS = 60.0  # between two copies of the log to a bucket
PART_BYTES = 8 * 2**20  # in a bucket, about the size after which a log file is continued in another part
BLOCK_BYTES = 2**16  # bytes read at once
COPY_BYTES = 2**20  # bytes copied at once
STEP = re.compile(rb'\{"step": (\d+)\b')  # the beginning of a line
STEP_BYTES = 32  # enough bytes of a line to match STEP


class RunLog:
    """The log files of one run, opened so that every step appears in them exactly once.

    Lines of `first_step` and later, left by a process that was killed after its last checkpoint, are removed, because
    those steps are about to be repeated. Objects in a bucket cannot be appended to: there the files are written on this
    machine, in parts, and those that changed are copied to the bucket at every `flush`, at `close`, and once a minute.
    """

    def __init__(self, workdir: Path, first_step: int, trackers: Sequence[Sink] = ()) -> None:
        """Args: trackers: what takes the same numbers, besides TensorBoard's file if its package is there."""
        self._workdir = workdir
        self._folder = Path(tempfile.mkdtemp(prefix="moe_jax_log_")) if is_remote(workdir) else workdir
        self._files = {name: _StepFile(workdir, self._folder, name, first_step) for name in (METRICS, LAYERS)}
        self._sinks = [*board(self._folder / "tensorboard", first_step, in_parts=is_remote(workdir)), *trackers]
        self._flushed = time.monotonic()
        self._there: dict[Path, tuple[int, int]] = {}  # what is in the bucket: size and modification time of each file

    def write(self, step: int, values: Mapping[str, Any], layers: Mapping[str, Any] | None = None) -> None:
        """Write a line of strict JSON for a step; non-finite numbers become null.

        Args:
            step: 0-based.
            values: name -> scalar.
            layers: name -> array [L, E], for the second file; None for a model without experts.
        """
        self._files[METRICS].write(step, {k: plain(v) for k, v in values.items()})
        if layers:
            self._files[LAYERS].write(step, {k: plain(v) for k, v in layers.items()})
        for sink in self._sinks:
            sink.write(step, values)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the line of the newest step that were not known when it was written."""
        self._files[METRICS].amend(step, {k: plain(v) for k, v in values.items()})
        for sink in self._sinks:
            sink.write(step, values)

    def picture(self, step: int, name: str, draw: Callable[[], np.ndarray]) -> None:
        """Give a picture, uint8 [height, width, 3], to the sinks; it is drawn only if there are any."""
        if self._sinks:
            pixels = draw()
            for sink in self._sinks:
                sink.picture(step, name, pixels)

    def newest(self) -> dict[str, Any]:
        """The newest line of metrics.jsonl; empty if there is none."""
        return self._files[METRICS].newest()

    def flush(self) -> None:
        """Copy everything logged so far to the workdir; call it before a checkpoint records these steps as done."""
        self._flushed = time.monotonic()
        if self._folder is self._workdir:
            return
        for file in files_below(self._folder):
            state = file.stat().st_size, file.stat().st_mtime_ns
            if self._there.get(file) != state:
                _copy(file, self._workdir / file.relative_to(self._folder))
                self._there[file] = state

    def close(self) -> None:
        """Flush and close every file."""
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()
        self.flush()
        if self._folder is not self._workdir:
            remove_tree(self._folder)


class _StepFile:
    """A log file with a line of JSON for each step; in a bucket it has parts, and only the newest part changes."""

    def __init__(self, home: Path, folder: Path, name: str, first_step: int) -> None:
        """Open it for writing in `folder`, and remove the lines of first_step and later."""
        self._home = home
        self._folder = folder
        self._most_bytes = _most_bytes(home)
        for part in parts(home / name):
            if _first_step_of(part) >= first_step and part.name != name:
                part.unlink()
        newest = (parts(home / name) or [home / name])[-1]
        self._name = name
        self._part = newest.name
        self._file: BinaryIO | None = None
        size = size_of(newest) if newest.is_file() else 0
        end = _end_before(newest, first_step) if size else 0
        if end < size or size < self._most_bytes:  # otherwise the next line begins another part
            self._open().truncate(end)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line."""
        if self._size() > self._most_bytes:
            self.close()
            name = Path(self._name)
            self._part = f"{name.stem}.{step:08d}{name.suffix}"
        self._put(self._open().seek(0, os.SEEK_END), {"step": step, **values})

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Add values to the newest line if it is of this step, else append them as a line."""
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
        """Close the file; the next line reopens it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _size(self) -> int:
        if self._file is None:
            return size_of(self._home / self._part)
        return self._file.seek(0, os.SEEK_END)

    def _open(self) -> BinaryIO:
        if self._file is None:
            remote = self._home / self._part
            local = self._folder / self._part
            if remote.is_file() and not local.is_file():
                _copy(remote, local)
            local.touch()
            self._file = open(local, "r+b")  # noqa: SIM115
        return self._file

    def _put(self, position: int, record: Mapping[str, Any]) -> None:
        """Replace the file from a position on with a record, in one write, so that a kill loses no other line."""
        file = self._open()
        file.seek(position)
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.truncate()
        file.flush()


def _most_bytes(home: Path) -> float:
    return PART_BYTES if is_remote(home) else math.inf


def parts(path: Path) -> list[Path]:
    """The files that make up a log file, in order: itself, and in a bucket its later parts (name.00001230.jsonl)."""
    later = re.compile(rf"{re.escape(path.stem)}\.\d{{8,}}{re.escape(path.suffix)}")
    files = list(path.parent.iterdir()) if path.parent.is_dir() else []
    first = [p for p in files if p.name == path.name]
    return first + sorted((p for p in files if later.fullmatch(p.name)), key=_first_step_of)


def _first_step_of(part: Path) -> int:
    """The step of a part's first line, from its name; 0 for the file without a number."""
    number = part.name.split(".")[1]
    return int(number) if number.isdigit() else 0


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as one, target.open("wb") as other:
        shutil.copyfileobj(one, other, COPY_BYTES)


def lines_from_end(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of every complete line, the last line first; holds one block in memory."""
    # of the line whose start is searched; None until the last line break is found, so an incomplete line is skipped
    end = None
    position = file.seek(0, os.SEEK_END)
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
    """Yield (start, object) of every readable line, the last line first."""
    for start, end in lines_from_end(file):
        file.seek(start)
        with contextlib.suppress(ValueError):
            record = json.loads(file.read(end - start))
            if isinstance(record, dict):
                yield start, record


def _end_before(path: Path, first_step: int) -> int:
    """The position at which a log file's lines of `first_step` and later begin; reads only the beginnings of lines."""
    if first_step == 0:
        return 0
    with path.open("rb") as file:
        for start, end in lines_from_end(file):
            file.seek(start)
            found = STEP.match(file.read(STEP_BYTES))
            if found and int(found[1]) < first_step:
                return end
    return 0


def newest(path: Path) -> dict[str, Any]:
    """The newest readable line of a log file; empty if there is none."""
    for part in reversed(parts(path)):
        with part.open("rb") as file:
            for _, record in _records_from_end(file):
                return record
    return {}


def has_evaluation(line: Mapping[str, Any], done: int) -> bool:
    """Whether a line of metrics.jsonl has the evaluation after `done` steps."""
    return line.get("step") == done - 1 and "eval/loss" in line


def set_aside(workdir: Path, first_step: int) -> Path:
    """Keep the log files as metrics.jsonl.1, ...: copies of them, or they themselves if `first_step` is 0.

    Returns:
        the name of the first file that is kept.
    """
    files = [file for name in (METRICS, LAYERS) for file in parts(workdir / name)]
    number = next(n for n in itertools.count(1) if not any(_renamed(file, n).exists() for file in files))
    for file in files:
        if first_step:  # the log continues
            _copy(file, _renamed(file, number))
        else:
            file.rename(_renamed(file, number))
    return _renamed(files[0], number)


def _renamed(file: Path, number: int) -> Path:
    return file.parent / f"{file.name}.{number}"


def plain(value: Any) -> Any:
    """A number or array as JSON: ints, floats, nested lists; None where not finite."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim:
        return [plain(v) for v in array]
    number = array.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a log file; lines that are not JSON, such as one truncated by a kill, are left out."""
    return [line for line in lines_of(path) if line is not None]


def lines_of(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield every line of a log file as an object, in order; None for a line that is not one, as after a kill."""
    for part in parts(path):
        with part.open("rb") as lines:
            for line in filter(bytes.strip, lines):
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                yield value if isinstance(value, dict) else None
