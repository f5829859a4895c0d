"""A step number becomes a batch, without any state in between.

A sequence is window i of a domain's stream: inputs are tokens [i*S, i*S + S), targets the same shifted by
one, so every token but the very first is a target exactly once. Which windows make up batch n is computed
from (seed, n) alone, by grain: each domain's windows get a new permutation every epoch, and the domains are
interleaved by weight. So a run resumes at step n by computing batch n, and one of many processes computes only its rows
of it.

Legend: B batch, S sequence, V vocabulary.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe_jax.data.corpus import Corpus, Stream

# grain does arithmetic on the length, so "endless" must stay well inside 64 bits
_ENDLESS = 2**60


class Batch(NamedTuple):
    """Rows of token windows: numpy in the loader, jax inside a step; a single window is the same without B.

    Args:
        tokens: int32[B, S], the inputs; 0 at padding.
        targets: int32[B, S], what each input predicts; 0 at padding.
        segment_ids: int32[B, S], documents counted 1, 2, ... within the row; 0 at padding. A document's last
            token predicts the separator that opens the next one.
        positions: int32[B, S], offset from the document's start or, for a document that began in an earlier
            window, from the window's start: always below S. Attention depends only on differences of positions
            within a document, which are the same either way. 0 at padding.
        mask: bool[B, S], True where the target counts: exactly where segment_ids > 0.
        domain: int32[B], index into `Corpus.domains`; -1 for a row that is all padding.
        num_bytes: int32[B], UTF-8 bytes of the row's valid targets (separators are 0 bytes).
    """

    tokens: Any
    targets: Any
    segment_ids: Any
    positions: Any
    mask: Any
    domain: Any
    num_bytes: Any

    @classmethod
    def dims(cls) -> "Batch":
        """The dims of each field, as the mesh's table names them."""
        by_token, by_row = ("batch", "length"), ("batch",)
        return cls(
            tokens=by_token,
            targets=by_token,
            segment_ids=by_token,
            positions=by_token,
            mask=by_token,
            domain=by_row,
            num_bytes=by_row,
        )


class BatchAt(Protocol):
    """(step, rows) -> those rows of the step's batch; all of them where `rows` is left out."""

    def __call__(self, step: int, rows: tuple[int, int] | None = None) -> Batch:
        """See `training_batches`."""


def count_windows(corpus: Corpus, split: str, sequence_length: int) -> tuple[int, ...]:
    """The number of sequences in one epoch of each domain.

    Args:
        corpus: the corpus.
        split: "train" or "validation".
        sequence_length: S, at least 1.

    Returns:
        One count for each of `corpus.domains`, the last partial window included.
    """
    return tuple(_count(corpus.stream(split, domain), sequence_length) for domain in corpus.domains)


def training_batches(
    corpus: Corpus,
    *,
    seed: int,
    batch_size: int,
    sequence_length: int,
    weights: Mapping[str, float] | None = None,
) -> BatchAt:
    """Makes `batch_at(step, rows=None)`, a pure function of (seed, step).

    Calls may come in any order and from any thread. With `rows=(start, stop)` only those rows of the batch are
    computed and read; a batch is the same however it is split over processes.

    Args:
        corpus: the corpus; its "train" streams are used.
        seed: any integer >= 0.
        batch_size: B, rows of the whole batch.
        sequence_length: S, tokens a row.
        weights: domain -> share of the rows, any scale, naming every domain; 0 leaves a domain out. None or
            empty: proportional to the number of windows, so that one epoch of the mixture is every window
            exactly once.

    Returns:
        batch_at: int step >= 0, rows (0 <= start < stop <= B, or None for all) -> Batch of those rows.

    Raises:
        ValueError: an argument is out of range, or weights name an unknown domain, miss one, are negative or
            all 0.
    """
    import grain  # two seconds; reading a corpus or checking a config does not need it

    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0.")
    _check_sizes(batch_size, sequence_length)
    shares = _shares(corpus, sequence_length, weights)
    used = [i for i, share in enumerate(shares) if share]
    datasets = [_shuffled(grain.MapDataset, corpus, i, sequence_length, seed) for i in used]
    mixture = grain.MapDataset.select_from_datasets(datasets, _Interleave([shares[i] for i in used]))

    def batch_at(step: int, rows: tuple[int, int] | None = None) -> Batch:
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step={step} must be at least 0.")
        return _stack([mixture[step * batch_size + row] for row in _rows(rows, batch_size)])

    return batch_at


def evaluation_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    sequence_length: int,
    max_sequences_per_domain: int = 0,
) -> "EvaluationBatches":
    """The held-out text, every token once, in order, domain after domain.

    Args:
        corpus: the corpus; its "validation" streams are used.
        batch_size: B, rows of a whole batch.
        sequence_length: S.
        max_sequences_per_domain: how many windows of each domain, from its first; 0 is all of them.

    Returns:
        A sequence of batches; the last one is padded with rows of domain -1.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_sizes(batch_size, sequence_length)
    if max_sequences_per_domain < 0:
        raise ValueError(f"max_sequences_per_domain={max_sequences_per_domain} must be at least 0; 0 is all of them.")
    sources = [_Windows(corpus, "validation", i, sequence_length) for i in range(len(corpus.domains))]
    counts = [min(len(source), max_sequences_per_domain or len(source)) for source in sources]
    return EvaluationBatches(sources, counts, batch_size)


class EvaluationBatches:
    """Batches that are computed each time they are indexed; see `evaluation_batches`."""

    def __init__(self, sources: "Sequence[_Windows]", counts: Sequence[int], batch_size: int) -> None:
        self._sources = sources
        self._ends = list(itertools.accumulate(counts))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return _ceil_divide(self._ends[-1], self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Batch:
        return self.batch_at(index)

    def batch_at(self, index: int, rows: tuple[int, int] | None = None) -> Batch:
        """Batch `index`, or only its rows (start, stop)."""
        index = operator.index(index)
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} evaluation batches and no batch {index}.")
        start = index * self._batch_size
        return _stack([self._row(start + row) for row in _rows(rows, self._batch_size)])

    def _row(self, row: int) -> Batch:
        if row >= self._ends[-1]:
            return self._sources[0].padding()
        domain = bisect.bisect_right(self._ends, row)
        return self._sources[domain][row - (self._ends[domain - 1] if domain else 0)]


class _Windows:
    """One stream as a random-access source of windows: what grain calls a RandomAccessDataSource."""

    def __init__(self, corpus: Corpus, split: str, domain: int, sequence_length: int) -> None:
        self._stream = corpus.stream(split, corpus.domains[domain])
        self._domain = domain
        self._sequence_length = sequence_length
        self._tokenizer = corpus.tokenizer
        self._bytes_per_token = corpus.tokenizer.bytes_per_token

    def __len__(self) -> int:
        return _count(self._stream, self._sequence_length)

    def __repr__(self) -> str:
        return f"_Windows(domain={self._domain}, sequence_length={self._sequence_length}, length={len(self)})"

    def padding(self) -> Batch:
        """A row that is all padding."""
        zeros = np.zeros(self._sequence_length, np.int32)
        return Batch(zeros, zeros, zeros, zeros, zeros > 0, np.array(-1, np.int32), np.array(0, np.int32))

    def __getitem__(self, index: int) -> Batch:
        start = index * self._sequence_length
        piece = self._stream.tokens[start : start + self._sequence_length + 1].astype(np.int32)
        segment_ids, positions = _documents(self._stream.offsets, start, len(piece) - 1)
        num_bytes = self._bytes_per_token[piece[1:]].sum() - self._leads(start, len(piece) - 1)
        pad = self._padded
        return Batch(
            pad(piece[:-1]),
            pad(piece[1:]),
            pad(segment_ids),
            pad(positions),
            pad(segment_ids) > 0,
            np.array(self._domain, np.int32),
            np.array(num_bytes, np.int32),
        )

    def _leads(self, start: int, length: int) -> int:
        """Bytes put before the texts whose first token is a target of [start, start + length) by the tokenizer."""
        if not self._tokenizer.lead_bytes:
            return 0
        offsets = self._stream.offsets
        first, last = np.searchsorted(offsets[:-1], [start, start + length])
        texts = (self._stream.tokens[offsets[i] + 1 : offsets[i + 1]] for i in range(first, last))
        return sum(self._tokenizer.lead(text[: 2 * self._tokenizer.lead_bytes]) for text in texts)

    def _padded(self, values: np.ndarray) -> np.ndarray:
        row = np.zeros(self._sequence_length, np.int32)
        row[: len(values)] = values
        return row


class _Interleave:
    """k -> (domain, index in the domain) of element k: grain's selection map, with exact shares.

    Of the first k elements, ceil(k * share / total) come from the first domain; the others divide the rest in the same
    way. So of every `total` elements each domain supplies exactly its share. (`MapDataset.mix` does the same after
    rounding weights to about 1 %, which would repeat some windows before others were seen.)
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares = shares

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> tuple[int, int]:
        rest = sum(self._shares)
        for domain, share in enumerate(self._shares):
            before = _ceil_divide(k * share, rest)  # elements of this domain among the first k
            if _ceil_divide((k + 1) * share, rest) > before:
                return domain, before
            k -= before
            rest -= share
        raise AssertionError("the last domain supplies whatever is left")


def _count(stream: Stream, sequence_length: int) -> int:
    return _ceil_divide(stream.num_tokens - 1, sequence_length)


def _ceil_divide(a: int, b: int) -> int:
    return (a + b - 1) // b


def _documents(offsets: np.ndarray, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (from 1) and positions of the stream's tokens [start, start + length)."""
    first, last = np.searchsorted(offsets, [start, start + length - 1], side="right")
    starts = np.maximum(offsets[first - 1 : last], start)
    places = np.arange(start, start + length)
    segment_ids = np.searchsorted(starts, places, side="right")
    return segment_ids, places - starts[segment_ids - 1]


def _shuffled(map_dataset: Any, corpus: Corpus, domain: int, sequence_length: int, seed: int) -> Any:
    # a hash of (seed, domain), not seed + domain: neighbouring seeds must not share permutations, and
    # leaving one domain out must not change the order of the others
    seed = int(np.random.SeedSequence([seed, domain]).generate_state(1)[0])
    windows = _Windows(corpus, "train", domain, sequence_length)
    return map_dataset.source(windows).seed(seed).shuffle().repeat()


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def _shares(corpus: Corpus, sequence_length: int, weights: Mapping[str, float] | None) -> list[int]:
    """Integer shares of the domains, exactly proportional to the weights as written in decimal."""
    if not weights:
        return list(count_windows(corpus, "train", sequence_length))
    check_weights(corpus.domains, weights)
    fractions = [Fraction(repr(float(weights[domain]))) for domain in corpus.domains]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def check_weights(domains: Sequence[str], weights: Mapping[str, float]) -> None:
    """Raises a ValueError unless `weights` names every domain, and no other, with a share of 0 or more."""
    names = f"the domains are {', '.join(domains)}"
    for domain, weight in weights.items():
        if domain not in domains:
            raise ValueError(f"data.weights has {domain}={weight}, but the corpus has no such domain; {names}.")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"data.weights.{domain}={weight!r} must be a finite number of at least 0.")
    missing = [domain for domain in domains if domain not in weights]
    if missing:
        raise ValueError(
            f"data.weights does not name {missing[0]} and must name every domain ({names}); give 0 to leave one out."
        )
    if not any(weights.values()):
        raise ValueError(f"data.weights are all 0 and at least one must be positive; {names}.")


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def _rows(rows: tuple[int, int] | None, batch_size: int) -> range:
    start, stop = (0, batch_size) if rows is None else rows
    if not 0 <= start < stop <= batch_size:
        raise ValueError(f"rows={rows} must be (start, stop) with 0 <= start < stop <= batch_size={batch_size}.")
    return range(start, stop)
