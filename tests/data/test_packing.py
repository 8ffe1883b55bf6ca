"""Packing loses nothing that it does not count, splits no conversation, and fills rows well."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmix.data.packing import (
    ChatRows,
    PackingOptions,
    count_chat_rows,
    pack_chat,
    pack_text,
)

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def rows_of(packing):
    """Each row as a list of (start, stop, document)."""
    parts = list(zip(packing.starts, packing.stops, packing.documents, strict=True))
    return [
        parts[first:end] for first, end in zip(packing.firsts[:-1], packing.firsts[1:], strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 45))
def test_no_token_of_a_text_is_lost_and_short_documents_stay_whole(lengths, row_tokens, whole):
    owner = np.repeat(np.arange(len(lengths)), lengths)
    seen, parts_of = [], [0] * len(lengths)
    options = PackingOptions(row_tokens=row_tokens, whole_below=whole)
    rows = rows_of(pack_text(np.array(lengths), options))
    for index, row in enumerate(rows):
        fill_ratio = sum(stop - start for start, stop, _ in row)
        assert 0 < fill_ratio <= row_tokens
        if index + 1 < len(rows) and fill_ratio < row_tokens:
            following = rows[index + 1][0][2]
            assert lengths[following] < whole and lengths[following] > row_tokens - fill_ratio
        for start, stop, document in row:
            assert (owner[start:stop] == document).all()
            seen += range(start, stop)
            parts_of[document] += 1
    assert seen == list(range(sum(lengths)))
    for length, parts in zip(lengths, parts_of, strict=True):
        assert parts == 1 or length >= whole or length > row_tokens


def test_text_that_may_be_split_anywhere_is_cut_at_multiples_of_the_row():
    packing = pack_text(np.array([5, 4]), PackingOptions(row_tokens=4))
    assert rows_of(packing) == [[(0, 4, 0)], [(4, 5, 0), (5, 8, 1)], [(8, 9, 1)]]
    packing = pack_text(np.array([5, 4]), PackingOptions(row_tokens=4, whole_below=5))
    assert rows_of(packing) == [[(0, 4, 0)], [(4, 5, 0)], [(5, 9, 1)]]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.sampled_from(["drop", "truncate"]))
def test_chats_are_whole_and_what_is_too_long_is_counted(lengths, row_tokens, too_long):
    options = PackingOptions(row_tokens=row_tokens, long_documents=too_long)
    packing = pack_chat(np.array(lengths), options)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    seen = []
    for row in rows_of(packing):
        assert 0 < sum(stop - start for start, stop, _ in row) <= row_tokens
        for start, stop, document in row:
            assert start == offsets[document]
            assert stop - start == min(lengths[document], row_tokens)
            seen.append(document)
    long = [i for i, length in enumerate(lengths) if length > row_tokens]
    left_out = ChatRows(options=options).dropped(np.array(lengths))
    assert len(seen) == len(set(seen)) == len(lengths) - left_out.dropped
    assert (left_out.dropped if too_long == "drop" else left_out.truncated) == len(long)
    kept_tokens = int((packing.stops - packing.starts).sum())
    assert kept_tokens + left_out.num_tokens == sum(lengths)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(50, 100))
def test_rows_are_filled_as_a_plain_best_fit_decreasing_fills_them(lengths, row_tokens):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=None)
        if room is None:
            rooms.append(row_tokens)
            room = row_tokens
        rooms[rooms.index(room)] = room - length
    options = PackingOptions(row_tokens=row_tokens)
    packing = pack_chat(np.array(lengths), options)
    found = [row_tokens - sum(stop - start for start, stop, _ in row) for row in rows_of(packing)]
    assert sorted(found) == sorted(rooms)
    assert count_chat_rows(np.array(lengths), options) == len(rooms)


@pytest.mark.parametrize("mean", [4.0, 5.2, 6.2])
def test_chats_of_real_lengths_fill_their_rows(mean):
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(mean, 0.7, 20_000), 20, 2048).astype(int)
    packing = pack_chat(lengths, PackingOptions(row_tokens=2048))
    assert lengths.sum() / (packing.num_rows * 2048) > 0.99


def test_no_chat_fits_and_none_is_there():
    options = PackingOptions(row_tokens=4, whole_below=2)
    for lengths in (np.array([9, 9]), np.zeros(0, np.int64)):
        packing = pack_chat(lengths, options)
        assert packing.num_rows == 0 == count_chat_rows(lengths, options)
    assert pack_text(np.zeros(0, np.int64), options).num_rows == 0
