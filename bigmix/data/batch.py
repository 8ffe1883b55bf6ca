"""Assembles the rows of a batch, and weighs the loss tokens of its documents.

A document with n loss tokens weighs n^(1 - e) against others of its source, each of its tokens
n^-e: with e = 0 all tokens count the same, with e = 1 all documents do, with e = 1/2 a document
weighs the square root of its length (square averaging: Chen et al., "InternVL 2.5", 2024). A text
that is split over rows counts as a document in each of them.

Letters: R rows, P parts, K runs of loss tokens, S sources, T token positions of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.data.packing import ragged
from bigmix.data.records import MicroBatch, RowIds
from bigmix.data.stream import Stream
from bigmix.types import Floats, Ints, Weighing


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembledRows:
    """Rows of one length, laid end to end.

    The parts of row r are [parts_R1[r], parts_R1[r + 1]), its runs [runs_R1[r], runs_R1[r + 1]).
    `starts_P` and `begins_K` are flat token positions: row * T + position.
    """

    sources_R: Ints
    tokens_R: Ints
    loss_tokens_R: Ints
    sum_sq_lengths_R: Ints
    parts_R1: Sequence[int]
    runs_R1: Sequence[int]
    sources_P: Ints
    starts_P: Ints
    documents_P: Ints
    begins_K: Ints
    lengths_K: Ints
    ids_RT: Ints

    def micro_batch(self, first: int, end: int) -> MicroBatch:
        """The rows [first, end), with their sources as groups."""
        offset = first * self.ids_RT.shape[1]
        parts = slice(self.parts_R1[first], self.parts_R1[end])
        runs = slice(self.runs_R1[first], self.runs_R1[end])
        return MicroBatch(
            ids_BT=self.ids_RT[first:end],
            starts_P=self.starts_P[parts] - offset,
            groups_P=self.sources_P[parts],
            begins_K=self.begins_K[runs] - offset,
            lengths_K=self.lengths_K[runs],
        )


def assemble(streams: Sequence[Stream], row_ids: RowIds) -> AssembledRows:
    """Read rows shard by shard, in the order in which the shards are first needed, and lay them end
    to end in the order of the row ids.
    """
    groups = row_ids.by_shard()
    found = [streams[source].rows(shard, row_ids.rows_R[own]) for source, shard, own in groups]
    counts_4R = np.empty((4, len(row_ids.rows_R)), np.int64)
    for (_, _, own), rows in zip(groups, found, strict=True):
        counts_4R[:, own] = rows.parts_R, rows.runs_R, rows.tokens_R, rows.sum_sq_lengths_R
    parts_R1, runs_R1 = (np.concatenate([[0], np.cumsum(counts)]) for counts in counts_4R[:2])
    width = streams[0].packing.width
    parts_2P, runs_2K = np.empty((2, parts_R1[-1]), np.int64), np.empty((2, runs_R1[-1]), np.int64)
    ids_RT = np.empty((len(row_ids.rows_R), width), np.int32)
    for (_, _, own), rows in zip(groups, found, strict=True):
        at_P, at_K = ragged(parts_R1[own], rows.parts_R), ragged(runs_R1[own], rows.runs_R)
        parts_2P[:, at_P] = rows.starts_P + np.repeat(own * width, rows.parts_R), rows.documents_P
        runs_2K[:, at_K] = rows.begins_K + np.repeat(own * width, rows.runs_R), rows.lengths_K
        # One copy of all pieces and one that widens them into their rows; a copy for each piece
        # would cost three times as much.
        ids = np.frombuffer(b"".join(rows.pieces), streams[0].dtype)
        ids_RT[own] = ids.reshape(len(own), width)
    loss_tokens = np.concatenate([[0], np.cumsum(runs_2K[1])])
    return AssembledRows(
        sources_R=row_ids.sources_R,
        tokens_R=counts_4R[2],
        loss_tokens_R=np.diff(loss_tokens[runs_R1]),
        sum_sq_lengths_R=counts_4R[3],
        parts_R1=parts_R1.tolist(),
        runs_R1=runs_R1.tolist(),
        sources_P=np.repeat(row_ids.sources_R, counts_4R[0]),
        starts_P=parts_2P[0],
        documents_P=parts_2P[1],
        begins_K=runs_2K[0],
        lengths_K=runs_2K[1],
        ids_RT=ids_RT,
    )


EXPONENTS: Mapping[Weighing, float] = {"token": 0.0, "square_root": 0.5, "document": 1.0}


def document_weights(micro_batch: MicroBatch, exponents_S: Sequence[float]) -> Floats:
    """The weight of a loss token of each part [P]; 1 in parts without one.

    `exponents_S` is e for each source: EXPONENTS of its `weigh` setting.
    """
    counts_P = np.maximum(micro_batch.loss_tokens_P, 1).astype(np.float64)
    weights_P: Floats = counts_P ** -np.asarray(exponents_S)[micro_batch.groups_P]
    return weights_P


def weight_sums(micro_batch: MicroBatch, weights_P: Floats, num_sources: int) -> Floats:
    """The sum of the weights of the loss tokens of each source [S]."""
    sums_P = weights_P * micro_batch.loss_tokens_P
    return np.bincount(micro_batch.groups_P, sums_P, minlength=num_sources).astype(np.float64)
