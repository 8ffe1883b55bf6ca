"""Records that are passed between the modules of the data room and to the trainer.

Letters: B rows of a micro-batch, T token positions of a row, R rows, N loss tokens, P parts, K runs
of loss tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bigmix.data.quarantine import Quarantine
from bigmix.types import Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class RowId:
    """Which row of a source: number `row` of a shard, in an epoch."""

    source: str
    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePosition:
    """The next row of a source: number `row`, counted over all epochs, each of which has `of`
    rows.
    """

    row: int
    of: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeSegment:
    """From where on a recipe holds: after `after` steps of the run, 0 for the first segment.

    `rows` says which row of its stream each source has reached by then, counted over all its
    epochs, and `tokens` how many of its tokens have been trained; a source that is named in neither
    is new. `shares` are the decided shares of sources and groups with a controller, and `owed` by
    how many rows each source has been drawn too little until then.
    """

    after: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    owed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPosition:
    """Which rows come next: from where on the recipe holds, the next row of each source, and the
    shards whose rows are replaced.
    """

    segment: RecipeSegment = field(default_factory=RecipeSegment)
    sources: Mapping[str, SourcePosition] = field(default_factory=dict)
    quarantine: Quarantine = field(default_factory=Quarantine)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The shares that controllers decided after a step, by source or group, and the forgetting
    that they decided on.

    `progress` is the part of the run that was done, which the learning rate follows.
    """

    step: int
    progress: float
    shares: Mapping[str, float]
    forgetting: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowIds:
    """Many row ids by column; `sources_R` are indices into `names`."""

    names: Sequence[str]
    sources_R: Ints
    epochs_R: Ints
    shards_R: Ints
    rows_R: Ints

    def ids(self) -> list[RowId]:
        """The same as records."""
        columns = (self.sources_R, self.epochs_R, self.shards_R, self.rows_R)
        return [
            RowId(source=self.names[source], epoch=epoch, shard=shard, row=row)
            for source, epoch, shard, row in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def by_shard(self) -> list[tuple[int, int, Ints]]:
        """For each shard its source, its index and where its rows are among these, in the order in
        which the shards are first needed.
        """
        keys = self.sources_R * (int(self.shards_R.max(initial=0)) + 1) + self.shards_R
        _, first, group_R = np.unique(keys, return_index=True, return_inverse=True)
        ends = np.cumsum(np.bincount(group_R))[:-1]
        by_group = np.split(np.argsort(group_R, kind="stable"), ends)
        return [
            (int(self.sources_R[first[group]]), int(self.shards_R[first[group]]), by_group[group])
            for group in np.argsort(first).tolist()
        ]

    def part(self, rows: slice) -> "RowIds":
        """Some of them."""
        return RowIds(
            names=self.names,
            sources_R=self.sources_R[rows],
            epochs_R=self.epochs_R[rows],
            shards_R=self.shards_R[rows],
            rows_R=self.rows_R[rows],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`sequence_length` tokens packed from documents of one source, in a form to look at.

    `labels_T[t]` is the token that token position t must predict, IGNORE where it predicts none.
    `positions_T` are the position ids, which restart in each part; what follows the last part is
    padding and has position ids of its own. `documents_P` is the document of the shard that each
    part is from.
    """

    id: RowId
    ids_T: Ints
    positions_T: Ints
    labels_T: Ints
    starts_P: Ints
    documents_P: Ints
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The rows of one forward pass, with what cannot be worked out on the device.

    Parts, which include padding, begin at the flat token positions (row * T + position) `starts_P`;
    the sums of a part go to group `groups_P`, its source while training. The flat token positions
    whose prediction, the next token, is in the loss are runs of `lengths_K` from `begins_K` on.
    """

    ids_BT: Ints
    starts_P: Ints
    groups_P: Ints
    begins_K: Ints
    lengths_K: Ints

    @property
    def kept_N(self) -> Ints:  # noqa: N802
        """The flat token positions whose prediction is in the loss."""
        before_K = np.cumsum(self.lengths_K) - self.lengths_K
        count = int(self.lengths_K.sum())
        kept_N: Ints = np.arange(count) + np.repeat(self.begins_K - before_K, self.lengths_K)
        return kept_N

    @property
    def loss_tokens_P(self) -> Ints:  # noqa: N802
        """How many loss tokens each part has; a run of them lies in one part."""
        parts_K = np.searchsorted(self.starts_P, self.begins_K, side="right") - 1
        counts_P = np.bincount(parts_K, self.lengths_K, minlength=len(self.starts_P))
        return counts_P.astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank trains in one step, with counts by source.

    `rows` counts over all ranks, and so does `substituted`, those of them that replace rows of bad
    shards. `tokens`, `loss_tokens` and `sum_sq_lengths`, the sum over parts of their squared
    lengths, are this rank's own.
    """

    step: int
    micro_batches: tuple[MicroBatch, ...]
    rows: Mapping[str, int]
    substituted: Mapping[str, int]
    tokens: Mapping[str, int]
    loss_tokens: Mapping[str, int]
    sum_sq_lengths: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRows:
    """Which rows of a step a rank takes: a contiguous block, cut into micro-batches."""

    rank: int
    ranks: int
    rows_per_step: int
    micro_batch_rows: int

    @property
    def rows(self) -> slice:
        """This rank's block of the step's rows."""
        each = self.rows_per_step // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.rows_per_step // (self.ranks * self.micro_batch_rows)
