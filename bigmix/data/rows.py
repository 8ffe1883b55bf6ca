"""The packing of a shard and its loss masks go in, its rows come out as a table: what to copy, and what is in the loss.

All of a shard at once and in whole arrays, so that a row costs a few slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigmix.data.packing import Ints, Packing
from bigmix.data.shards import Shard

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledRow:
    """What is in a row beside its tokens: where its parts begin and which documents they are from.

    `begins` and `lengths` are the runs of positions whose prediction is in the loss. `tokens` counts those before the
    padding, `squares` adds up the squared lengths of the parts.
    """

    starts: Sequence[int]
    documents: Sequence[int]
    begins: Sequence[int]
    lengths: Sequence[int]
    tokens: int
    squares: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTable:
    """The rows of a shard. Letters: R rows, P parts, K runs of positions in the loss.

    `rows_R6` has for each row its first part and run and those of the next row, its tokens and its squares;
    `parts_P4` for each part its address in the shard, where it starts in its row, its length and its document;
    `runs_K2` for each run where it begins in its row and its length.
    """

    rows_R6: Ints
    parts_P4: Counts
    runs_K2: Counts

    def row(self, index: int) -> tuple[FilledRow, list[list[int]]]:
        """A row, and its parts as `parts_P4` has them: what to copy into it."""
        first, end, low, high, tokens, squares = self.rows_R6[index].tolist()
        parts = self.parts_P4[first:end].tolist()
        runs = self.runs_K2[low:high].tolist()
        filled = FilledRow(
            starts=[part[1] for part in parts],
            documents=[part[3] for part in parts],
            begins=[run[0] for run in runs],
            lengths=[run[1] for run in runs],
            tokens=tokens,
            squares=squares,
        )
        return filled, parts


def text_table(packing: Packing) -> RowTable:
    """Rows of text: each token but the first of a part is in the loss."""
    lengths_P = packing.stops - packing.starts
    starts_P = _starts(packing, lengths_P)
    kept = np.flatnonzero(lengths_P > 1)
    runs_K2 = np.stack([starts_P[kept], lengths_P[kept] - 1], axis=1)
    return _table(packing, packing.starts, starts_P, runs_K2, kept)


def chat_table(packing: Packing, shard: Shard) -> RowTable:
    """Rows of chats: what the masks of the shard say is in the loss."""
    starts_P = _starts(packing, packing.stops - packing.starts)
    begins, ends = shard.loss_runs()
    low_P, high_P = np.searchsorted(begins, packing.starts), np.searchsorted(begins, packing.stops)
    counts_P = high_P - low_P
    part_K = np.repeat(np.arange(len(counts_P)), counts_P)
    run_K = np.arange(len(part_K)) + np.repeat(low_P - np.cumsum(counts_P) + counts_P, counts_P)
    # A document that is cut at the end of its row loses the run behind the cut.
    lengths_K = np.minimum(ends[run_K], packing.stops[part_K]) - begins[run_K]
    # The token at t is predicted at t - 1.
    begins_K = begins[run_K] - 1 - packing.starts[part_K] + starts_P[part_K]
    runs_K2 = np.stack([begins_K, lengths_K], axis=1)
    return _table(packing, shard.addresses(packing.starts), starts_P, runs_K2, part_K)


def _starts(packing: Packing, lengths_P: Ints) -> Ints:
    """Where each part begins in its row."""
    before_P = np.cumsum(lengths_P) - lengths_P
    first_of_row = np.repeat(packing.firsts[:-1], np.diff(packing.firsts))
    return before_P - before_P[first_of_row]


def _table(
    packing: Packing, addresses_P: Ints, starts_P: Ints, runs_K2: Ints, part_K: Ints
) -> RowTable:
    lengths_P = packing.stops - packing.starts
    firsts, runs = packing.firsts, np.searchsorted(part_K, packing.firsts)
    tokens, squares = (
        np.concatenate([[0], np.cumsum(values)])[firsts] for values in (lengths_P, lengths_P**2)
    )
    columns = [firsts[:-1], firsts[1:], runs[:-1], runs[1:], np.diff(tokens), np.diff(squares)]
    parts_P4 = np.stack([addresses_P, starts_P, lengths_P, packing.documents], axis=1)
    # Half the memory of what numpy counts with: the tables of a window of shards are held at a time.
    return RowTable(
        rows_R6=np.stack(columns, axis=1),
        parts_P4=parts_P4.astype(np.int32),
        runs_K2=runs_K2.astype(np.int32),
    )
