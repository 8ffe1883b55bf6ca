"""The document lengths of a shard go in, the parts of each of its rows come out: a pure function of the lengths."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Rows as runs of parts: row r has the parts [firsts[r], firsts[r + 1]).

    A part is the tokens [starts, stops) of the shard, out of document `documents`. `dropped` and `truncated` count
    documents that were longer than a row, `tokens_lost` the tokens that went with them.
    """

    firsts: Ints
    starts: Ints
    stops: Ints
    documents: Ints
    dropped: int = 0
    truncated: int = 0
    tokens_lost: int = 0

    @property
    def rows(self) -> int:
        """How many rows the shard gives."""
        return len(self.firsts) - 1


def pack_text(lengths: Ints, row_tokens: int) -> Packing:
    """Documents laid end to end and cut into rows; the last row holds the rest, so that no token is lost.

    Lengths 5, 4 in rows of 4 give the parts [0, 4) | [4, 5) [5, 8) | [8, 9).
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    cuts = np.arange(0, total, row_tokens)
    bounds = np.union1d(offsets, cuts)
    starts, stops = bounds[:-1], bounds[1:]
    return Packing(
        firsts=np.append(np.searchsorted(starts, cuts), len(starts)),
        starts=starts,
        stops=stops,
        documents=np.searchsorted(offsets, starts, side="right") - 1,
    )


def pack_chat(lengths: Ints, row_tokens: int, too_long: Literal["drop", "truncate"]) -> Packing:
    """Whole documents in as few rows as best-fit-decreasing finds; one longer than a row is dropped or cut, and counted."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    is_long = lengths > row_tokens
    fitted = np.minimum(lengths, row_tokens)
    kept = np.arange(len(lengths)) if too_long == "truncate" else np.flatnonzero(~is_long)
    order = kept[np.argsort(-fitted[kept], kind="stable")]
    row_of = np.array(best_fit(fitted[order].tolist(), row_tokens), np.int64)
    by_row = np.argsort(row_of, kind="stable")
    documents = order[by_row]
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    num_long = int(is_long.sum())
    lost = lengths[is_long] - (row_tokens if too_long == "truncate" else 0)
    return Packing(
        firsts=np.searchsorted(row_of[by_row], np.arange(num_rows + 1)),
        starts=offsets[documents],
        stops=offsets[documents] + fitted[documents],
        documents=documents,
        dropped=num_long if too_long == "drop" else 0,
        truncated=num_long if too_long == "truncate" else 0,
        tokens_lost=int(lost.sum()),
    )


def best_fit(lengths: list[int], row_tokens: int) -> list[int]:
    """For each length, in the given order, the row with the least room that still holds it, else a new row.

    Rooms are kept as one big whole number whose bit r says that some row has r tokens left, so that the least room
    of at least n tokens is its lowest set bit from n on.
    """
    rooms = 0
    rows_with_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    row_of = []
    num_rows = 0
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_tokens, num_rows
            num_rows += 1
        left = room - length
        rows_with_room[left].append(row)
        rooms |= 1 << left
        row_of.append(row)
    return row_of
