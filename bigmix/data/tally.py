"""A stream goes in, how many tokens and loss tokens each of its rows has comes out, without a token being read.

The lengths of documents give the tokens of a row; the bits of a chat's loss mask, one a token, its loss tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigmix.data.packing import Packing
from bigmix.data.shards import Shard
from bigmix.data.stream import Stream

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """What packing leaves out of a source: whole documents, parts of documents, and the tokens of both."""

    dropped: int
    truncated: int
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """The rows of a shard or of a run [R]: tokens, loss tokens, and the sum over parts of their squared lengths."""

    tokens_R: Ints
    loss_tokens_R: Ints
    squares_R: Ints


def lost_of(stream: Stream) -> Lost:
    """What packing leaves out of one epoch, so that nothing goes without a word."""
    packings = [_packing(stream, shard) for shard in range(len(stream.manifest.shards))]
    return Lost(
        dropped=sum(packing.dropped for packing in packings),
        truncated=sum(packing.truncated for packing in packings),
        tokens=sum(packing.tokens_lost for packing in packings),
    )


def tally_of(stream: Stream, num_rows: int) -> Tally:
    """The first `num_rows` rows of a source in the order in which they are trained, over all epochs."""
    row_ids = [stream.locate(index) for index in range(num_rows)]
    shards = {
        shard: _tally_shard(stream, shard) for shard in sorted({row.shard for row in row_ids})
    }
    begins = np.cumsum([0, *(len(tally.tokens_R) for tally in shards.values())])
    begin_of = dict(zip(shards, begins.tolist(), strict=False))
    places = np.array([begin_of[row.shard] + row.row for row in row_ids], np.int64)

    def in_order(arrays: Iterable[Ints]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *arrays])[places]

    return Tally(
        tokens_R=in_order(tally.tokens_R for tally in shards.values()),
        loss_tokens_R=in_order(tally.loss_tokens_R for tally in shards.values()),
        squares_R=in_order(tally.squares_R for tally in shards.values()),
    )


def _packing(stream: Stream, shard: int) -> Packing:
    return stream.packings[shard]


def _tally_shard(stream: Stream, shard: int) -> Tally:
    packing = _packing(stream, shard)
    lengths = packing.stops - packing.starts
    if stream.manifest.kind == "text":
        in_loss = lengths - 1  # every token but the first of a part is predicted
    else:
        in_loss = _masked(stream.open_shard(shard), packing)
    return Tally(
        tokens_R=_by_row(lengths, packing),
        loss_tokens_R=_by_row(in_loss, packing),
        squares_R=_by_row(lengths**2, packing),
    )


def _masked(shard: Shard, packing: Packing) -> Ints:
    """The loss tokens of each part of a chat shard; the first token of a part is predicted by none."""
    total = int(shard.offsets[-1])
    before = np.concatenate([[0], np.cumsum(shard.loss_mask(0, total), dtype=np.int64)])
    return np.asarray(before[packing.stops] - before[packing.starts + 1], np.int64)


def _by_row(parts: Ints, packing: Packing) -> Ints:
    before = np.concatenate([[0], np.cumsum(parts)])
    return np.asarray(before[packing.firsts[1:]] - before[packing.firsts[:-1]], np.int64)
