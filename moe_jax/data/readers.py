"""The documents of an input file: text, lines of JSON, either of them compressed, and tables of Parquet or Arrow."""

import bz2
import codecs
import gzip
import importlib.util
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from moe_jax.data.sources import ARCHIVES, LINES, Options, compression, has_lines, is_table
from moe_jax.data.spans import Piece, check_text, decode, keys_of, read_row

ROWS_AT_ONCE = 1024  # of a table
ARROW_FILE = b"ARROW1"  # how a file begins that is no stream
READ_BYTES = 2**20  # expanded at once
# what the libraries raise for a file that is damaged or truncated; pyarrow's errors are ValueErrors or OSErrors
DAMAGED = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


def read_documents(options: Options, name: str, digest: Any) -> Iterator[Piece]:
    """Reads a file's documents one at a time.

    Args:
        options: see the flags of `prepare`.
        name: the file, relative to the input folder.
        digest: a hashlib object, updated with the file's expanded bytes without a byte order mark, or with the texts of
            a table.

    Yields:
        Its documents; a bad one has a `problem` and no text.
    """
    path = options.input / name
    if problem := _unreadable(path):
        yield Piece(name, "", problem)
        return
    read = _read_table if is_table(name) else _read_lines if has_lines(name) else _read_text
    number = 0
    try:
        for piece in read(path, name, options, digest):
            number += 1
            yield piece
    except DAMAGED as error:
        if not (is_table(name) or compression(name)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        after = f" after {number} documents" if number else ""
        yield Piece(name, "", f"is damaged{after} ({reason})")
        return
    if not number:
        yield Piece(name, "", "is empty")


def _unreadable(path: Path) -> str:
    """Why a file cannot be read as text, as far as that is known without opening it: opening a pipe may never end."""
    if path.name.lower().endswith(ARCHIVES):
        return "is an archive; unpack it first"
    if path.is_symlink() and not path.exists():
        return "is a link to a file that does not exist"
    if not path.is_file():
        return "is a pipe, a socket or a device, and no file"
    if (is_table(path.name) or compression(path.name) in BY_ARROW) and importlib.util.find_spec("pyarrow") is None:
        return "needs pyarrow, which is not installed; run pip install 'moe_jax[arrow]'"
    return "" if os.access(path, os.R_OK) else "cannot be read with your permissions"


# --- text and lines -------------------------------------------------------------------------------------------


def _by_arrow(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=BY_ARROW[compression(path.name)]), READ_BYTES)


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BY_ARROW = {".zst": "zstd", ".lz4": "lz4"}  # what Python's own library does not expand in all supported versions


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    """The bytes of a file, expanded."""
    packed = compression(path.name)
    if packed in BY_ARROW:
        return _by_arrow(path)
    return OPENERS[packed](path) if packed else open(path, "rb")


def _read_text(path: Path, name: str, options: Options, digest: Any) -> Iterator[Piece]:
    flag, key = next(iter(keys_of(options).items()))
    if flag != "text_key" or options.weight_key:
        yield Piece(name, "", f"is text, without a field for --{flag}={key}; leave it out with --include='*.jsonl'")
        return
    with _open(path) as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    digest.update(data)
    yield check_text(name, data, *decode(data))


def _read_lines(path: Path, name: str, options: Options, digest: Any) -> Iterator[Piece]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            own = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if own:
                digest.update(own)
                yield _read_line(f"{name}:{number}", own, options)


def _read_line(where: str, line: bytes, options: Options) -> Piece:
    text, problem = decode(line)
    if problem:
        return Piece(where, "", problem)
    if not text.strip():
        return Piece(where, "", "is an empty line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Piece(where, "", f"is not JSON ({error}), as every line of a {', '.join(LINES)} file must be")
    return read_row(where, value, options, needs="must be a JSON object with")


# --- tables ---------------------------------------------------------------------------------------------------


def _read_table(path: Path, name: str, options: Options, digest: Any) -> Iterator[Piece]:
    """The rows of a table; each updates the digest with the length and the content of what is read of it."""
    keys = keys_of(options)
    with open(path, "rb") as file:
        columns, batches = _batches(file, name, list(keys.values()))
        for flag, key in keys.items():
            if key not in columns:
                yield Piece(name, "", f"has no column '{key}', only {', '.join(columns)}; give --{flag}=COLUMN")
                return
        number = 0
        for batch in batches:
            for values in zip(*(batch.column(key).to_pylist() for key in keys.values()), strict=True):
                number += 1
                row = dict(zip(keys.values(), values, strict=True))
                piece = read_row(f"{name}:{number}", row, options)
                if not piece.problem:
                    data = (piece.text if list(keys) == ["text_key"] else json.dumps(values, default=repr)).encode()
                    digest.update(len(data).to_bytes(8, "little") + data)
                yield piece


def _batches(file: BinaryIO, name: str, keys: Sequence[str]) -> tuple[list[str], Iterator[Any]]:
    """The names of a table's columns, and its rows, of which only the columns of `keys` are read from Parquet."""
    if name.lower().endswith(".parquet"):
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        return names, table.iter_batches(ROWS_AT_ONCE, columns=[key for key in keys if key in names])
    from pyarrow import ipc

    is_file = file.read(len(ARROW_FILE)) == ARROW_FILE  # otherwise a stream, as datasets writes it
    file.seek(0)
    if is_file:
        table = ipc.open_file(file)
        return table.schema.names, (table.get_batch(number) for number in range(table.num_record_batches))
    stream = ipc.open_stream(file)
    return stream.schema.names, iter(stream)
