"""A corpus: labelled domains, each a stream of tokens for training and one held out for validation.

A document in a stream is its separator followed by its tokens. So the separator opens a document, and is also what the
last token of the document before it predicts. `offsets` says where documents start; nothing else is stored. Streams of
a prepared folder are memory-mapped, so a corpus may be larger than memory.

A prepared folder holds, for every domain and split, `<domain>.<split>.bin` (uint16, or uint32 for a vocabulary that
needs it, little-endian) and `<domain>.<split>.offsets.bin` (int64, little-endian), and `manifest.json` with the size
and sha256 of each. Where a token counts otherwise than once as a target, it also holds `<domain>.<split>.weights.bin`
(float16, little-endian: two bytes a token like the tokens, exact for 0 and 1, and within 0.05 % for other weights).
With a trained vocabulary it also holds the vocabulary's files, under `tokenizer/`.

Legend: N tokens, D documents, V vocabulary.
"""

import dataclasses
import hashlib
import itertools
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_jax.config.paths import path_of
from moe_jax.data.chat import TEMPLATE_FILE
from moe_jax.data.manifest import (
    REPAIR,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    check_files,
    fingerprint,
    fingerprint_of_embedded,
    part_dtypes,
    read_embedded,
    read_prepared,
)
from moe_jax.data.tokenizer import ByteTokenizer, Tokenizer, token_dtype
from moe_jax.runtime.files import write_json, write_whole

EMBEDDED = Path(__file__).parent / "embedded"
FULL_VERIFY_BELOW_BYTES = 10 * 10**9


@dataclass(frozen=True, eq=False)
class Stream:
    """The documents of one split of one domain, end to end.

    Args:
        tokens: uint16[N] or uint32[N], each document opened by the separator; in memory or memory-mapped.
        offsets: int64[D+1], where each document starts; the last one is N.
        weights: float16[N], how much each token counts as a target; None where all count once.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """N, separators included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Corpus:
    """Labelled domains and their streams.

    Args:
        domains: names in the order in which `Batch.domain` counts them.
        tokenizer: what the token ids mean.
        streams: (split, domain) -> Stream, for every domain and both of `SPLITS`.
        fingerprint: sha256 in hex of the domains in order, their tokens and the tokenizer: the same wherever and
            whenever the corpus was built, another for other data.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    streams: Mapping[tuple[str, str], Stream]
    fingerprint: str

    @property
    def weighted(self) -> bool:
        """Whether some token to train on has a weight of its own."""
        return any(stream.weights is not None for (split, _), stream in self.streams.items() if split == SPLITS[0])

    def stream(self, split: str, domain: str) -> Stream:
        """The stream of one split ("train" or "validation") of one domain."""
        return self.streams[split, domain]


def documents(corpus: Corpus, split: str, domain: str) -> Iterator[str]:
    """The texts of one split ("train" or "validation") of one domain, decoded from their tokens, in order."""
    stream = corpus.stream(split, domain)
    for start, stop in itertools.pairwise(stream.offsets):
        yield corpus.tokenizer.decode(stream.tokens[start + 1 : stop])


def token_frequencies(
    corpus: Corpus, vocab_size: int, weights: Mapping[str, float] | None = None, at_most: int = 10**8
) -> np.ndarray:
    """The share of training tokens that each token id has: float64[V], summing to 1.

    Args:
        corpus: its "train" streams are counted, the first `at_most` tokens of each.
        vocab_size: V, at least the tokenizer's.
        weights: domain -> share of the tokens, as `training_batches` takes them; None or empty: by size.
        at_most: tokens counted of each domain.
    """
    total = np.zeros(vocab_size)
    for domain in corpus.domains:
        stream = corpus.stream("train", domain)
        counts = np.bincount(stream.tokens[:at_most], minlength=vocab_size)
        share = weights[domain] if weights else stream.num_tokens
        total += share * counts / max(1, counts.sum())
    return total / total.sum()


@dataclass(frozen=True)
class Summary:
    """What is known of a corpus before any token is read.

    Args:
        domains: names, in order.
        tokenizer: what the token ids mean.
        fingerprint: that of the opened `Corpus`.
    """

    domains: tuple[str, ...]
    tokenizer: Tokenizer
    fingerprint: str


def open_corpus(path: str = "", verify: str = "auto") -> Corpus:
    """Opens the corpus inside the package, or a folder written by `moe_jax.data.prepare`.

    Args:
        path: "" for the embedded corpus (about 2 MB of public-domain text in four domains, decompressed in
            memory, sha256 always checked), else a prepared folder.
        verify: "full" checks size and sha256 of every file, "sizes" sizes only, "auto" is full below 10 GB.

    Returns:
        The corpus; streams of a folder are memory-mapped and read-only.

    Raises:
        FileNotFoundError: the folder, its manifest or a file is missing.
        ValueError: a file is damaged, or this version cannot read the manifest.
    """
    if verify not in ("full", "sizes", "auto"):
        raise ValueError(f"data.verify={verify!r} is not known; use one of: auto, full, sizes.")
    if not path:
        return _open_embedded(EMBEDDED)
    manifest = read_prepared(path_of(path, "data.path"))
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
        FileNotFoundError, ValueError: as `open_corpus`, except for damage that leaves sizes unchanged.
    """
    if not path:
        domains = read_embedded(EMBEDDED)
        check_files(domains.values(), full=False)
        return Summary(tuple(domains), ByteTokenizer(), fingerprint_of_embedded(domains))
    manifest = read_prepared(path_of(path, "data.path"))
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
    hashes = {domain: {split: _hashes(streams[split, domain]) for split in SPLITS} for domain in documents}
    return Corpus(tuple(documents), tokenizer, streams, fingerprint(tokenizer.name, hashes))


def tokenize_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Tokenizes each text: uint16[n+1] or uint32[n+1], the separator and then its tokens."""
    separator = np.array([tokenizer.separator], token_dtype(tokenizer.vocab_size))
    return [np.concatenate([separator, tokens]) for tokens in tokenizer.encode_all(texts)]


def publish_tokenizer(path: str, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the vocabulary of a prepared corpus as that of a model trained on it, to generate with and to publish.

    Every text of such a model is opened by the separator and ended by one of the tokenizer's ends, whatever held for
    the model that the vocabulary came with. Settings that describe that model, such as its lengths, are left out.

    Args:
        path: of the corpus.
        tokenizer: the corpus's tokenizer, a trained one.
        folder: gets the tokenizer files of a Hugging Face model.
    """
    from moe_jax.data.trained import TOKENIZER_FILE, read_settings

    source = path_of(path, "data.path") / TOKENIZER_FOLDER
    inner = tokenizer.inner  # type: ignore[attr-defined]
    original = read_settings(source / "special_tokens_map.json") | read_settings(source / "tokenizer_config.json")

    def take(what: str) -> dict[str, str]:
        """The named token, out of the original settings, if the vocabulary has it."""
        token = original.pop(what, None)
        name = token.get("content") if isinstance(token, dict) else token
        return {what: name} if isinstance(name, str) and inner.token_to_id(name) is not None else {}

    opener = inner.id_to_token(tokenizer.separator)
    ends = list(tokenizer.ends)
    names = {"eos_token": opener} | take("eos_token") | take("pad_token") | {"bos_token": opener}
    ids = {f"{what}_id": inner.token_to_id(name) for what, name in names.items()}
    ids["eos_token_id"] = ends if ends[1:] else ends[0]
    others = {key: value for key, value in original.items() if key not in ("model_max_length", "auto_map")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | others | names
    files = {
        "tokenizer_config.json": settings | {"add_bos_token": True, "add_eos_token": False},
        "generation_config.json": ids,
        "config.json": ids,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        write_json(folder / name, value)
    for name in (TOKENIZER_FILE, TEMPLATE_FILE):
        if (source / name).is_file():
            write_whole(folder / name, (source / name).read_bytes())


def _concatenate(texts: Sequence[str], tokenizer: Tokenizer) -> Stream:
    documents = tokenize_documents(texts, tokenizer)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.concatenate(documents)
    tokens.flags.writeable = False
    offsets.flags.writeable = False
    return Stream(tokens, offsets)


def _hashes(stream: Stream) -> list[str]:
    arrays = [array for array in (stream.tokens, stream.offsets, stream.weights) if array is not None]
    return [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]


def _map_stream(manifest: Manifest, key: tuple[str, str]) -> Stream:
    dtypes = part_dtypes(manifest.tokenizer)
    paths = {part: manifest.files[(*key, part)].path for part in dtypes if (*key, part) in manifest.files}
    stream = Stream(**{part: np.memmap(path, dtypes[part], "r") for part, path in paths.items()})
    if stream.offsets[0] != 0 or stream.offsets[-1] != stream.num_tokens:
        raise ValueError(
            f"data.path={manifest.folder}: {paths['offsets'].name} must begin with 0 and end with "
            f"{stream.num_tokens}, the number of tokens; {REPAIR}"
        )
    return stream


def _open_embedded(folder: Path) -> Corpus:
    domains = read_embedded(folder)
    check_files(domains.values(), full=True)
    corpus = make_corpus({domain: _read_documents(file.path) for domain, file in domains.items()})
    return dataclasses.replace(corpus, fingerprint=fingerprint_of_embedded(domains))


def _read_documents(path: Path) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            document = json.loads(line)
            splits[document["split"]].append(document["text"])
    return splits
