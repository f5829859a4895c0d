"""Laws of packing: best fit is what a slow search finds, and every target is in a row exactly once."""

import bisect

import numpy as np
import pytest

from moe_jax.data.packing import BestFit, Windows, best_fit


def slowly(lengths, capacity):
    """The room left in every row after best-fit-decreasing, sorted."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        room = rooms.pop(place) if place < len(rooms) else capacity
        bisect.insort(rooms, room - length)
    return rooms


def test_rows_by_hand():
    # 6 opens a row, 5 another, 4 fits the first exactly, 3 and 2 the second exactly, and 2 more open a third
    assert best_fit(np.array([2, 6, 3, 5, 4, 2]), 10).tolist() == [1, 0, 1, 1, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_placed_as_a_search_of_all_rows_places_them(seed):
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(1, 60))
    lengths = draw.integers(1, capacity + 1, int(draw.integers(1, 400)))
    lengths = np.minimum(lengths, draw.integers(1, capacity + 1))  # many of one length
    rooms = capacity - np.bincount(best_fit(lengths, capacity), lengths)
    assert sorted(rooms.tolist()) == slowly(lengths.tolist(), capacity)


def test_only_documents_longer_than_a_row_are_cut_into_as_few_pieces_as_possible():
    # documents of 3, 10 and 4 tokens, of which the stream's last is no input: rows of 4 hold 4, 4, 3, 3 and 2
    layout = BestFit(np.array([0, 3, 13, 17]), 4)
    assert sorted(tuple(layout[row]) for row in range(len(layout))) == [
        ((0, 3),),
        ((3, 4),),
        ((7, 4),),
        ((11, 2),),
        ((13, 3),),
    ]


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 1000])
def test_every_token_but_the_last_is_an_input_exactly_once(sequence_length):
    offsets = np.cumsum([0, *np.random.default_rng(0).integers(2, 90, 50)])
    for layout in (BestFit(offsets, sequence_length), Windows(int(offsets[-1]) - 1, sequence_length)):
        rows = [layout[row] for row in range(len(layout))]
        assert all(rows)
        assert max(sum(length for _, length in row) for row in rows) <= sequence_length
        places = [place for row in rows for start, length in row for place in range(start, start + length)]
        assert sorted(places) == list(range(int(offsets[-1]) - 1))
    within = [(start, start + length) for row in rows for start, length in row]
    assert len(within) == len(rows)  # a window is one piece


def test_a_piece_is_inside_one_document():
    offsets = np.cumsum([0, *np.random.default_rng(1).integers(2, 90, 50)])
    layout = BestFit(offsets, 32)
    for row in range(len(layout)):
        for start, length in layout[row]:
            first, last = np.searchsorted(offsets, [start, start + length - 1], side="right")
            assert first == last
