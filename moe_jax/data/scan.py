"""The first reading of `prepare`: documents are read and checked, and it is decided which are held out."""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data.progress import progress
from moe_jax.data.sources import LINES, Options, Source, has_lines, is_packed, printable

MAX_PROBLEMS = 20
RANK_BYTES = 8  # of the hash that decides a document's split


class Piece(NamedTuple):
    """A document as found: where ("folder/file" or "folder/file:line"), and its text or what is wrong."""

    where: str
    text: str
    problem: str = ""


@dataclass(frozen=True)
class DomainPlan:
    """A domain after the first reading: its files, and the hash below which a document is held out."""

    name: str
    sources: tuple[Source, ...]
    threshold: int


def scan(options: Options, domains: dict[str, list[Source]]) -> list[DomainPlan]:
    """Reads and checks every document, hashes every file, and decides the splits.

    Args:
        options: see the flags of `prepare`.
        domains: what `find_sources` found.

    Returns:
        One plan a domain, in order.

    Raises:
        ValueError: bad documents, up to 20 of them named one a line; or a domain with fewer than two documents.
    """
    problems: list[str] = []
    plans = []
    total = sum(source.bytes for sources in domains.values() for source in sources)
    with progress("checking", total) as advance:
        for domain, sources in domains.items():
            plans.append(_scan_domain(options, domain, sources, problems, advance))
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        more = f" (the first {MAX_PROBLEMS}; there may be more)" if len(problems) >= MAX_PROBLEMS else ""
        lines = [f"--input={options.input} has bad documents; correct or remove them{more}:", *problems[:MAX_PROBLEMS]]
        raise ValueError("\n".join(lines))
    return plans


def _scan_domain(
    options: Options,
    domain: str,
    sources: Sequence[Source],
    problems: list[str],
    advance: Callable[[int], None],
) -> DomainPlan:
    """Reads one domain; adds to `problems` what is wrong in it, up to MAX_PROBLEMS."""
    smallest, largest = 2 ** (8 * RANK_BYTES), -1
    read: list[Source] = []
    count = 0
    for source in sources:
        digest = hashlib.sha256()
        for piece in read_documents(options, source.name, digest):
            if piece.problem:
                problems.append(f"{printable(piece.where)}: {piece.problem}")
            if len(problems) >= MAX_PROBLEMS:
                return DomainPlan(domain, (), 0)
            rank = document_rank(piece.where)
            smallest = min(smallest, rank)
            largest = max(largest, rank)
            count += 1
        read.append(dataclasses.replace(source, sha256=digest.hexdigest()))
        advance(source.bytes)
    if count < 2 and not problems:
        raise ValueError(
            f"Domain '{domain}' has {count} document and must have at least 2, one to train on and one to hold out; "
            "add documents to it or move its file to another domain."
        )
    fraction = int(options.validation_fraction * 2 ** (8 * RANK_BYTES))
    # The document of smallest rank is always held out, and that of largest rank never.
    return DomainPlan(domain, tuple(read), min(max(fraction, smallest + 1), largest))


def document_rank(where: str) -> int:
    """A uniform number in 0..2**64-1, fixed by a document's name; below the threshold it is held out."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(where), digest_size=RANK_BYTES).digest(), "big")


def read_documents(options: Options, name: str, digest: Any) -> Iterator[Piece]:
    """Reads a file's documents one at a time.

    Args:
        options: see the flags of `prepare`.
        name: the file, relative to the input folder.
        digest: a hashlib object, updated with the file's bytes, without a byte order mark.

    Yields:
        Its documents; a bad one has a `problem` and no text.
    """
    path = options.input / name
    if problem := _unreadable(path):
        yield Piece(name, "", problem)
        return
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        if not has_lines(name):
            data = file.read()
            digest.update(data)
            yield _check_text(name, data, *_decode(data))
            return
        number = 0
        for number, line in enumerate(file, 1):
            digest.update(line)
            yield _read_line(f"{name}:{number}", line, options.text_key)
        if not number:
            yield Piece(name, "", "is empty")


def _unreadable(path: Path) -> str:
    """Why a file cannot be read as text, as far as that is known without opening it: opening a pipe may never end."""
    if is_packed(path.name):
        return "is compressed; unpack it first"
    if path.is_symlink() and not path.exists():
        return "is a link to a file that does not exist"
    if not path.is_file():
        return "is a pipe, a socket or a device, and no file"
    return "" if os.access(path, os.R_OK) else "cannot be read with your permissions"


def _decode(data: bytes) -> tuple[str, str]:
    """The text, and what is wrong with it."""
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 (byte {error.start}, line {_line_number(data, error.start)})"


def _line_number(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1


def _check_text(where: str, data: bytes, text: str, problem: str) -> Piece:
    if b"\0" in data:
        problem = f"has a NUL byte (line {_line_number(data, data.index(0))}): it is not text"
    if not problem and not text.strip():
        problem = "is empty"
    return Piece(where, "" if problem else text, problem)


def _read_line(where: str, line: bytes, text_key: str) -> Piece:
    text, problem = _decode(line)
    if problem:
        return Piece(where, "", problem)
    if not text.strip():
        return Piece(where, "", "is an empty line")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Piece(where, "", f"is not JSON ({error}), as every line of a {', '.join(LINES)} file must be")
    if not isinstance(value, dict) or not isinstance(value.get(text_key), str):
        return Piece(where, "", f"must be a JSON object with a string under '{text_key}' (see --text_key)")
    try:
        data = value[text_key].encode("utf-8")
    except UnicodeEncodeError as error:
        return Piece(where, "", f"has half a surrogate pair (character {error.start} of its text)")
    return _check_text(where, data, value[text_key], "")
