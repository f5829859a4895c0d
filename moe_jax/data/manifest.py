"""The manifest of a corpus folder: which files it has, their sizes and sha256, and which tokenizer their ids are of.

Legend: N tokens, D documents.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer, token_dtype
from moe_jax.data.vocabularies import get_tokenizer
from moe_jax.runtime.files import read_json, sha256_of

SPLITS = ("train", "validation")
PARTS = ("tokens", "offsets")
WEIGHTS = "weights"  # a part that only streams have in which some token counts otherwise than once
MANIFEST = "manifest.json"
FORMAT = "moe_jax corpus"
EMBEDDED_FORMAT = "moe_jax embedded corpus"
VERSION = 1
VERSION_WITH_WEIGHTS = 2  # which programs that know none must not train on
OFFSET_DTYPE = np.dtype("<i8")
WEIGHT_DTYPE = np.dtype("<f2")
TOKENIZER_FOLDER = "tokenizer"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a domain, and of a file in the folder
REPAIR = "prepare it again with python -m moe_jax.data.prepare --overwrite, or copy it again."


@dataclass(frozen=True)
class File:
    """A file as its manifest describes it: path, bytes, sha256 (hex)."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a prepared folder, checked.

    Args:
        folder: the folder it is in.
        tokenizer: what the token ids mean.
        domains: names, in order.
        files: (split, domain, part) -> File, for both of PARTS and for WEIGHTS where there are any.
        counts: (split, domain) -> (N, D).
        fingerprint: as of the opened `Corpus`.
    """

    folder: Path
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    files: Mapping[tuple[str, str, str], File]
    counts: Mapping[tuple[str, str], tuple[int, int]]
    fingerprint: str


def read_prepared(folder: Path) -> Manifest:
    """Reads the manifest of a folder written by `moe_jax.data.prepare`.

    Raises:
        FileNotFoundError: the folder, its manifest or a file of its tokenizer is missing.
        ValueError: the manifest is damaged or of another version, or its tokenizer is damaged.
    """
    raw = _read_manifest(folder, FORMAT)
    tokenizer = _read_tokenizer(folder, raw)
    domains = _field(folder, raw, "domains", dict)
    if not domains:
        raise ValueError(f"data.path={folder}: {MANIFEST} lists no domain and must list at least one; {REPAIR}")
    files: dict[tuple[str, str, str], File] = {}
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for domain, splits in domains.items():
        for split in SPLITS:
            entry = _field(folder, splits, split, dict)
            parts = {part: _file(folder, _field(folder, entry, part, dict)) for part in parts_of(entry)}
            files |= {(split, domain, part): file for part, file in parts.items()}
            counts[split, domain] = _counts(folder, entry, parts, tokenizer)
    _check_version(folder, raw, version_of(domains))
    found = _fingerprint_of_prepared(raw["tokenizer"], files)
    return Manifest(folder, tokenizer, tuple(domains), files, counts, found)


def parts_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of which a split's entry lists a file."""
    return (*PARTS, WEIGHTS) if WEIGHTS in entry else PARTS


def version_of(domains: Mapping[str, Any]) -> int:
    """The version of a manifest with these entries."""
    weighted = any(WEIGHTS in splits[split] for splits in domains.values() for split in SPLITS)
    return VERSION_WITH_WEIGHTS if weighted else VERSION


def part_dtypes(tokenizer: Tokenizer) -> dict[str, np.dtype]:
    """The dtype of each part's file."""
    return {"tokens": token_dtype(tokenizer.vocab_size), "offsets": OFFSET_DTYPE, WEIGHTS: WEIGHT_DTYPE}


def read_embedded(folder: Path) -> dict[str, File]:
    """Reads the manifest of the corpus inside the package.

    Returns:
        domain -> the file with its documents.

    Raises:
        FileNotFoundError, ValueError: as `read_prepared`.
    """
    raw = _read_manifest(folder, EMBEDDED_FORMAT)
    return {domain: _file(folder, entry) for domain, entry in _field(folder, raw, "domains", dict).items()}


def check_files(files: Iterable[File], full: bool) -> None:
    """Checks that files are there with the right size and, with `full`, the right sha256.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a size or a sha256 differs from the manifest's.
    """
    for file in files:
        _check_file(file, full)


def fingerprint(tokenizer: Any, domains: Mapping[str, Any]) -> str:
    """One hash of the hashes that identify a corpus. The order of domains counts, because batches number them.

    Args:
        tokenizer: its name, or an object with the sha256 of each of its files.
        domains: domain -> sha256 of its streams, or of the file they are built from.
    """
    text = json.dumps([tokenizer, list(domains), domains], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of_embedded(domains: Mapping[str, File]) -> str:
    """The fingerprint of the corpus inside the package, from what `read_embedded` returned."""
    return fingerprint(ByteTokenizer().name, {domain: file.sha256 for domain, file in domains.items()})


def _fingerprint_of_prepared(tokenizer: Any, files: Mapping[tuple[str, str, str], File]) -> str:
    """Computed from the manifest's hashes, so that its cost does not grow with the corpus."""
    if isinstance(tokenizer, dict):
        listed = {entry["file"]: entry["sha256"] for entry in tokenizer["files"]}
        tokenizer = {"separator": tokenizer["separator"], "files": listed}
    domains: dict[str, dict[str, list[str]]] = {}
    for (split, domain, _), file in files.items():
        domains.setdefault(domain, {}).setdefault(split, []).append(file.sha256)
    return fingerprint(tokenizer, domains)


def _read_manifest(folder: Path, expected: str) -> dict[str, Any]:
    """The JSON object in `folder/manifest.json`, of the expected format and of this version."""
    create = f"create one with python -m moe_jax.data.prepare --input=FOLDER --output={folder}."
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path={folder} is not a folder; {create}")
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"data.path={folder} has no {MANIFEST}; {create}")
    manifest = read_json(path, REPAIR, name=f"data.path={folder}: {MANIFEST}")
    if manifest.get("format") != expected:
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has format={manifest.get('format')!r} and must have '{expected}'; "
            "set data.path to a folder written by python -m moe_jax.data.prepare."
        )
    _check_version(folder, manifest, VERSION, VERSION_WITH_WEIGHTS)
    return manifest


def _check_version(folder: Path, manifest: dict[str, Any], *versions: int) -> None:
    if manifest.get("version") not in versions:
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has version={manifest.get('version')!r} and this program reads version "
            f"{VERSION}, or {VERSION_WITH_WEIGHTS} where tokens have weights; {REPAIR}"
        )


def _check_file(file: File, full: bool) -> None:
    folder = file.path.parent
    name = file.path.name
    if not file.path.is_file():
        raise FileNotFoundError(f"data.path={folder} has no {name}, which its {MANIFEST} lists; {REPAIR}")
    size = file.path.stat().st_size
    if size != file.bytes:
        raise ValueError(
            f"data.path={folder}: {name} has {size} bytes and must have {file.bytes}; it is incomplete or was "
            f"changed, {REPAIR}"
        )
    if full and sha256_of(file.path) != file.sha256:
        raise ValueError(
            f"data.path={folder}: the sha256 of {name} is not the one in {MANIFEST}; it is damaged, {REPAIR}"
        )


def _field(folder: Path, mapping: Any, key: str, kind: type) -> Any:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"data.path={folder}: {MANIFEST} has {key}={value!r} and must have a {kind.__name__} there; {REPAIR}"
    )


def _file(folder: Path, entry: Any) -> File:
    name = _field(folder, entry, "file", str)
    if not NAME.fullmatch(name):  # no separators: a manifest never leads outside its own folder
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has file={name!r} and must have a plain file name of that folder there; "
            f"{REPAIR}"
        )
    return File(folder / name, _field(folder, entry, "bytes", int), _field(folder, entry, "sha256", str))


def _read_tokenizer(folder: Path, raw: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the manifest names or whose files it lists; they are small, so always checked in full."""
    if not isinstance(raw.get("tokenizer"), dict):
        return get_tokenizer(_field(folder, raw, "tokenizer", str))
    listed = raw["tokenizer"]
    check_files([_file(folder / TOKENIZER_FOLDER, entry) for entry in _field(folder, listed, "files", list)], full=True)
    separator = _field(folder, listed, "separator", int)
    tokenizer = get_tokenizer(str(folder / TOKENIZER_FOLDER), separator)
    if tokenizer.name != listed.get("name") or tokenizer.vocab_size != raw.get("vocab_size"):
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has the tokenizer {listed.get('name')!r} with vocab_size="
            f"{raw.get('vocab_size')!r}, but {TOKENIZER_FOLDER}/ has {tokenizer.name!r} with {tokenizer.vocab_size}; "
            f"{REPAIR}"
        )
    return tokenizer


def _counts(folder: Path, entry: dict[str, Any], files: Mapping[str, File], tokenizer: Tokenizer) -> tuple[int, int]:
    """(N, D) of a split, checked against the sizes of its files."""
    tokens = _field(folder, entry, "num_tokens", int)
    documents = _field(folder, entry, "num_documents", int)
    lengths = {"tokens": tokens, "offsets": documents + 1, WEIGHTS: tokens}
    dtypes = part_dtypes(tokenizer)
    fits = all(file.bytes == lengths[part] * dtypes[part].itemsize for part, file in files.items())
    # a document has its separator and at least one token of text
    if documents < 1 or tokens < 2 * documents or not fits:
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has num_tokens={tokens}, num_documents={documents}, which do not fit the "
            f"sizes of its files; {REPAIR}"
        )
    return tokens, documents
