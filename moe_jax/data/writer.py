"""The second reading of `prepare`: documents are tokenized and written, domain after domain."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_jax.data.chat import special_names
from moe_jax.data.manifest import OFFSET_DTYPE, SPLITS, WEIGHT_DTYPE, WEIGHTS
from moe_jax.data.output import PARTIAL, files_of, note_of
from moe_jax.data.progress import progress
from moe_jax.data.readers import read_documents
from moe_jax.data.scan import DomainPlan, document_rank
from moe_jax.data.sources import Options, printable
from moe_jax.data.spans import Piece, Tokens, tokenize
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.workers import each_in, number_of
from moe_jax.runtime.files import write_json

ONES_AT_ONCE = 2**20  # weights of tokens before the first with a weight of its own
CHARACTERS_AT_ONCE = 2**20  # documents are tokenized together, in groups of about this size, to use all cores


def write_domains(options: Options, plans: Sequence[DomainPlan], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Writes the domains, several at a time if there is more than one process.

    Returns:
        the entries in the manifest.

    Raises:
        ValueError: the input has changed since `scan`.
    """
    sizes = [sum(source.bytes for source in plan.sources) for plan in plans]
    processes = min(len(plans), number_of(options.processes, sum(sizes)))
    entries = []
    if processes < 2:
        for plan, size in zip(plans, sizes, strict=True):
            with progress(f"writing {plan.name}", size) as advance:
                entries.append(_write_domain(options, tokenizer, plan, advance))
        return entries
    with progress("writing", sum(sizes)) as advance, each_in(processes) as map_each:
        for size, entry in zip(sizes, map_each(partial(_write_domain, options, tokenizer), plans), strict=True):
            entries.append(entry)
            advance(size)
    return entries


def _write_domain(
    options: Options, tokenizer: Tokenizer, plan: DomainPlan, advance: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Writes a domain in `.partial`, moves its files into the output, then notes that it is finished.

    Returns:
        its entry in the manifest.

    Raises:
        ValueError: the input has changed since `scan`.
    """
    partial = options.output / PARTIAL
    with ExitStack() as stack:
        writers = {split: SplitWriter(partial, plan.name, split) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        _write_documents(options, plan, writers, tokenizer, advance)
    entry = {split: writer.entry() for split, writer in writers.items()}
    for file in files_of(options.output, entry):
        os.replace(partial / file.path.name, file.path)
    write_json(note_of(options.output, plan.name), entry, durable=True)
    return entry


class SplitWriter:
    """Writes one split of one domain, document by document, and keeps count of sizes and hashes."""

    def __init__(self, folder: Path, domain: str, split: str) -> None:
        self._path = folder / f"{domain}.{split}"
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}
        self._bytes: dict[str, int] = {}
        self._num_tokens = 0
        self._num_documents = 0
        self._end: float = 1.0  # how much the end of the newest document counts, the separator of the next one
        self._open("tokens", ".bin")
        self._open("offsets", ".offsets.bin")
        self._write("offsets", np.zeros(1, OFFSET_DTYPE))

    def add(self, document: Tokens) -> None:
        """Writes a document."""
        self._write("tokens", document.ids)
        self._add_weights(document)
        self._num_tokens += len(document.ids)
        self._num_documents += 1
        self._write("offsets", np.array([self._num_tokens], OFFSET_DTYPE))

    def _add_weights(self, document: Tokens) -> None:
        """Writes how much each token counts, from the first that does not count once on, and 1 for all before it."""
        weights = np.ones(len(document.ids), WEIGHT_DTYPE) if document.weights is None else document.weights.copy()
        self._end, weights[0] = float(weights[0]), self._end
        if WEIGHTS not in self._files:
            if (weights == 1).all():
                return
            self._open(WEIGHTS, ".weights.bin")
            for start in range(0, self._num_tokens, ONES_AT_ONCE):
                self._write(WEIGHTS, np.ones(min(ONES_AT_ONCE, self._num_tokens - start), WEIGHT_DTYPE))
        self._write(WEIGHTS, weights)

    def _open(self, part: str, ending: str) -> None:
        self._files[part] = open(f"{self._path}{ending}", "wb")  # noqa: SIM115
        self._digests[part] = hashlib.sha256()
        self._bytes[part] = 0

    def close(self) -> None:
        """Makes sure that everything is on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def entry(self) -> dict[str, Any]:
        """The manifest's entry of this split."""
        parts = {
            part: {
                "file": Path(file.name).name,
                "bytes": self._bytes[part],
                "sha256": self._digests[part].hexdigest(),
            }
            for part, file in self._files.items()
        }
        return {"num_tokens": self._num_tokens, "num_documents": self._num_documents, **parts}

    def _write(self, part: str, values: np.ndarray) -> None:
        data = values.tobytes()
        self._digests[part].update(data)
        self._bytes[part] += self._files[part].write(data)


def _write_documents(
    options: Options,
    plan: DomainPlan,
    writers: dict[str, SplitWriter],
    tokenizer: Tokenizer,
    advance: Callable[[int], None],
) -> None:
    changed = ChangedTexts(tokenizer)
    # what a chat template writes may be special tokens, which are no text
    silent = special_names(tuple(tokenizer.names.values())) if options.messages_key else None
    for source in plan.sources:
        digest = hashlib.sha256()
        for pieces in _groups(read_documents(options, source.name, digest)):
            documents = tokenize(pieces, tokenizer, special=bool(options.messages_key))
            for piece, document in zip(pieces, documents, strict=True):
                held_out = document_rank(piece.where) < plan.threshold
                writers["validation" if held_out else "train"].add(document)
                changed.count(silent.sub("", piece.text) if silent else piece.text, document.ids)
        if digest.hexdigest() != source.sha256:
            raise ValueError(
                f"{printable(source.name)} changed while it was read; run again once nothing writes to "
                f"--input={options.input}."
            )
        advance(source.bytes)
    changed.report(plan.name)


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The pieces in order, in groups that end with the piece that reaches CHARACTERS_AT_ONCE."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group = []
            size = 0
    if group:
        yield group


class ChangedTexts:
    """Counts the documents whose tokens stand for other bytes than the text has, by reason."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.reasons: dict[str, tuple[int, int]] = {}  # reason -> documents, and bytes that their tokens have more

    def count(self, text: str, tokens: np.ndarray) -> None:
        """Counts a document; `tokens` begin with its separator."""
        ids = tokens[1:]
        own = text.encode()
        found = self._tokenizer.to_bytes(ids)[self._tokenizer.lead(ids) :]
        if found != own:
            why = self._tokenizer.why_changed(text, ids)
            documents, more = self.reasons.get(why, (0, 0))
            self.reasons[why] = documents + 1, more + len(found) - len(own)

    def report(self, domain: str) -> None:
        """Prints one line a reason, because bits per byte are then those of another text."""
        for why, (documents, more) in self.reasons.items():
            print(
                f"{domain}: the tokens of {documents} documents stand for other bytes than the text has "
                f"({more:+d} in all), because {why}; bits per byte count those of the tokens."
            )
