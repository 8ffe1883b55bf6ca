"""The document lengths of a shard go in, the parts of each of its rows come out: a pure function of the lengths.

Text that may be split anywhere needs no packing: row r of a shard is its tokens [r * T, (r + 1) * T).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
LongDocuments = Literal["drop", "truncate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """Documents that were longer than a row, dropped or cut, and the tokens that went with them."""

    dropped: int = 0
    truncated: int = 0
    tokens: int = 0

    def __add__(self, other: "Lost") -> "Lost":
        return Lost(
            dropped=self.dropped + other.dropped,
            truncated=self.truncated + other.truncated,
            tokens=self.tokens + other.tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Rows as runs of parts: row r has the parts [firsts[r], firsts[r + 1]).

    A part is the tokens [starts, stops) of the shard, out of document `documents`.
    """

    firsts: Ints
    starts: Ints
    stops: Ints
    documents: Ints

    @property
    def rows(self) -> int:
        """How many rows the shard gives."""
        return len(self.firsts) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """`rows` rows from `first` on take `copies` documents of one length each."""

    first: int
    rows: int
    copies: int


def pack_text(lengths: Ints, row_tokens: int, whole_below: int) -> Packing:
    """Documents laid end to end and cut into rows, those shorter than `whole_below` tokens never inside.

    No token is lost: the last row holds the rest. With lengths 5, 4 in rows of 4 and `whole_below` 0 the parts are
    [0, 4) | [4, 5) [5, 8) | [8, 9); with `whole_below` 5 they are [0, 4) | [4, 5) | [5, 9).
    """
    firsts, starts, stops, documents = [0], list[int](), list[int](), list[int]()
    room, at = row_tokens, 0
    for document, length in enumerate(lengths.tolist()):
        end = at + length
        stays_whole = length < whole_below and length <= row_tokens
        if stays_whole and length > room:
            firsts.append(len(starts))
            room = row_tokens
        while at < end:
            if not room:
                firsts.append(len(starts))
                room = row_tokens
            take = min(room, end - at)
            starts.append(at)
            stops.append(at + take)
            documents.append(document)
            at, room = at + take, room - take
    if starts:
        firsts.append(len(starts))
    arrays = (np.array(values, np.int64) for values in (firsts, starts, stops, documents))
    first_a, start_a, stop_a, document_a = arrays
    return Packing(firsts=first_a, starts=start_a, stops=stop_a, documents=document_a)


def pack_chat(lengths: Ints, row_tokens: int, long_documents: LongDocuments) -> Packing:
    """Whole documents in as few rows as best-fit-decreasing finds; one longer than a row is dropped or cut."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    fitted = _fitted(lengths, row_tokens, long_documents)
    order = np.argsort(-fitted, kind="stable")[: np.count_nonzero(fitted)]
    runs = list(_best_fit(np.bincount(fitted, minlength=row_tokens + 1), row_tokens))
    rows = [np.repeat(np.arange(run.first, run.first + run.rows), run.copies) for run in runs]
    row_of = np.concatenate([np.zeros(0, np.int64), *rows])
    by_row = np.argsort(row_of, kind="stable")
    documents = order[by_row]
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    return Packing(
        firsts=np.searchsorted(row_of[by_row], np.arange(num_rows + 1)),
        starts=offsets[documents],
        stops=offsets[documents] + fitted[documents],
        documents=documents,
    )


def count_chat_rows(lengths: Ints, row_tokens: int, long_documents: LongDocuments) -> int:
    """How many rows `pack_chat` makes, at a fraction of its cost."""
    fitted = _fitted(lengths, row_tokens, long_documents)
    runs = _best_fit(np.bincount(fitted, minlength=row_tokens + 1), row_tokens)
    return max((run.first + run.rows for run in runs), default=0)


def lost(lengths: Ints, row_tokens: int, long_documents: LongDocuments) -> Lost:
    """What packing chats leaves out: documents longer than a row."""
    long = lengths[lengths > row_tokens]
    if long_documents == "drop":
        return Lost(dropped=len(long), tokens=int(long.sum()))
    return Lost(truncated=len(long), tokens=int((long - row_tokens).sum()))


def _fitted(lengths: Ints, row_tokens: int, long_documents: LongDocuments) -> Ints:
    """The tokens of each document that a row takes; 0 where it is left out."""
    if long_documents == "truncate":
        return np.minimum(lengths, row_tokens)
    return np.where(lengths > row_tokens, 0, lengths)


def _best_fit(count_of_length: Ints, row_tokens: int) -> Iterator[_Run]:
    """Best-fit-decreasing (Johnson, "Near-optimal bin packing algorithms", 1973), for all documents of a length at once.

    The row with the least room that still holds a document takes it; what is left then is less, so the same row takes
    the next one of that length as long as it fits. Rows with equal room are kept as runs of numbers, and which rooms
    there are as one big whole number whose bit r stands for room r: the least that fits is its lowest set bit from
    the length on.
    """
    rooms = 0
    rows_with_room: list[list[tuple[int, int]]] = [[] for _ in range(row_tokens + 1)]
    num_rows = 0
    lengths = np.flatnonzero(count_of_length[1:]) + 1
    for length in lengths[::-1].tolist():
        left = int(count_of_length[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, rows = rows_with_room[room].pop()
            else:
                room = row_tokens
                first, rows = num_rows, -(-left // (room // length))
                num_rows += rows
            copies = min(room // length, left)
            taken = min(rows, left // copies)
            if taken < rows:
                rows_with_room[room].append((first + taken, rows - taken))
            if rows_with_room[room]:
                rooms |= 1 << room
            else:
                rooms &= ~(1 << room)
            rows_with_room[room - copies * length].append((first, taken))
            rooms |= 1 << (room - copies * length)
            left -= taken * copies
            yield _Run(first=first, rows=taken, copies=copies)
