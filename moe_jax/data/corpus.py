"""A corpus: labelled domains, each a stream of tokens for training and one held out for validation.

A document in a stream is its separator followed by its tokens, so the separator opens a document and is also
what the last token of the document before it predicts. `offsets` says where documents start; nothing else is
stored. Streams of a prepared folder are memory-mapped, so a corpus may be larger than memory.

A prepared folder holds, for every domain and split, `<domain>.<split>.bin` (uint16, or uint32 for a vocabulary that
needs it, little-endian) and `<domain>.<split>.offsets.bin` (int64, little-endian), and `manifest.json` with the size
and sha256 of each; with a trained vocabulary also its files, under `tokenizer/`.

Legend: N tokens, D documents, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import lzma
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.config.paths import path_of
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer, token_dtype
from moe_jax.data.vocabularies import get_tokenizer
from moe_jax.runtime.files import sha256_of, write_json, write_whole

SPLITS = ("train", "validation")
PARTS = ("tokens", "offsets")
MANIFEST = "manifest.json"
FORMAT, EMBEDDED_FORMAT, VERSION = "moe_jax corpus", "moe_jax embedded corpus", 1
EMBEDDED = pathlib.Path(__file__).parent / "embedded"
OFFSET_DTYPE = np.dtype("<i8")
TOKENIZER_FOLDER = "tokenizer"
FULL_VERIFY_BELOW_BYTES = 10 * 10**9
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The documents of one split of one domain, end to end.

    Args:
        tokens: uint16[N] or uint32[N], each document opened by the separator; in memory or memory-mapped.
        offsets: int64[D+1], where each document starts; the last one is N.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def num_tokens(self) -> int:
        """N, separators included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.offsets) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Labelled domains and their streams.

    Args:
        domains: names in the order that `Batch.domain` counts them.
        tokenizer: what the token ids mean.
        streams: (split, domain) -> Stream, for every domain and both of `SPLITS`.
        fingerprint: sha256 in hex of the domains in order, their tokens and the tokenizer: equal wherever the corpus
            is and whenever it was made, another for other data.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    streams: Mapping[tuple[str, str], Stream]
    fingerprint: str

    def stream(self, split: str, domain: str) -> Stream:
        """The stream of one split ("train" or "validation") of one domain."""
        return self.streams[split, domain]


def documents(corpus: Corpus, split: str, domain: str) -> Iterator[str]:
    """The texts of one split ("train" or "validation") of one domain, as their tokens say them, in order."""
    stream = corpus.stream(split, domain)
    for start, stop in itertools.pairwise(stream.offsets):
        yield corpus.tokenizer.decode(stream.tokens[start + 1 : stop])


def token_frequencies(
    corpus: Corpus, vocab_size: int, weights: Mapping[str, float] | None = None, at_most: int = 10**8
) -> np.ndarray:
    """How often each token id occurs in training, as a share: float64[V], summing to 1.

    Args:
        corpus: its "train" streams are counted, the first `at_most` tokens of each.
        vocab_size: V, at least the tokenizer's.
        weights: domain -> share of the tokens, as `training_batches` takes them; None or empty: by size.
    """
    total = np.zeros(vocab_size)
    for domain in corpus.domains:
        stream = corpus.stream("train", domain)
        counts = np.bincount(stream.tokens[:at_most], minlength=vocab_size)
        share = weights[domain] if weights else stream.num_tokens
        total += share * counts / max(1, counts.sum())
    return total / total.sum()


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a corpus says about itself before any token is read.

    Args:
        domains: names, in order.
        tokenizer: what the token ids mean.
        fingerprint: that of the opened `Corpus`.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    fingerprint: str


def open_corpus(path: str = "", verify: str = "auto") -> Corpus:
    """Opens the corpus inside the package, or a folder made by `moe_jax.data.prepare`.

    Args:
        path: "" for the embedded corpus (about 2 MB of public-domain text in four domains, decompressed in
            memory, sha256 always checked), else a prepared folder.
        verify: "full" checks size and sha256 of every file, "sizes" sizes only, "auto" is full below 10 GB.

    Returns:
        The corpus; streams of a folder are memory-mapped and read-only.

    Raises:
        FileNotFoundError: the folder, its manifest or a file is missing.
        ValueError: a file is damaged, or the manifest is not one this version reads.
    """
    if verify not in ("full", "sizes", "auto"):
        raise ValueError(f"data.verify={verify!r} is not known; use one of: auto, full, sizes.")
    if not path:
        return _open_embedded(EMBEDDED)
    manifest = _read_prepared(path_of(path, "data.path"))
    total = sum(file.bytes for file in manifest.files.values())
    full = verify == "full" or (verify == "auto" and total < FULL_VERIFY_BELOW_BYTES)
    check_files(manifest.files.values(), full)
    streams = {key: _map_stream(manifest, key) for key in manifest.counts}
    return Corpus(manifest.domains, manifest.tokenizer, streams, manifest.fingerprint)


def check_corpus(path: str = "") -> Summary:
    """Checks that a corpus is there: manifest, files, sizes. Reads no token, so it is cheap at any size.

    Args:
        path: as for `open_corpus`.

    Returns:
        Its domains and tokenizer, to check other settings against.

    Raises:
        FileNotFoundError, ValueError: as `open_corpus`, except for damage that leaves sizes as they were.
    """
    if not path:
        domains = _read_embedded(EMBEDDED)
        check_files(domains.values(), full=False)
        return Summary(tuple(domains), ByteTokenizer(), _fingerprint_of_embedded(domains))
    manifest = _read_prepared(path_of(path, "data.path"))
    check_files(manifest.files.values(), full=False)
    return Summary(manifest.domains, manifest.tokenizer, manifest.fingerprint)


def make_corpus(documents: Mapping[str, Mapping[str, Sequence[str]]], tokenizer: Tokenizer | None = None) -> Corpus:
    """Builds a corpus in memory.

    Args:
        documents: domain -> split -> texts; every domain has both splits and at least one document in each.
        tokenizer: `ByteTokenizer()` when left out.

    Returns:
        The corpus, with the domains in the mapping's order.

    Raises:
        ValueError: a domain has no document in a split.
    """
    tokenizer = tokenizer or ByteTokenizer()
    streams = {}
    for domain, splits in documents.items():
        for split in SPLITS:
            if not splits.get(split):
                raise ValueError(f"Domain '{domain}' has no {split} document; every domain needs at least one.")
            streams[split, domain] = _concatenate(splits[split], tokenizer)
    hashes = {
        domain: {
            split: [_sha256(streams[split, domain].tokens), _sha256(streams[split, domain].offsets)] for split in SPLITS
        }
        for domain in documents
    }
    return Corpus(tuple(documents), tokenizer, streams, _fingerprint(tokenizer.name, hashes))


def tokenize_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Of each text uint16[n+1] or uint32[n+1]: the separator, then its tokens."""
    separator = np.array([tokenizer.separator], token_dtype(tokenizer.vocab_size))
    return [np.concatenate([separator, tokens]) for tokens in tokenizer.encode_all(texts)]


def _concatenate(texts: Sequence[str], tokenizer: Tokenizer) -> Stream:
    documents = tokenize_documents(texts, tokenizer)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.concatenate(documents)
    tokens.flags.writeable = offsets.flags.writeable = False
    return Stream(tokens, offsets)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _fingerprint(tokenizer: Any, domains: Mapping[str, Any]) -> str:
    """One hash of the hashes that say what a corpus is; the order of domains counts, for batches number them.

    Args:
        tokenizer: its name, or an object with the sha256 of each of its files.
        domains: domain -> sha256 of its streams, or of the file that they are made of.
    """
    text = json.dumps([tokenizer, list(domains), domains], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# Files and manifests


@dataclasses.dataclass(frozen=True)
class File:
    """A file as its manifest describes it: where, how many bytes, which sha256 (hex)."""

    path: pathlib.Path
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class _Manifest:
    folder: pathlib.Path
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    files: Mapping[tuple[str, str, str], File]  # (split, domain, "tokens" | "offsets")
    counts: Mapping[tuple[str, str], tuple[int, int]]  # (split, domain) -> (N, D)
    fingerprint: str


def check_files(files: Iterable[File], full: bool) -> None:
    """Checks that files are there with the right size and, with `full`, the right sha256.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a size or a sha256 is not that of the manifest.
    """
    for file in files:
        _check_file(file, full)


def _check_file(file: File, full: bool) -> None:
    folder, name = file.path.parent, file.path.name
    if not file.path.is_file():
        raise FileNotFoundError(f"data.path={folder} has no {name}, which its {MANIFEST} lists; {_REMAKE}")
    size = file.path.stat().st_size
    if size != file.bytes:
        raise ValueError(
            f"data.path={folder}: {name} has {size} bytes and must have {file.bytes}; "
            f"it is incomplete or was changed, {_REMAKE}"
        )
    if full and sha256_of(file.path) != file.sha256:
        raise ValueError(
            f"data.path={folder}: the sha256 of {name} is not the one in {MANIFEST}; it is damaged, {_REMAKE}"
        )


_REMAKE = "make it again with python -m moe_jax.data.prepare --overwrite, or copy it again."


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `folder/manifest.json` and checks that it is a JSON object.

    Raises:
        FileNotFoundError: no such folder, or no manifest in it.
        ValueError: it is not a JSON object.
    """
    make = f"make one with python -m moe_jax.data.prepare --input=FOLDER --output={folder}."
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path={folder} is not a folder; {make}")
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"data.path={folder} has no {MANIFEST}; {make}")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"data.path={folder}: {MANIFEST} is not JSON ({error}); {_REMAKE}") from error
    if isinstance(manifest, dict):
        return manifest
    raise ValueError(f"data.path={folder}: {MANIFEST} must be a JSON object; {_REMAKE}")


def _check_format(folder: pathlib.Path, manifest: dict[str, Any], expected: str) -> None:
    if manifest.get("format") != expected:
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has format={manifest.get('format')!r} and must "
            f"have '{expected}'; point data.path at a folder made by python -m "
            "moe_jax.data.prepare."
        )
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has version={manifest.get('version')!r} and this "
            f"program reads version {VERSION}; {_REMAKE}"
        )


def _field(folder: pathlib.Path, mapping: Any, key: str, kind: type) -> Any:
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise ValueError(
        f"data.path={folder}: {MANIFEST} has {key}={value!r} and must have a {kind.__name__} there; {_REMAKE}"
    )


def _file(folder: pathlib.Path, entry: Any) -> File:
    name = _field(folder, entry, "file", str)
    if not NAME.fullmatch(name):  # no separators: a manifest never leads outside its own folder
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has file={name!r} and must have a plain file name "
            f"of that folder there; {_REMAKE}"
        )
    return File(folder / name, _field(folder, entry, "bytes", int), _field(folder, entry, "sha256", str))


def _read_prepared(folder: pathlib.Path) -> _Manifest:
    raw = read_manifest(folder)
    _check_format(folder, raw, FORMAT)
    tokenizer = _read_tokenizer(folder, raw)
    domains = _field(folder, raw, "domains", dict)
    if not domains:
        raise ValueError(f"data.path={folder}: {MANIFEST} lists no domain and must list at least one; {_REMAKE}")
    files: dict[tuple[str, str, str], File] = {}
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for domain, splits in domains.items():
        for split in SPLITS:
            entry = _field(folder, splits, split, dict)
            parts = {part: _file(folder, _field(folder, entry, part, dict)) for part in PARTS}
            files |= {(split, domain, part): file for part, file in parts.items()}
            counts[split, domain] = _counts(folder, entry, list(parts.values()), tokenizer)
    return _Manifest(
        folder, tokenizer, tuple(domains), files, counts, _fingerprint_of_prepared(raw["tokenizer"], files)
    )


def _fingerprint_of_prepared(tokenizer: Any, files: Mapping[tuple[str, str, str], File]) -> str:
    """Made of the manifest's hashes, so that its cost does not grow with the corpus."""
    if isinstance(tokenizer, dict):
        listed = {entry["file"]: entry["sha256"] for entry in tokenizer["files"]}
        tokenizer = {"separator": tokenizer["separator"], "files": listed}
    domains: dict[str, dict[str, list[str]]] = {}
    for (split, domain, _), file in files.items():
        domains.setdefault(domain, {}).setdefault(split, []).append(file.sha256)
    return _fingerprint(tokenizer, domains)


def _read_tokenizer(folder: pathlib.Path, raw: dict[str, Any]) -> Tokenizer:
    """The tokenizer that the manifest names, or whose files it lists: these are small, so always checked in full."""
    if not isinstance(raw.get("tokenizer"), dict):
        return get_tokenizer(_field(folder, raw, "tokenizer", str))
    listed = raw["tokenizer"]
    check_files([_file(folder / TOKENIZER_FOLDER, entry) for entry in _field(folder, listed, "files", list)], full=True)
    separator = _field(folder, listed, "separator", int)
    tokenizer = get_tokenizer(str(folder / TOKENIZER_FOLDER), separator)
    if tokenizer.name != listed.get("name") or tokenizer.vocab_size != raw.get("vocab_size"):
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has the tokenizer {listed.get('name')!r} with vocab_size="
            f"{raw.get('vocab_size')!r}, but in {TOKENIZER_FOLDER}/ lies {tokenizer.name!r} with "
            f"{tokenizer.vocab_size}; {_REMAKE}"
        )
    return tokenizer


def keep_tokenizer(path: str, tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the vocabulary of a prepared corpus as that of a model trained on it, to make text with and to publish.

    Every text of such a model is opened by the separator and ended by one of the tokenizer's ends, whatever held for
    the model that the vocabulary came with; other settings of that model, as its lengths, are not this one's.

    Args:
        path: of the corpus.
        tokenizer: its, a trained one.
        folder: where to; its files are those of a Hugging Face model.
    """
    from moe_jax.data.trained import TOKENIZER_FILE, read_settings

    source, inner = path_of(path, "data.path") / TOKENIZER_FOLDER, tokenizer.inner  # type: ignore[attr-defined]
    theirs = read_settings(source / "special_tokens_map.json") | read_settings(source / "tokenizer_config.json")

    def named(what: str) -> dict[str, str]:
        token = theirs.pop(what, None)
        name = token.get("content") if isinstance(token, dict) else token
        return {what: name} if isinstance(name, str) and inner.token_to_id(name) is not None else {}

    opener, ends = inner.id_to_token(tokenizer.separator), list(tokenizer.ends)
    names = {"eos_token": opener} | named("eos_token") | named("pad_token") | {"bos_token": opener}
    ids = {f"{what}_id": inner.token_to_id(name) for what, name in names.items()}
    ids["eos_token_id"] = ends if ends[1:] else ends[0]
    kept = {key: value for key, value in theirs.items() if key not in ("model_max_length", "auto_map")}
    kept = {"tokenizer_class": "PreTrainedTokenizerFast"} | kept | names
    files = {
        "tokenizer_config.json": kept | {"add_bos_token": True, "add_eos_token": False},
        "generation_config.json": ids,
        "config.json": ids,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        write_json(folder / name, value)
    write_whole(folder / TOKENIZER_FILE, (source / TOKENIZER_FILE).read_bytes())


def _counts(
    folder: pathlib.Path, entry: dict[str, Any], files: Sequence[File], tokenizer: Tokenizer
) -> tuple[int, int]:
    tokens = _field(folder, entry, "num_tokens", int)
    documents = _field(folder, entry, "num_documents", int)
    expected = (tokens * token_dtype(tokenizer.vocab_size).itemsize, (documents + 1) * OFFSET_DTYPE.itemsize)
    if documents < 1 or tokens < 2 * documents or tuple(file.bytes for file in files) != expected:
        raise ValueError(
            f"data.path={folder}: {MANIFEST} has num_tokens={tokens}, "
            f"num_documents={documents}, which do not fit the sizes of its files; {_REMAKE}"
        )
    return tokens, documents


def _map_stream(manifest: _Manifest, key: tuple[str, str]) -> Stream:
    tokens, offsets = (manifest.files[(*key, part)].path for part in PARTS)
    dtype = token_dtype(manifest.tokenizer.vocab_size)
    stream = Stream(np.memmap(tokens, dtype, "r"), np.memmap(offsets, OFFSET_DTYPE, "r"))
    if stream.offsets[0] != 0 or stream.offsets[-1] != stream.num_tokens:
        raise ValueError(
            f"data.path={manifest.folder}: {offsets.name} must begin with 0 and end with "
            f"{stream.num_tokens}, the number of tokens; {_REMAKE}"
        )
    return stream


# The embedded corpus


def _read_embedded(folder: pathlib.Path) -> dict[str, File]:
    raw = read_manifest(folder)
    _check_format(folder, raw, EMBEDDED_FORMAT)
    return {domain: _file(folder, entry) for domain, entry in _field(folder, raw, "domains", dict).items()}


def _open_embedded(folder: pathlib.Path) -> Corpus:
    domains = _read_embedded(folder)
    check_files(domains.values(), full=True)
    corpus = make_corpus({domain: _read_documents(file.path) for domain, file in domains.items()})
    return dataclasses.replace(corpus, fingerprint=_fingerprint_of_embedded(domains))


def _fingerprint_of_embedded(domains: Mapping[str, File]) -> str:
    return _fingerprint(ByteTokenizer().name, {domain: file.sha256 for domain, file in domains.items()})


def _read_documents(path: pathlib.Path) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            document = json.loads(line)
            splits[document["split"]].append(document["text"])
    return splits
