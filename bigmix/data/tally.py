"""A plan goes in, how many tokens and loss tokens each row of a source has comes out, without a token being read.

The lengths of documents give the tokens of a row; the bits of a chat's loss mask, one a token, its loss tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bigmix.data.loader import Plan
from bigmix.data.records import Ints, RowPlaces
from bigmix.data.rows import RowTable
from bigmix.data.stream import Stream


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Rows of a run [R]: tokens, loss tokens, and the sum over parts of their squared lengths."""

    tokens_R: Ints
    loss_tokens_R: Ints
    squares_R: Ints


def tally_of(plan: Plan, name: str, num_rows: int) -> Tally:
    """The first `num_rows` rows of a source in the order in which they are trained, over all epochs."""
    parts = [tally_of_rows(part.stream, part.places()) for part in plan.drawn(name, num_rows)]

    def joined(columns: Iterable[Ints]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *columns])

    return Tally(
        tokens_R=joined(part.tokens_R for part in parts),
        loss_tokens_R=joined(part.loss_tokens_R for part in parts),
        squares_R=joined(part.squares_R for part in parts),
    )


def tally_of_rows(stream: Stream, places: RowPlaces) -> Tally:
    """Rows of a stream."""
    columns_3R = np.empty((3, len(places.rows_R)), np.int64)
    for shard in np.unique(places.shards_R).tolist():
        own = np.flatnonzero(places.shards_R == shard)
        columns_3R[:, own] = _columns(stream.table(shard))[:, places.rows_R[own]]
    tokens_R, loss_tokens_R, squares_R = columns_3R
    return Tally(tokens_R=tokens_R, loss_tokens_R=loss_tokens_R, squares_R=squares_R)


def _columns(table: RowTable) -> Ints:
    """Tokens, loss tokens and squares of every row of a shard [3, R]."""
    _, _, low_R, high_R, tokens_R, squares_R = table.rows_R6.T
    before_K = np.concatenate([[0], np.cumsum(table.runs_K2[:, 1], dtype=np.int64)])
    return np.stack([tokens_R, before_K[high_R] - before_K[low_R], squares_R])
