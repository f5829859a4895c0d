"""Laws of batches: windows checkable by hand, and `batch_at` as a pure function of (seed, step)."""

import concurrent.futures
import dataclasses
import random

import numpy as np
import pytest

from moe_jax.data import count_windows, evaluation_batches, make_corpus, training_batches
from moe_jax.data.batches import total_of

SEPARATOR = 256
# Streams: "a" trains on 256 97 98 256 99 and "b" on 256 and 13 letters.
SMALL = make_corpus(
    {
        "a": {"train": ["ab", "c"], "validation": ["xy", "z"]},
        "b": {"train": ["defghijklmnop"], "validation": ["é"]},
    }
)
LARGE = make_corpus(
    {
        name: {"train": [f"{name} document {i} " * (1 + i % 7) for i in range(40)], "validation": ["v"]}
        for name in ("red", "green", "blue")
    }
)


def rows(batches):
    """The single rows of batches, as one Batch with all of them."""
    return type(batches[0])(*(np.concatenate(field) for field in zip(*batches, strict=True)))


def same(one, other):
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def windows_of(batch):
    """Each row as bytes: which window it is (the tests' windows all differ)."""
    return [
        (int(domain), tokens.tobytes(), targets.tobytes())
        for domain, tokens, targets in zip(batch.domain, batch.tokens, batch.targets, strict=True)
    ]


def test_windows_by_hand():
    # "a" held out is 256 x y 256 z: four targets, so two windows of two.
    # "b" is 256 C3 A9: two targets, one window.
    first, second = evaluation_batches(SMALL, batch_size=2, sequence_length=2)
    assert first.tokens.tolist() == [[256, 120], [121, 256]]
    assert first.targets.tolist() == [[120, 121], [256, 122]]
    assert first.segment_ids.tolist() == [[1, 1], [1, 2]]
    assert first.positions.tolist() == [[0, 1], [0, 0]]  # y's document began before its window, so y is at 0
    assert first.mask.tolist() == [[True, True], [True, True]]
    assert first.domain.tolist() == [0, 0]
    assert first.num_bytes.tolist() == [2, 1]  # the separator is no text
    assert second.tokens.tolist() == [[256, 0xC3], [0, 0]]
    assert second.num_bytes.tolist() == [2, 0]


def test_a_last_partial_window_and_missing_rows_are_padding():
    # Batch 0 is "a": 256 x y, then 256 (-> z). Batch 1 is "b": 256 C3, then nothing.
    batch = evaluation_batches(SMALL, batch_size=2, sequence_length=3)[1]
    assert batch.tokens.tolist() == [[256, 0xC3, 0], [0, 0, 0]]
    assert batch.targets.tolist() == [[0xC3, 0xA9, 0], [0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert batch.mask.tolist() == [[True, True, False], [False, False, False]]
    assert batch.domain.tolist() == [1, -1]


@pytest.mark.parametrize("sequence_length", [1, 2, 3, 7, 64, 10_000])
def test_fields_agree_with_each_other_and_shapes_and_dtypes_never_change(sequence_length):
    batch_at = training_batches(LARGE, seed=0, batch_size=6, sequence_length=sequence_length)
    lengths = LARGE.tokenizer.bytes_per_token
    for step in range(5):
        batch = batch_at(step)
        for field in (batch.tokens, batch.targets, batch.segment_ids, batch.positions):
            assert field.shape == (6, sequence_length)
            assert field.dtype == np.int32
            assert not field[~batch.mask].any()
        assert batch.mask.dtype == bool
        assert batch.domain.dtype == batch.num_bytes.dtype == np.int32
        assert np.array_equal(batch.mask, batch.segment_ids > 0)
        assert np.array_equal(batch.num_bytes, (lengths[batch.targets] * batch.mask).sum(1))
        assert (batch.positions < sequence_length).all()
        assert (batch.positions >= 0).all()


def test_segments_count_separators_and_positions_restart_at_them():
    batch = training_batches(LARGE, seed=0, batch_size=8, sequence_length=50)(0)
    for row in range(8):
        expected_segment, expected_position = 0, -1
        for column in np.flatnonzero(batch.mask[row]):
            starts = column == 0 or batch.tokens[row, column] == SEPARATOR
            expected_segment += starts
            expected_position = 0 if starts else expected_position + 1
            assert batch.segment_ids[row, column] == expected_segment
            assert batch.positions[row, column] == expected_position


def test_every_token_of_a_stream_is_a_target_exactly_once_per_epoch():
    for epoch in range(3):
        for index, domain in enumerate(LARGE.domains):
            weights = dict.fromkeys(LARGE.domains, 0) | {domain: 1}
            count = count_windows(LARGE, "train", 17)[index]
            batch_at = training_batches(LARGE, seed=3, batch_size=1, sequence_length=17, weights=weights)
            epoch_rows = rows([batch_at(step) for step in range(epoch * count, (epoch + 1) * count)])
            stream = LARGE.stream("train", domain).tokens
            expected = [stream[start : start + 18] for start in range(0, len(stream) - 1, 17)]
            parts = zip(epoch_rows.tokens, epoch_rows.targets, epoch_rows.mask, strict=True)
            found = sorted(row[:1].tolist() + target[mask].tolist() for row, target, mask in parts)
            assert found == sorted(piece.tolist() for piece in expected)
            assert epoch_rows.num_bytes.sum() == (stream != SEPARATOR).sum()


def test_without_weights_one_epoch_of_the_mixture_is_every_window_exactly_once():
    counts = count_windows(LARGE, "train", 16)
    total = sum(counts)
    batch_at = training_batches(LARGE, seed=1, batch_size=1, sequence_length=16)
    for epoch in range(2):
        found = rows([batch_at(step) for step in range(epoch * total, (epoch + 1) * total)])
        assert np.bincount(found.domain).tolist() == list(counts)
        alone = [
            training_batches(
                LARGE,
                seed=1,
                batch_size=count,
                sequence_length=16,
                weights=dict.fromkeys(LARGE.domains, 0) | {domain: 1},
            )(epoch)
            for domain, count in zip(LARGE.domains, counts, strict=True)
        ]
        assert sorted(windows_of(found)) == sorted(windows_of(rows(alone)))


def test_each_epoch_is_a_new_permutation():
    count = count_windows(LARGE, "train", 16)[0]
    batch_at = training_batches(
        LARGE, seed=1, batch_size=count, sequence_length=16, weights={"red": 1, "green": 0, "blue": 0}
    )
    epochs = [windows_of(batch_at(step)) for step in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_depends_on_seed_and_step_alone_in_any_order_and_from_threads():
    expected = [training_batches(LARGE, seed=5, batch_size=4, sequence_length=20)(step) for step in range(30)]
    batch_at = training_batches(LARGE, seed=5, batch_size=4, sequence_length=20)
    order = random.Random(0).sample(range(30), 30)
    assert all(same(batch_at(step), expected[step]) for step in order)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(batch_at, order * 4))
    assert all(same(result, expected[step]) for result, step in zip(results, order * 4, strict=True))


def test_another_seed_is_another_order_of_the_same_windows():
    total = sum(count_windows(LARGE, "train", 16))
    one, two = (
        windows_of(training_batches(LARGE, seed=seed, batch_size=total, sequence_length=16)(0)) for seed in (0, 1)
    )
    assert one != two
    assert sorted(one) == sorted(two)


SPLITS = [[(0, 6)], [(0, 3), (3, 6)], [(0, 1), (1, 5), (5, 6)], [(i, i + 1) for i in range(6)]]


@pytest.mark.parametrize("split", SPLITS, ids=len)
def test_a_batch_is_the_same_however_it_is_split_over_processes(split):
    batch_at = training_batches(LARGE, seed=2, batch_size=6, sequence_length=12)
    for step in (0, 1, 50, 10**9):
        assert same(rows([batch_at(step, part) for part in split]), batch_at(step))


def test_a_process_reads_only_its_own_rows(monkeypatch):
    from moe_jax.data import batches

    seen = []
    real = batches._Rows.__getitem__
    monkeypatch.setattr(batches._Rows, "__getitem__", lambda self, i: seen.append(i) or real(self, i))
    training_batches(LARGE, seed=2, batch_size=6, sequence_length=12)(4, (2, 4))
    assert len(seen) == 2
    evaluation_batches(LARGE, batch_size=3, sequence_length=1).batch_at(0, (2, 3))
    assert len(seen) == 3


@pytest.mark.parametrize("rows", [(-1, 2), (2, 2), (3, 2), (0, 7)])
def test_rows_outside_the_batch_are_refused(rows):
    batch_at = training_batches(LARGE, seed=2, batch_size=6, sequence_length=12)
    with pytest.raises(ValueError, match=r"must be \(start, stop\) with 0 <= start < stop <= batch_size=6"):
        batch_at(0, rows)


@pytest.mark.parametrize(
    "weights",
    [
        {"red": 1, "green": 2, "blue": 5},
        {"red": 0.125, "green": 0.25, "blue": 0.625},
        {"red": 0.1, "green": 0.2, "blue": 0.5},
    ],
)
def test_rows_follow_the_weights_exactly(weights):
    batch_at = training_batches(LARGE, seed=0, batch_size=8, sequence_length=16, weights=weights)
    for step in range(10):
        assert np.bincount(batch_at(step).domain).tolist() == [1, 2, 5]


def test_near_equal_weights_are_not_rounded():
    # Shares 250 : 251 : 0; after 501 rows each domain has given exactly its share.
    batch_at = training_batches(
        LARGE, seed=0, batch_size=501, sequence_length=4, weights={"red": 1.0, "green": 1.004, "blue": 0}
    )
    assert np.bincount(batch_at(0).domain).tolist() == [250, 251]


def test_weight_zero_leaves_a_domain_out_and_the_others_in_their_order():
    both = training_batches(LARGE, seed=0, batch_size=20, sequence_length=4, weights={"red": 1, "green": 0, "blue": 1})(
        0
    )
    blue = training_batches(LARGE, seed=0, batch_size=10, sequence_length=4, weights={"red": 0, "green": 0, "blue": 1})(
        0
    )
    assert set(both.domain) == {0, 2}
    assert [window for window in windows_of(both) if window[0] == 2] == windows_of(blue)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"red": 1, "green": 1, "blue": 1, "pink": 1},
            "pink=1, but the corpus has no such domain.*red, green",
        ),
        ({"red": 1}, "does not name green and must name every domain"),
        ({"red": -1, "green": 1, "blue": 1}, r"data.weights.red=-1 must be a finite number of at least 0"),
        ({"red": float("nan"), "green": 1, "blue": 1}, r"data.weights.red=nan must be"),
        ({"red": float("inf"), "green": 1, "blue": 1}, r"data.weights.red=inf must be"),
        ({"red": "1", "green": 1, "blue": 1}, r"data.weights.red='1' must be"),
        ({"red": 0, "green": 0, "blue": 0}, "are all 0 and at least one must be positive"),
    ],
)
def test_bad_weights_are_refused_in_a_sentence(weights, message):
    with pytest.raises(ValueError, match=message):
        training_batches(LARGE, seed=0, batch_size=1, sequence_length=4, weights=weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"packing": "first_fit"}, "data.packing='first_fit' is not known; use one of: stream, best_fit"),
    ],
)
def test_bad_sizes_are_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        training_batches(LARGE, **({"seed": 0, "batch_size": 6, "sequence_length": 4} | change))


def test_steps_are_whole_numbers_from_zero():
    batch_at = training_batches(LARGE, seed=2**40, batch_size=2, sequence_length=4)
    assert same(batch_at(np.int64(3)), batch_at(3))
    with pytest.raises(ValueError, match="step=-1 must be at least 0"):
        batch_at(-1)
    with pytest.raises(TypeError):
        batch_at(1.5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("sequence_length", [1, 2, 5, 100])
def test_evaluation_covers_the_held_out_text_exactly_once_in_order(batch_size, sequence_length):
    batches = evaluation_batches(SMALL, batch_size=batch_size, sequence_length=sequence_length)
    found = rows(list(batches))
    assert len(found.domain) == len(batches) * batch_size
    for index, domain in enumerate(SMALL.domains):
        targets = found.targets[found.domain == index][found.mask[found.domain == index]]
        assert targets.tolist() == SMALL.stream("validation", domain).tokens[1:].tolist()
    assert found.num_bytes.sum() == len("xyz") + len("é".encode())
    padding = found.domain == -1
    assert padding.sum() < batch_size
    assert not found.mask[padding].any()
    assert not padding[: (~padding).sum()].any()


def test_evaluation_can_be_repeated_indexed_and_limited():
    batches = evaluation_batches(SMALL, batch_size=2, sequence_length=1)
    assert all(same(a, b) for a, b in zip(batches, batches, strict=True))
    assert same(batches[-1], list(batches)[-1])
    with pytest.raises(IndexError):
        batches[len(batches)]
    limited = evaluation_batches(SMALL, batch_size=1, sequence_length=1, max_sequences_per_domain=1)
    assert rows(list(limited)).targets.tolist() == [[ord("x")], [0xC3]]
    with pytest.raises(ValueError, match="max_sequences_per_domain=-1 must be at least 0"):
        evaluation_batches(SMALL, batch_size=1, sequence_length=1, max_sequences_per_domain=-1)


@pytest.mark.parametrize("split", [[(0, 2), (2, 4)], [(0, 1), (1, 4)]])
def test_an_evaluation_batch_is_the_same_however_it_is_split_over_processes(split):
    batches = evaluation_batches(SMALL, batch_size=4, sequence_length=1)
    for index, whole in enumerate(batches):
        assert same(rows([batches.batch_at(index, part) for part in split]), whole)


# --- weights and packing ----------------------------------------------------------------------------------------


def weighing(corpus, **weights):
    """The corpus with weights of the training and held-out tokens of some domains."""
    streams = dict(corpus.streams)
    for domain, by_split in weights.items():
        for split, values in by_split.items():
            streams[split, domain] = dataclasses.replace(streams[split, domain], weights=np.float16(values))
    return dataclasses.replace(corpus, streams=streams)


WEIGHED = weighing(SMALL, a={"train": [1, 0, 2, 0.5, 0], "validation": [1, 0, 2, 0.5, 0]})


def test_weights_are_those_of_the_targets_and_of_their_bytes():
    # "a" trains on 256 97 98 256 99, whose targets 97 98 256 99 weigh 0 2 0.5 0; 98 is one byte, which weighs 2
    batch = training_batches(WEIGHED, seed=0, batch_size=1, sequence_length=6, weights={"a": 1, "b": 0})(0)
    assert batch.mask.dtype == batch.num_bytes.dtype == np.float32
    assert batch.mask.tolist() == [[0, 2, 0.5, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 0, 0]]
    assert batch.num_bytes.tolist() == [2]
    assert batch.num_tokens == 4
    assert total_of(batch.mask) == 2.5


def test_a_domain_without_weights_counts_once_beside_one_that_has_some():
    batch = training_batches(WEIGHED, seed=0, batch_size=1, sequence_length=16, weights={"a": 0, "b": 1})(0)
    assert batch.mask.dtype == np.float32
    assert batch.mask.tolist() == [[1] * 13 + [0] * 3]
    assert batch.num_bytes.tolist() == [13]


def test_weights_of_held_out_tokens_alone_leave_training_as_it_is():
    corpus = weighing(SMALL, a={"validation": [1, 0, 2, 0.5, 0]})
    ours, theirs = (training_batches(c, seed=0, batch_size=2, sequence_length=4)(0) for c in (corpus, SMALL))
    assert same(ours, theirs)


def test_evaluation_counts_a_target_that_is_trained_on_once_whatever_it_weighs():
    # "a" holds out 256 x y 256 z, whose targets x y 256 z weigh 0 2 0.5 0
    first, _ = evaluation_batches(WEIGHED, batch_size=1, sequence_length=6)
    assert first.mask.dtype == bool
    assert first.mask.tolist() == [[False, True, True, False, False, False]]
    assert first.num_bytes.dtype == np.int32
    assert first.num_bytes.tolist() == [1]
    assert first.num_tokens == 4


def test_packed_rows_by_hand():
    # "a" is 256 a b | 256 c: three inputs and one, in one row; the stream's last token is no input
    batch_at = training_batches(
        WEIGHED, seed=0, batch_size=1, sequence_length=6, weights={"a": 1, "b": 0}, packing="best_fit"
    )
    batch = batch_at(0)
    assert batch.tokens.tolist() == [[256, 97, 98, 256, 0, 0]]
    assert batch.targets.tolist() == [[97, 98, 256, 99, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 0]]
    assert batch.mask.tolist() == [[0, 2, 0.5, 0, 0, 0]]
    assert batch_at.padding == pytest.approx(2 / 6)


def test_packed_rows_hold_whole_documents_and_every_target_once_in_an_epoch():
    batch_at = training_batches(LARGE, seed=0, batch_size=7, sequence_length=200, packing="best_fit")
    found = []
    for step in range(100):
        batch = batch_at(step)
        for row in range(7):
            tokens, targets, segments = (field[row] for field in (batch.tokens, batch.targets, batch.segment_ids))
            for number in range(1, segments.max() + 1):
                own = segments == number
                found.append((tokens[own].tobytes(), targets[own].tobytes()))
                assert tokens[own][0] == SEPARATOR
                assert batch.positions[row][own].tolist() == list(range(own.sum()))
    documents = sum(LARGE.stream("train", domain).num_documents for domain in LARGE.domains)
    assert len(set(found)) == documents


def test_packed_batches_are_a_function_of_seed_and_step_alone_however_they_are_split():
    batch_at = training_batches(LARGE, seed=3, batch_size=6, sequence_length=64, packing="best_fit")
    again = training_batches(LARGE, seed=3, batch_size=6, sequence_length=64, packing="best_fit")
    for step in (5, 0, 2):
        halves = [again(step, (0, 2)), again(step, (2, 6))]
        assert same(rows(halves), batch_at(step))
    other = training_batches(LARGE, seed=4, batch_size=6, sequence_length=64, packing="best_fit")
    assert windows_of(other(0)) != windows_of(batch_at(0))
