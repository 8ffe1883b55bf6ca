"""The packing of a shard and its loss masks go in, its rows come out: what to copy, and what is in the loss.

All of a shard at once and in whole arrays, and so are the rows that are asked for: what is done for each document by
itself is one slice. Letters: R rows, P parts, K runs of positions in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigmix.data.packing import Packing
from bigmix.data.records import Ints
from bigmix.data.shards.shard import Shard

PADDING = -1  # the document and the address of a part that is padding


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTable:
    """The rows of a shard.

    `rows_R6` has for each row its first part and run and those of the next row, its tokens without padding and the
    sum of its parts' squared lengths; `parts_P4` for each part its address in the shard, where it starts in its row,
    its length and its document; `runs_K2` for each run where it begins in its row and its length.
    """

    rows_R6: Ints
    parts_P4: npt.NDArray[np.int32]
    runs_K2: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Some rows: what their parts are, and what is in the loss.

    `parts_R` and `runs_R` count the parts and runs of each row; `pieces` are the bytes of the ids, end to end.
    Parts start and runs begin at positions in their row; `documents_P` is PADDING for padding.
    """

    parts_R: Ints
    runs_R: Ints
    tokens_R: Ints
    squares_R: Ints
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


def rows_of(table: RowTable, shard: Shard, indices: Ints, padding: bytes) -> Rows:
    """Rows of a shard by their numbers; `padding` is a row's bytes of it."""
    first, end, low, high, tokens, squares = table.rows_R6[indices].T
    parts_P4 = table.parts_P4[ragged(first, end - first)]
    runs_K2 = table.runs_K2[ragged(low, high - low)]
    return Rows(
        parts_R=end - first,
        runs_R=high - low,
        tokens_R=tokens,
        squares_R=squares,
        starts_P=parts_P4[:, 1],
        documents_P=parts_P4[:, 3],
        pieces=shard.pieces_at(parts_P4[:, 0], parts_P4[:, 2], padding),
        begins_K=runs_K2[:, 0],
        lengths_K=runs_K2[:, 1],
    )


def cut_rows(shard: Shard, indices: Ints, row_tokens: int, padding: bytes) -> Rows:
    """Rows of a text that is cut anywhere: each one slice of the shard, of which no table is made.

    A rank of thousands needs few rows of each shard.
    """
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
) -> Rows:
    """Each token of a text but the first of a part is in the loss."""
    row_P = np.repeat(np.arange(len(parts_R)), parts_R)
    is_padding_P = starts_P >= tokens_R[row_P]
    following_P = np.append(starts_P[1:], 0)
    is_last_P = np.append(row_P[1:] != row_P[:-1], True)
    ends_P = np.where(is_last_P, tokens_R[row_P], following_P)
    lengths_P = np.where(is_padding_P, 0, ends_P - starts_P)
    kept = np.flatnonzero(lengths_P > 1)
    return Rows(
        parts_R=parts_R,
        runs_R=np.bincount(row_P[kept], minlength=len(parts_R)),
        tokens_R=tokens_R,
        squares_R=np.bincount(row_P, lengths_P**2, minlength=len(parts_R)).astype(np.int64),
        starts_P=starts_P,
        documents_P=np.where(is_padding_P, PADDING, documents_P),
        pieces=pieces,
        begins_K=starts_P[kept],
        lengths_K=lengths_P[kept] - 1,
    )


def text_table(packing: Packing, shard: Shard, width: int) -> RowTable:
    """Rows of text: each token but the first of a part is in the loss."""
    lengths_P = packing.stops - packing.starts
    starts_P = _starts(packing, lengths_P)
    kept = np.flatnonzero(lengths_P > 1)
    runs_K2 = np.stack([starts_P[kept], lengths_P[kept] - 1], axis=1)
    return _table(packing, shard, starts_P, runs_K2, kept, width)


def chat_table(packing: Packing, shard: Shard, width: int) -> RowTable:
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
    return _table(packing, shard, starts_P, np.stack([begins_K, lengths_K], axis=1), part_K, width)


def _starts(packing: Packing, lengths_P: Ints) -> Ints:
    """Where each part begins in its row."""
    before_P = np.cumsum(lengths_P) - lengths_P
    return before_P - np.repeat(before_P[packing.firsts[:-1]], np.diff(packing.firsts))


def _table(
    packing: Packing, shard: Shard, starts_P: Ints, runs_K2: Ints, part_K: Ints, width: int
) -> RowTable:
    lengths_P = packing.stops - packing.starts
    firsts, runs = packing.firsts, np.searchsorted(part_K, packing.firsts)
    tokens_R, squares_R = (
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
        firsts[:-1] + more[:-1], firsts[1:] + more[1:], runs[:-1], runs[1:], tokens_R, squares_R
    ]  # fmt: skip
    return RowTable(
        rows_R6=np.stack(columns, axis=1),
        # Half the memory of what numpy counts with: the tables of a window of shards are held at a time.
        parts_P4=np.insert(parts_P4, firsts[1:][padded], padding_P4, axis=0).astype(np.int32),
        runs_K2=runs_K2.astype(np.int32),
    )
