"""A step number becomes a batch, without any state in between.

A sequence is row i of a domain: window i of its stream, with tokens [i*S, i*S + S) as inputs and the same shifted by
one as targets, or documents packed by best fit. Every token but the very first is a target exactly once. Which rows
make up batch n is computed from (seed, n) alone, by grain: each domain's rows get a new permutation every epoch, and
the domains are interleaved by weight. So a run resumes at step n by computing batch n, and one of many processes
computes only its rows of it.

Legend: B batch, S sequence, V vocabulary.
"""

import bisect
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from moe_jax.data.corpus import Corpus
from moe_jax.data.mixture import Interleave, ceil_divide, shares_of
from moe_jax.data.packing import layout_of


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
        mask: bool[B, S], True where the target counts: exactly where segment_ids > 0. Of a corpus with weights
            float32[B, S], how much it counts in the training loss, at least 0; in evaluation bool, True where that is
            not 0. A token whose target does not count is attended to and routed all the same.
        domain: int32[B], index into `Corpus.domains`; -1 for a row that is all padding.
        num_bytes: int32[B], UTF-8 bytes of the targets that count (separators are 0 bytes); with weights float32[B],
            each byte as much as its target counts.
    """

    tokens: Any
    targets: Any
    segment_ids: Any
    positions: Any
    mask: Any
    domain: Any
    num_bytes: Any

    @property
    def num_tokens(self) -> Any:
        """int32[]: the tokens that are not padding, whether their targets count or not."""
        return (self.segment_ids > 0).sum(dtype=np.int32)

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


def total_of(counts: Any) -> Any:
    """The sum of a mask or of other counts: int32[] of flags and integers, float32[] of weights."""
    return counts.sum(dtype=np.float32 if counts.dtype == np.float32 else np.int32)


class BatchAt(Protocol):
    """(step, rows) -> those rows of the step's batch; all of them where `rows` is left out.

    padding: the share of the places in its rows that are padding, on average.
    """

    padding: float

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
    streams = (corpus.stream(split, domain) for domain in corpus.domains)
    return tuple(len(layout_of("stream", stream, sequence_length)) for stream in streams)


def training_batches(
    corpus: Corpus,
    *,
    seed: int,
    batch_size: int,
    sequence_length: int,
    weights: Mapping[str, float] | None = None,
    packing: str = "stream",
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
            empty: proportional to the number of rows, so that one epoch of the mixture is every row exactly
            once.
        packing: "stream" cuts a domain's stream into windows of S tokens; "best_fit" packs whole documents into rows
            and pads them; the plan is made here, in 0.2 to 2 s a million documents.

    Returns:
        batch_at: int step >= 0, rows (0 <= start < stop <= B, or None for all) -> Batch of those rows.

    Raises:
        ValueError: an argument is out of range, or weights name an unknown domain, miss one, are negative or
            all 0.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0.")
    _check_sizes(batch_size, sequence_length)
    domains = range(len(corpus.domains))
    named = shares_of(corpus.domains, weights) if weights else [1] * len(domains)
    weighted = corpus.weighted
    rows = {i: _Rows(corpus, "train", i, sequence_length, packing, weighted) for i in domains if named[i]}
    return _TrainingBatches(rows, [named[i] if weights else len(own) for i, own in rows.items()], seed, batch_size)


class _TrainingBatches:
    """The rows of domains, shuffled and interleaved by their shares; see `training_batches`."""

    def __init__(self, rows: Mapping[int, "_Rows"], shares: Sequence[int], seed: int, batch_size: int) -> None:
        import grain  # two seconds; checking a config does not need it

        def shuffled(domain: int, own: _Rows) -> Any:
            # a hash of (seed, domain), not seed + domain: neighbouring seeds must not share permutations, and
            # leaving one domain out must not change the order of the others
            of_domain = int(np.random.SeedSequence([seed, domain]).generate_state(1)[0])
            return grain.MapDataset.source(own).seed(of_domain).shuffle().repeat()

        datasets = [shuffled(domain, own) for domain, own in rows.items()]
        self._mixture = grain.MapDataset.select_from_datasets(datasets, Interleave(shares))
        self._batch_size = batch_size
        paddings = (share * own.padding for share, own in zip(shares, rows.values(), strict=True))
        self.padding = sum(paddings) / sum(shares)

    def __call__(self, step: int, rows: tuple[int, int] | None = None) -> Batch:
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step={step} must be at least 0.")
        first = step * self._batch_size
        return _stack([self._mixture[first + row] for row in _rows(rows, self._batch_size)])


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
    sources = [_Rows(corpus, "validation", i, sequence_length) for i in range(len(corpus.domains))]
    counts = [min(len(source), max_sequences_per_domain or len(source)) for source in sources]
    return EvaluationBatches(sources, counts, batch_size)


class EvaluationBatches:
    """Batches that are computed each time they are indexed; see `evaluation_batches`."""

    def __init__(self, sources: "Sequence[_Rows]", counts: Sequence[int], batch_size: int) -> None:
        self._sources = sources
        self._ends = list(itertools.accumulate(counts))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return ceil_divide(self._ends[-1], self._batch_size)

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
            return self._sources[0].empty()
        domain = bisect.bisect_right(self._ends, row)
        return self._sources[domain][row - (self._ends[domain - 1] if domain else 0)]


class _Rows:
    """The rows of one domain as a random-access source: what grain calls a RandomAccessDataSource.

    Args:
        weighted: whether masks are the weights of the targets; otherwise they are True where that is not 0.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        domain: int,
        sequence_length: int,
        packing: str = "stream",
        weighted: bool = False,
    ) -> None:
        self._stream = corpus.stream(split, corpus.domains[domain])
        self._layout = layout_of(packing, self._stream, sequence_length)
        self._domain = domain
        self._sequence_length = sequence_length
        self._weighted = weighted
        self._tokenizer = corpus.tokenizer
        self._bytes_per_token = corpus.tokenizer.bytes_per_token

    def __len__(self) -> int:
        return len(self._layout)

    def __repr__(self) -> str:
        return f"_Rows(domain={self._domain}, sequence_length={self._sequence_length}, length={len(self)})"

    @property
    def padding(self) -> float:
        """The share of the rows' places that are padding."""
        return 1 - (self._stream.num_tokens - 1) / (len(self) * self._sequence_length)

    def empty(self) -> Batch:
        """A row that is all padding."""
        tokens, targets, segment_ids, positions = np.zeros((4, self._sequence_length), np.int32)
        mask = np.zeros(self._sequence_length, np.float32 if self._weighted else bool)
        num_bytes = np.array(0, np.float32 if self._weighted else np.int32)
        return Batch(tokens, targets, segment_ids, positions, mask, np.array(-1, np.int32), num_bytes)

    def __getitem__(self, index: int) -> Batch:
        row = self.empty()
        row.domain[()] = self._domain
        weights = self._stream.weights
        place = documents = 0
        for start, length in self._layout[index]:
            own = slice(place, place + length)
            stop = start + length
            tokens = self._stream.tokens[start : stop + 1]
            segment_ids, row.positions[own] = _documents(self._stream.offsets, start, length)
            row.tokens[own], row.targets[own] = tokens[:-1], tokens[1:]
            row.segment_ids[own] = segment_ids + documents
            row.mask[own] = True if weights is None else weights[start + 1 : stop + 1]
            row.num_bytes[()] += (row.mask[own] * self._bytes(start, tokens[1:])).sum(dtype=row.num_bytes.dtype)
            place += length
            documents += segment_ids[-1]
        return row

    def _bytes(self, start: int, targets: np.ndarray) -> np.ndarray:
        """The bytes of the texts in each target of [start, ...), without those that the tokenizer put before a text."""
        counts = self._bytes_per_token[targets]
        if self._tokenizer.lead_bytes:
            offsets = self._stream.offsets
            first, last = np.searchsorted(offsets[:-1], [start, start + len(targets)])
            for i in range(first, last):  # the texts whose first token is a target
                text = self._stream.tokens[offsets[i] + 1 : offsets[i + 1]]
                counts[offsets[i] - start] -= self._tokenizer.lead(text[: 2 * self._tokenizer.lead_bytes])
        return counts


def _documents(offsets: np.ndarray, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (from 1) and positions of the stream's tokens [start, start + length)."""
    first, last = np.searchsorted(offsets, [start, start + length - 1], side="right")
    starts = np.maximum(offsets[first - 1 : last], start)
    places = np.arange(start, start + length)
    segment_ids = np.searchsorted(starts, places, side="right")
    return segment_ids, places - starts[segment_ids - 1]


def _stack(rows: Sequence[Batch]) -> Batch:
    return Batch(*map(np.stack, zip(*rows, strict=True)))


def _check_sizes(batch_size: int, sequence_length: int) -> None:
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def _rows(rows: tuple[int, int] | None, batch_size: int) -> range:
    start, stop = (0, batch_size) if rows is None else rows
    if not 0 <= start < stop <= batch_size:
        raise ValueError(f"rows={rows} must be (start, stop) with 0 <= start < stop <= batch_size={batch_size}.")
    return range(start, stop)
