"""Packs documents into rows: which tokens each row of a shard has, and which are in the loss.

A pure function of the lengths of the documents, their loss masks and the packing options. All rows
of a shard are worked out together with whole arrays; the only thing that is done for each document
is to take its slice of the file. What differs between texts and chats is in `TextRows` and
`ChatRows`.

Letters: S shards, D documents, R rows, P parts, K runs of token positions in the loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bigmix.data.shards.shard import Shard
from bigmix.types import Ints

PADDING = -1  # the document and the address of a part that is padding

LongDocuments = Literal["drop", "truncate"]
LengthsOf = Callable[[int], Ints]  # the tokens of each document of a shard, by its index


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
    """How many documents longer than a row were dropped or truncated, and the tokens lost by it."""

    dropped: int = 0
    truncated: int = 0
    num_tokens: int = 0


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
    def num_rows(self) -> int:
        """How many rows the shard has."""
        return len(self.firsts) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTable:
    """The rows of a shard.

    `rows_R6` has for each row its first part and run, those of the next row, its tokens without
    padding and the sum of its parts' squared lengths; `parts_P4` for each part its address in the
    shard, where it starts in its row, its length and its document; `runs_K2` for each run where it
    begins in its row and its length.
    """

    rows_R6: Ints
    parts_P4: npt.NDArray[np.int32]
    runs_K2: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Some rows of a shard: their parts, and what is in the loss.

    `parts_R` and `runs_R` count the parts and runs of each row; `pieces` are the bytes of the ids,
    end to end. Parts start and runs begin at token positions in their row; `documents_P` is PADDING
    for padding.
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


class RowLayout(Protocol):
    """How the documents of one kind of source become rows; `options` are those of the source.

    `is_contiguous` says whether a row is consecutive tokens of its shard, so that few rows take few
    bytes to read.
    """

    is_contiguous: ClassVar[bool]

    @property
    def options(self) -> PackingOptions: ...

    def count_rows(self, tokens_S: Ints, lengths_of: LengthsOf, /) -> Ints | None:
        """The number of rows of each shard [S], from its tokens or the lengths of its documents.

        None where only the table of a shard says how many rows it has.
        """

    def table(self, shard: Shard, lengths_D: Ints) -> RowTable:
        """The rows of a shard, whose documents have these lengths."""

    def read(self, shard: Shard, indices_R: Ints, table: Callable[[], RowTable]) -> PackedRows:
        """Rows of a shard by their numbers; `table` gives the table of the shard."""

    def dropped(self, lengths: Ints | None, /) -> DroppedTokens:
        """What packing drops or truncates of the documents of a source, which have these lengths.

        None is for a source without a file of lengths.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRows:
    """Rows of texts, laid end to end: each token but the first of a part is in the loss.

    Where a text may be cut anywhere no packing is needed: row r of a shard is its tokens
    [r * T, (r + 1) * T).
    """

    is_contiguous: ClassVar[bool] = True
    options: PackingOptions

    def count_rows(self, tokens_S: Ints, _lengths_of: LengthsOf, /) -> Ints | None:
        """From the tokens, where a text may be cut anywhere."""
        return None if self.options.whole_below else -(-tokens_S // self.options.row_tokens)

    def table(self, shard: Shard, lengths_D: Ints) -> RowTable:
        """Each token but the first of a part is in the loss."""
        packing = pack_text(lengths_D, self.options)
        lengths_P = packing.stops - packing.starts
        starts_P = _starts(packing, lengths_P)
        kept = np.flatnonzero(lengths_P > 1)
        runs_K2 = np.stack([starts_P[kept], lengths_P[kept] - 1], axis=1)
        return _table(packing, shard, starts_P, runs_K2, kept, self.options.width)

    def read(self, shard: Shard, indices_R: Ints, table: Callable[[], RowTable]) -> PackedRows:
        """From the shard alone, where a text may be cut anywhere."""
        if self.options.whole_below:
            return _rows_of(table(), shard, indices_R, self.options)
        return _cut_rows(shard, indices_R, self.options)

    def dropped(self, _lengths: Ints | None, /) -> DroppedTokens:
        """Nothing: what does not fit a row goes on in the next one."""
        return DroppedTokens()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRows:
    """Rows of conversations, packed whole: what is in the loss is marked in the shard's masks."""

    is_contiguous: ClassVar[bool] = False
    options: PackingOptions

    def count_rows(self, tokens_S: Ints, lengths_of: LengthsOf, /) -> Ints:
        """From the lengths of the conversations."""
        counts = [
            count_chat_rows(lengths_of(shard), self.options) for shard in range(len(tokens_S))
        ]
        return np.array(counts, np.int64)

    def table(self, shard: Shard, lengths_D: Ints) -> RowTable:
        """The loss is taken where the masks of the shard say so."""
        packing = pack_chat(lengths_D, self.options)
        starts_P = _starts(packing, packing.stops - packing.starts)
        begins, ends = shard.loss_runs()
        low_P = np.searchsorted(begins, packing.starts)
        high_P = np.searchsorted(begins, packing.stops)
        part_K = np.repeat(np.arange(len(low_P)), high_P - low_P)
        run_K = ragged(low_P, high_P - low_P)
        # A document that is cut at the end of its row loses the run behind the cut.
        lengths_K = np.minimum(ends[run_K], packing.stops[part_K]) - begins[run_K]
        # The token at t is predicted at t - 1.
        begins_K = begins[run_K] - 1 - packing.starts[part_K] + starts_P[part_K]
        runs_K2 = np.stack([begins_K, lengths_K], axis=1)
        return _table(packing, shard, starts_P, runs_K2, part_K, self.options.width)

    def read(self, shard: Shard, indices_R: Ints, table: Callable[[], RowTable]) -> PackedRows:
        """From the table."""
        return _rows_of(table(), shard, indices_R, self.options)

    def dropped(self, lengths: Ints | None, /) -> DroppedTokens:
        """Conversations longer than a row."""
        assert lengths is not None, "a chat source has a file of lengths"
        row_tokens = self.options.row_tokens
        long = lengths[lengths > row_tokens]
        if self.options.long_documents == "drop":
            return DroppedTokens(dropped=len(long), num_tokens=int(long.sum()))
        return DroppedTokens(truncated=len(long), num_tokens=int((long - row_tokens).sum()))


# By the kind of a source in its manifest.
LAYOUTS: Mapping[str, type[TextRows] | type[ChatRows]] = {"text": TextRows, "chat": ChatRows}


def pack_text(lengths: Ints, options: PackingOptions) -> Packing:
    """Lay documents end to end and cut them into rows, never inside one shorter than `whole_below`.

    No token is lost: the last row holds the rest. With lengths 5, 4 in rows of 4 and `whole_below`
    0 the parts are [0, 4) | [4, 5) [5, 8) | [8, 9); with `whole_below` 5 they are [0, 4) | [4, 5) |
    [5, 9).
    """
    row_tokens, whole_below = options.row_tokens, options.whole_below
    firsts, starts, stops, documents = [0], list[int](), list[int](), list[int]()
    capacity, at = row_tokens, 0
    for document, length in enumerate(lengths.tolist()):
        end = at + length
        stays_whole = length < whole_below and length <= row_tokens
        if stays_whole and length > capacity:
            firsts.append(len(starts))
            capacity = row_tokens
        while at < end:
            if not capacity:
                firsts.append(len(starts))
                capacity = row_tokens
            take = min(capacity, end - at)
            starts.append(at)
            stops.append(at + take)
            documents.append(document)
            at, capacity = at + take, capacity - take
    if starts:
        firsts.append(len(starts))
    arrays = (np.array(values, np.int64) for values in (firsts, starts, stops, documents))
    first_a, start_a, stop_a, document_a = arrays
    return Packing(firsts=first_a, starts=start_a, stops=stop_a, documents=document_a)


def pack_chat(lengths: Ints, options: PackingOptions) -> Packing:
    """Pack whole documents into as few rows as best-fit-decreasing finds.

    A document longer than a row is dropped or truncated.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    fitted, row_tokens = _fitted(lengths, options), options.row_tokens
    order = np.argsort(-fitted, kind="stable")[: np.count_nonzero(fitted)]
    runs = list(_best_fit(np.bincount(fitted, minlength=row_tokens + 1), row_tokens))
    rows = [np.repeat(np.arange(r.first, r.first + r.num_rows), r.num_copies) for r in runs]
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
    return max((run.first + run.num_rows for run in runs), default=0)


def _fitted(lengths: Ints, options: PackingOptions) -> Ints:
    """The tokens of each document that a row takes; 0 where it is left out."""
    if options.long_documents == "truncate":
        return np.minimum(lengths, options.row_tokens)
    return np.where(lengths > options.row_tokens, 0, lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """`num_rows` rows from `first` on take `num_copies` documents of one length each."""

    first: int
    num_rows: int
    num_copies: int


def _best_fit(count_of_length: Ints, row_tokens: int) -> Iterator[_Run]:
    """Best-fit-decreasing (Johnson, "Near-optimal bin packing algorithms", 1973), for all documents
    of a length at once.

    The row with the least capacity that still holds a document takes it; its capacity is then less,
    so the same row takes the next one of that length as long as it fits. Rows with equal capacity
    are kept as runs of numbers, and which capacities there are as one big whole number whose bit c
    is for capacity c: the least that fits is its lowest set bit from the length on.
    """
    capacities = 0
    rows_by_capacity: list[list[tuple[int, int]]] = [[] for _ in range(row_tokens + 1)]
    num_rows = 0
    lengths = np.flatnonzero(count_of_length[1:]) + 1
    for length in lengths[::-1].tolist():
        num_left = int(count_of_length[length])
        while num_left:
            fitting = capacities >> length
            if fitting:
                capacity = length + (fitting & -fitting).bit_length() - 1
                first, num_fitting = rows_by_capacity[capacity].pop()
            else:
                capacity = row_tokens
                first, num_fitting = num_rows, -(-num_left // (capacity // length))
                num_rows += num_fitting
            copies = min(capacity // length, num_left)
            taken = min(num_fitting, num_left // copies)
            if taken < num_fitting:
                rows_by_capacity[capacity].append((first + taken, num_fitting - taken))
            if rows_by_capacity[capacity]:
                capacities |= 1 << capacity
            else:
                capacities &= ~(1 << capacity)
            rows_by_capacity[capacity - copies * length].append((first, taken))
            capacities |= 1 << (capacity - copies * length)
            num_left -= taken * copies
            yield _Run(first=first, num_rows=taken, num_copies=copies)


def ragged(firsts: Ints, counts: Ints) -> Ints:
    """Runs of numbers laid end to end: firsts 5, 9 and counts 3, 2 give 5 6 7 9 10."""
    before = np.cumsum(counts) - counts
    numbers: Ints = np.arange(int(counts.sum())) + np.repeat(firsts - before, counts)
    return numbers


def _rows_of(table: RowTable, shard: Shard, indices_R: Ints, options: PackingOptions) -> PackedRows:
    """Rows of a shard by their numbers in its table."""
    first, end, low, high, tokens, sum_sq_lengths = table.rows_R6[indices_R].T
    parts_P4 = table.parts_P4[ragged(first, end - first)]
    runs_K2 = table.runs_K2[ragged(low, high - low)]
    padding = bytes(options.width * shard.width)
    return PackedRows(
        parts_R=end - first,
        runs_R=high - low,
        tokens_R=tokens,
        sum_sq_lengths_R=sum_sq_lengths,
        starts_P=parts_P4[:, 1],
        documents_P=parts_P4[:, 3],
        pieces=shard.pieces_at(parts_P4[:, 0], parts_P4[:, 2], padding),
        begins_K=runs_K2[:, 0],
        lengths_K=runs_K2[:, 1],
    )


def _cut_rows(shard: Shard, indices_R: Ints, options: PackingOptions) -> PackedRows:
    """Rows of a text that is cut anywhere: each is one slice of the shard, and no table is made.

    A rank of thousands needs few rows of each shard.
    """
    row_tokens, padding = options.row_tokens, bytes(options.width * shard.width)
    parts, tokens, starts, documents, pieces = [], [], list[int](), list[int](), list[bytes]()
    for start in (indices_R * row_tokens).tolist():
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
    """Rows of a text with these parts: each token but the first of a part is in the loss."""
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


def _starts(packing: Packing, lengths_P: Ints) -> Ints:
    """Where each part begins in its row."""
    before_P = np.cumsum(lengths_P) - lengths_P
    return before_P - np.repeat(before_P[packing.firsts[:-1]], np.diff(packing.firsts))


def _table(
    packing: Packing, shard: Shard, starts_P: Ints, runs_K2: Ints, part_K: Ints, width: int
) -> RowTable:
    """The table of packed rows, each padded to `width` tokens; run k lies in part `part_K[k]`."""
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
        # Half the memory of what numpy counts with: the tables of a window of shards are held at
        # once.
        parts_P4=np.insert(parts_P4, firsts[1:][padded], padding_P4, axis=0).astype(np.int32),
        runs_K2=runs_K2.astype(np.int32),
    )
