"""The document lengths of a shard go in, the parts of each of its rows come out: a pure function of
the lengths.

Text that may be split anywhere needs no packing: row r of a shard is its tokens [r * T, (r + 1) *
T).

The packing of a shard and its loss masks go in, its rows come out: what to copy, and what is in the
loss.

All of a shard at once and in whole arrays, and so are the rows that are asked for: what is done for
each document by itself is one slice. Letters: R rows, P parts, K runs of positions in the loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bigmix.data.shards.shard import Shard
from bigmix.types import Ints

LongDocuments = Literal["drop", "truncate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingOptions:
    """How documents become rows of `row_tokens` tokens.

    Chats longer than a row are dropped or cut; texts shorter than `whole_below` tokens are never
    split. Rows are then padded to a multiple of `pad_to_multiple` tokens.
    """

    row_tokens: int
    long_documents: LongDocuments = "drop"
    whole_below: int = 0
    pad_to_multiple: int = 1

    @property
    def width(self) -> int:
        """Tokens of a row with the padding to a multiple."""
        return -(-self.row_tokens // self.pad_to_multiple) * self.pad_to_multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedTokens:
    """Documents that were longer than a row, dropped or cut, and the tokens that went with them."""

    dropped: int = 0
    truncated: int = 0
    tokens: int = 0

    def __add__(self, other: "DroppedTokens") -> "DroppedTokens":
        return DroppedTokens(
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


def pack_text(lengths: Ints, options: PackingOptions) -> Packing:
    """Documents laid end to end and cut into rows, those shorter than `whole_below` tokens never
    inside.

    No token is lost: the last row holds the rest. With lengths 5, 4 in rows of 4 and `whole_below`
    0 the parts are [0, 4) | [4, 5) [5, 8) | [8, 9); with `whole_below` 5 they are [0, 4) | [4, 5) |
    [5, 9).
    """
    row_tokens, whole_below = options.row_tokens, options.whole_below
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


def pack_chat(lengths: Ints, options: PackingOptions) -> Packing:
    """Whole documents in as few rows as best-fit-decreasing finds; one longer than a row is dropped
    or cut.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    fitted, row_tokens = _fitted(lengths, options), options.row_tokens
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


def count_chat_rows(lengths: Ints, options: PackingOptions) -> int:
    """How many rows `pack_chat` makes, at a fraction of its cost."""
    fitted, row_tokens = _fitted(lengths, options), options.row_tokens
    runs = _best_fit(np.bincount(fitted, minlength=row_tokens + 1), row_tokens)
    return max((run.first + run.rows for run in runs), default=0)


def lost(lengths: Ints, options: PackingOptions) -> DroppedTokens:
    """What packing chats leaves out: documents longer than a row."""
    long = lengths[lengths > options.row_tokens]
    if options.long_documents == "drop":
        return DroppedTokens(dropped=len(long), tokens=int(long.sum()))
    return DroppedTokens(truncated=len(long), tokens=int((long - options.row_tokens).sum()))


def _fitted(lengths: Ints, options: PackingOptions) -> Ints:
    """The tokens of each document that a row takes; 0 where it is left out."""
    if options.long_documents == "truncate":
        return np.minimum(lengths, options.row_tokens)
    return np.where(lengths > options.row_tokens, 0, lengths)


def _best_fit(count_of_length: Ints, row_tokens: int) -> Iterator[_Run]:
    """Best-fit-decreasing (Johnson, "Near-optimal bin packing algorithms", 1973), for all documents
    of a length at once.

    The row with the least room that still holds a document takes it; what is left then is less, so
    the same row takes the next one of that length as long as it fits. Rows with equal room are kept
    as runs of numbers, and which rooms there are as one big whole number whose bit r stands for
    room r: the least that fits is its lowest set bit from the length on.
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


PADDING = -1  # the document and the address of a part that is padding


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTable:
    """The rows of a shard.

    `rows_R6` has for each row its first part and run and those of the next row, its tokens without
    padding and the sum of its parts' squared lengths; `parts_P4` for each part its address in the
    shard, where it starts in its row, its length and its document; `runs_K2` for each run where it
    begins in its row and its length.
    """

    rows_R6: Ints
    parts_P4: npt.NDArray[np.int32]
    runs_K2: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Some rows: what their parts are, and what is in the loss.

    `parts_R` and `runs_R` count the parts and runs of each row; `pieces` are the bytes of the ids,
    end to end. Parts start and runs begin at positions in their row; `documents_P` is PADDING for
    padding.
    """

    parts_R: Ints
    runs_R: Ints
    tokens_R: Ints
    sum_sq_lengths_R: Ints
    starts_P: Ints
    documents_P: Ints
    pieces: Sequence[bytes]
    begins_K: Ints
    lengths_K: Ints


def ragged(firsts: Ints, counts: Ints) -> Ints:
    """Runs of numbers laid end to end: firsts 5, 9 and counts 3, 2 give 5 6 7 9 10."""
    before = np.cumsum(counts) - counts
    numbers: Ints = np.arange(int(counts.sum())) + np.repeat(firsts - before, counts)
    return numbers


def rows_of(table: RowTable, shard: Shard, indices: Ints, options: PackingOptions) -> PackedRows:
    """Rows of a shard by their numbers."""
    first, end, low, high, tokens, sum_sq_lengths = table.rows_R6[indices].T
    parts_P4 = table.parts_P4[ragged(first, end - first)]
    runs_K2 = table.runs_K2[ragged(low, high - low)]
    return PackedRows(
        parts_R=end - first,
        runs_R=high - low,
        tokens_R=tokens,
        sum_sq_lengths_R=sum_sq_lengths,
        starts_P=parts_P4[:, 1],
        documents_P=parts_P4[:, 3],
        pieces=shard.pieces_at(parts_P4[:, 0], parts_P4[:, 2], bytes(options.width * shard.width)),
        begins_K=runs_K2[:, 0],
        lengths_K=runs_K2[:, 1],
    )


def cut_rows(shard: Shard, indices: Ints, options: PackingOptions) -> PackedRows:
    """Rows of a text that is cut anywhere: each one slice of the shard, of which no table is made.

    A rank of thousands needs few rows of each shard.
    """
    row_tokens, padding = options.row_tokens, bytes(options.width * shard.width)
    parts, tokens, starts, documents, pieces = [], [], list[int](), list[int](), list[bytes]()
    for start in (indices * row_tokens).tolist():
        stop = min(start + row_tokens, shard.num_tokens)
        first, borders = shard.borders(start, stop)
        pieces.append(shard.piece(start, stop))
        if len(padding) > (stop - start) * shard.width:
            borders.append(stop - start)
            pieces.append(padding[(stop - start) * shard.width :])
        starts.append(0)
        starts += borders
        documents += range(first, first + len(borders) + 1)
        parts.append(len(borders) + 1)
        tokens.append(stop - start)
    return _text_rows(
        np.array(parts), np.array(tokens), np.array(starts), np.array(documents), pieces
    )


def _text_rows(
    parts_R: Ints, tokens_R: Ints, starts_P: Ints, documents_P: Ints, pieces: Sequence[bytes]
) -> PackedRows:
    """Each token of a text but the first of a part is in the loss."""
    row_P = np.repeat(np.arange(len(parts_R)), parts_R)
    is_padding_P = starts_P >= tokens_R[row_P]
    following_P = np.append(starts_P[1:], 0)
    is_last_P = np.append(row_P[1:] != row_P[:-1], True)
    ends_P = np.where(is_last_P, tokens_R[row_P], following_P)
    lengths_P = np.where(is_padding_P, 0, ends_P - starts_P)
    kept = np.flatnonzero(lengths_P > 1)
    return PackedRows(
        parts_R=parts_R,
        runs_R=np.bincount(row_P[kept], minlength=len(parts_R)),
        tokens_R=tokens_R,
        sum_sq_lengths_R=np.bincount(row_P, lengths_P**2, minlength=len(parts_R)).astype(np.int64),
        starts_P=starts_P,
        documents_P=np.where(is_padding_P, PADDING, documents_P),
        pieces=pieces,
        begins_K=starts_P[kept],
        lengths_K=lengths_P[kept] - 1,
    )


def text_table(packing: Packing, shard: Shard, options: PackingOptions) -> RowTable:
    """Rows of text: each token but the first of a part is in the loss."""
    lengths_P = packing.stops - packing.starts
    starts_P = _starts(packing, lengths_P)
    kept = np.flatnonzero(lengths_P > 1)
    runs_K2 = np.stack([starts_P[kept], lengths_P[kept] - 1], axis=1)
    return _table(packing, shard, starts_P, runs_K2, kept, options.width)


def chat_table(packing: Packing, shard: Shard, options: PackingOptions) -> RowTable:
    """Rows of chats: what the masks of the shard say is in the loss."""
    starts_P = _starts(packing, packing.stops - packing.starts)
    begins, ends = shard.loss_runs()
    low_P, high_P = np.searchsorted(begins, packing.starts), np.searchsorted(begins, packing.stops)
    part_K = np.repeat(np.arange(len(low_P)), high_P - low_P)
    run_K = ragged(low_P, high_P - low_P)
    # A document that is cut at the end of its row loses the run behind the cut.
    lengths_K = np.minimum(ends[run_K], packing.stops[part_K]) - begins[run_K]
    # The token at t is predicted at t - 1.
    begins_K = begins[run_K] - 1 - packing.starts[part_K] + starts_P[part_K]
    runs_K2 = np.stack([begins_K, lengths_K], axis=1)
    return _table(packing, shard, starts_P, runs_K2, part_K, options.width)


def _starts(packing: Packing, lengths_P: Ints) -> Ints:
    """Where each part begins in its row."""
    before_P = np.cumsum(lengths_P) - lengths_P
    return before_P - np.repeat(before_P[packing.firsts[:-1]], np.diff(packing.firsts))


def _table(
    packing: Packing, shard: Shard, starts_P: Ints, runs_K2: Ints, part_K: Ints, width: int
) -> RowTable:
    lengths_P = packing.stops - packing.starts
    firsts, runs = packing.firsts, np.searchsorted(part_K, packing.firsts)
    tokens_R, sum_sq_lengths_R = (
        np.diff(np.concatenate([[0], np.cumsum(values)])[firsts])
        for values in (lengths_P, lengths_P**2)
    )
    parts_P4 = np.stack(
        [shard.addresses(packing.starts), starts_P, lengths_P, packing.documents], axis=1
    )
    padded = np.flatnonzero(tokens_R < width)
    padding_P4 = np.full((len(padded), 4), PADDING)
    padding_P4[:, 1], padding_P4[:, 2] = tokens_R[padded], width - tokens_R[padded]
    more = np.concatenate([[0], np.cumsum(tokens_R < width)])
    columns = [
        firsts[:-1] + more[:-1],
        firsts[1:] + more[1:],
        runs[:-1],
        runs[1:],
        tokens_R,
        sum_sq_lengths_R,
    ]
    return RowTable(
        rows_R6=np.stack(columns, axis=1),
        # Half the memory of what numpy counts with: the tables of a window of shards are held at a
        # time.
        parts_P4=np.insert(parts_P4, firsts[1:][padded], padding_P4, axis=0).astype(np.int32),
        runs_K2=runs_K2.astype(np.int32),
    )
