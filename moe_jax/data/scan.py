"""The first reading of `prepare`: documents are read and checked, and it is decided which are held out."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from moe_jax.data.progress import progress
from moe_jax.data.readers import read_documents
from moe_jax.data.sources import Options, Source, printable
from moe_jax.data.workers import each_in, number_of

MAX_PROBLEMS = 20
RANK_BYTES = 8  # of the hash that decides a document's split


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
    files = [(domain, source) for domain, own in domains.items() for source in own]
    sources = [source for _, source in files]
    total = sum(source.bytes for source in sources)
    found: dict[str, list[_Scanned]] = {domain: [] for domain in domains}
    problems: list[str] = []
    with progress("checking", total) as advance, each_in(number_of(options.processes, total)) as map_each:
        for (domain, source), one in zip(files, map_each(partial(_scan_file, options), sources), strict=True):
            found[domain].append(one)
            problems += one.problems
            if len(problems) >= MAX_PROBLEMS:
                break
            advance(source.bytes)
    if problems:
        more = f" (the first {MAX_PROBLEMS}; there may be more)" if len(problems) >= MAX_PROBLEMS else ""
        lines = [f"--input={options.input} has bad documents; correct or remove them{more}:", *problems[:MAX_PROBLEMS]]
        raise ValueError("\n".join(lines))
    return [_plan(options, domain, scanned) for domain, scanned in found.items()]


class _Scanned(NamedTuple):
    """A file that was read: the smallest and largest rank of its documents, and what is wrong with some of them."""

    source: Source
    num_documents: int
    smallest: int
    largest: int
    problems: list[str]


def _scan_file(options: Options, source: Source) -> _Scanned:
    """Reads one file, up to MAX_PROBLEMS bad documents."""
    smallest, largest = 2 ** (8 * RANK_BYTES), -1
    digest = hashlib.sha256()
    problems: list[str] = []
    count = 0
    for piece in read_documents(options, source.name, digest):
        if piece.problem:
            problems.append(f"{printable(piece.where)}: {piece.problem}")
        if len(problems) >= MAX_PROBLEMS:
            break
        rank = document_rank(piece.where)
        smallest = min(smallest, rank)
        largest = max(largest, rank)
        count += 1
    return _Scanned(dataclasses.replace(source, sha256=digest.hexdigest()), count, smallest, largest, problems)


def _plan(options: Options, domain: str, files: Sequence[_Scanned]) -> DomainPlan:
    """The plan of a domain without bad documents."""
    count = sum(file.num_documents for file in files)
    if count < 2:
        raise ValueError(
            f"Domain '{domain}' has {count} document and must have at least 2, one to train on and one to hold out; "
            "add documents to it or move its file to another domain."
        )
    fraction = int(options.validation_fraction * 2 ** (8 * RANK_BYTES))
    # the document of smallest rank is always held out, and that of largest rank never
    smallest, largest = min(file.smallest for file in files), max(file.largest for file in files)
    return DomainPlan(domain, tuple(file.source for file in files), min(max(fraction, smallest + 1), largest))


def document_rank(where: str) -> int:
    """A uniform number in 0..2**64-1, fixed by a document's name; below the threshold it is held out."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(where), digest_size=RANK_BYTES).digest(), "big")
