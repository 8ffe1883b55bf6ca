"""Packing loses nothing that it does not count, splits no conversation, and fills rows well."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmix.data.packing import best_fit, pack_chat, pack_text

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def rows_of(packing):
    """Each row as a list of (start, stop, document)."""
    parts = list(zip(packing.starts, packing.stops, packing.documents, strict=True))
    return [
        parts[first:end] for first, end in zip(packing.firsts[:-1], packing.firsts[1:], strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_text_is_laid_end_to_end_and_no_token_is_lost(lengths, row_tokens):
    owner = np.repeat(np.arange(len(lengths)), lengths)
    seen = []
    rows = rows_of(pack_text(np.array(lengths), row_tokens))
    for index, row in enumerate(rows):
        filled = sum(stop - start for start, stop, _ in row)
        assert filled == row_tokens or index == len(rows) - 1
        for start, stop, document in row:
            assert (owner[start:stop] == document).all()
            seen += range(start, stop)
    assert seen == list(range(sum(lengths)))


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.sampled_from(["drop", "truncate"]))
def test_chats_are_whole_and_what_is_too_long_is_counted(lengths, row_tokens, too_long):
    packing = pack_chat(np.array(lengths), row_tokens, too_long)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    seen = []
    for row in rows_of(packing):
        assert 0 < sum(stop - start for start, stop, _ in row) <= row_tokens
        for start, stop, document in row:
            assert start == offsets[document]
            assert stop - start == min(lengths[document], row_tokens)
            seen.append(document)
    long = [i for i, length in enumerate(lengths) if length > row_tokens]
    assert len(seen) == len(set(seen)) == len(lengths) - packing.dropped
    assert (packing.dropped if too_long == "drop" else packing.truncated) == len(long)
    kept_tokens = int((packing.stops - packing.starts).sum())
    assert kept_tokens + packing.tokens_lost == sum(lengths)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(50, 100))
def test_best_fit_is_that_of_a_plain_search(lengths, row_tokens):
    rooms, expected = [], []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=None)
        if room is None:
            rooms.append(row_tokens)
            room = row_tokens
        rooms[rooms.index(room)] = room - length
        expected.append(room - length)
    left = [row_tokens] * len(lengths)
    found = []
    for row, length in zip(best_fit(lengths, row_tokens), lengths, strict=True):
        left[row] -= length
        found.append(left[row])
    assert found == expected


def test_chats_of_real_lengths_fill_their_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.7, 5000), 20, 2048).astype(int)
    packing = pack_chat(lengths, 2048, "drop")
    assert lengths.sum() / (packing.rows * 2048) > 0.99
