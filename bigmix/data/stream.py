"""The rows of one source in the order in which a run draws them; any row is found at once.

Shards are permuted in each epoch, and rows inside a window of shards. Both permutations are keyed
by seed, source name and epoch, so that adding another source changes nothing here.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np

from bigmix.data.packing import (
    LAYOUTS,
    PADDING,
    DroppedTokens,
    PackedRows,
    PackingOptions,
    RowLayout,
    RowTable,
    ragged,
)
from bigmix.data.quarantine import BadShard, Substitution, substitution
from bigmix.data.records import Row, RowId, RowIds
from bigmix.data.shards.manifest import Manifest
from bigmix.data.shards.shard import Shard, Unreadable
from bigmix.seeding import key_of, keys_of, permutation, shuffled
from bigmix.types import IGNORE, Ints

WINDOW_SHARDS = 16
OPEN_SHARDS = 2 * WINDOW_SHARDS

OpenShard = Callable[[int], Shard]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    """The shards of an epoch in order, how many rows come before each, and the key of its
    windows.
    """

    shards: Ints
    rows_before: Ints
    key: int


class Stream:
    """The rows of one source in their order."""

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        open_shard: OpenShard,
        packing: PackingOptions,
        *,
        lengths: Ints | None,
        seed: int,
    ) -> None:
        """`lengths` are the tokens of every document in the order of the shards, where the source
        has a file of them.
        """
        self.name = name
        self.manifest = manifest
        self.packing = packing
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._seed = seed
        self._lengths = lengths
        self._documents_before = np.concatenate(
            [[0], np.cumsum(manifest.shards.column("documents"))]
        )
        self._open = lru_cache(maxsize=OPEN_SHARDS)(open_shard)
        self.table = lru_cache(maxsize=OPEN_SHARDS)(self._make_table)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._substitution = lru_cache(maxsize=2)(self._make_substitution)
        self._layout: RowLayout = LAYOUTS[manifest.kind](options=packing)
        self._rows_of_shard = self._count_rows()
        self.rows_per_epoch = int(self._rows_of_shard.sum())
        # Counting may have opened shards, and the order of fetching assumes that none is open.
        self._open.cache_clear()

    def release(self) -> None:
        """Close the shards that are held open; one is opened again when a row of it is read."""
        self._open.cache_clear()
        self.table.cache_clear()

    def num_shards_but(self, others: Collection[int]) -> int:
        """How many shards have rows, without these others."""
        return int(np.count_nonzero(np.delete(self._rows_of_shard, list(others))))

    def num_rows_in(self, shards: Collection[int]) -> int:
        """How many rows of an epoch these shards have."""
        return int(self._rows_of_shard[list(shards)].sum())

    @cached_property
    def lost(self) -> DroppedTokens:
        """The documents that packing drops or truncates in an epoch."""
        return self._layout.dropped(self._lengths)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in the rows of an epoch, without padding."""
        return int(self.manifest.shards.column("tokens").sum()) - self.lost.num_tokens

    def row_ids(self, indices_R: Ints, bad: frozenset[int] = frozenset()) -> RowIds:
        """The ids of rows that are counted from 0 over all epochs; rows of `bad` shards are
        replaced by rows of the others.
        """
        epochs_R, within_R = np.divmod(indices_R, self.rows_per_epoch)
        shards_R, rows_R = np.empty_like(epochs_R), np.empty_like(epochs_R)
        for epoch in dict.fromkeys(epochs_R.tolist()):
            own = epochs_R == epoch
            shards_R[own], rows_R[own] = self._places_in(epoch, within_R[own], bad)
        return RowIds(
            names=(self.name,),
            sources_R=np.zeros_like(epochs_R),
            epochs_R=epochs_R,
            shards_R=shards_R,
            rows_R=rows_R,
        )

    def in_shard_order(self) -> Sequence[RowId]:
        """Every row once, in the order of the shards; for evaluation."""
        return [
            RowId(source=self.name, epoch=0, shard=shard, row=row)
            for shard, rows in enumerate(self._rows_of_shard.tolist())
            for row in range(rows)
        ]

    def lengths_of(self, shard_index: int) -> Ints:
        """The tokens of each document of a shard; raises BadShard where it cannot be read."""
        if self._lengths is not None:
            before, after = self._documents_before[shard_index : shard_index + 2]
            return self._lengths[before:after].astype(np.int64)
        try:
            return self._shard(shard_index).lengths
        except Unreadable as error:
            raise self._bad(shard_index, error) from error

    def rows(self, shard_index: int, indices: Ints) -> PackedRows:
        """Rows of a shard by their numbers; raises BadShard where the shard cannot be read."""
        try:
            shard, table = self._shard(shard_index), partial(self.table, shard_index)
            return self._layout.read(shard, indices, table)
        except Unreadable as error:
            raise self._bad(shard_index, error) from error

    def read(self, row_id: RowId) -> Row:
        """A row, in a form to look at."""
        rows = self.rows(row_id.shard, np.array([row_id.row]))
        ids = np.frombuffer(b"".join(rows.pieces), self.dtype).astype(np.int64)
        labels = np.full(len(ids), IGNORE, np.int64)
        kept = ragged(rows.begins_K, rows.lengths_K)
        labels[kept] = ids[kept + 1]
        lengths_P = np.diff(rows.starts_P, append=len(ids))
        is_document = rows.documents_P != PADDING
        return Row(
            id=row_id,
            ids_T=ids,
            positions_T=np.arange(len(ids)) - np.repeat(rows.starts_P, lengths_P),
            labels_T=labels,
            starts_P=rows.starts_P[is_document],
            documents_P=rows.documents_P[is_document],
            num_tokens=int(rows.tokens_R[0]),
        )

    def _places_in(self, number: int, within_R: Ints, bad: frozenset[int]) -> tuple[Ints, Ints]:
        """The shard of each of these rows of an epoch, and its number in the shard: rows are
        permuted inside their window.
        """
        epoch = self._epoch(number)
        before = epoch.rows_before
        windows_R = (np.searchsorted(before, within_R, side="right") - 1) // WINDOW_SHARDS
        begins_R = before[windows_R * WINDOW_SHARDS]
        ends_R = before[np.minimum((windows_R + 1) * WINDOW_SHARDS, len(before) - 1)]
        keys_R = keys_of(epoch.key, windows_R)
        at_R = begins_R + shuffled(within_R - begins_R, ends_R - begins_R, keys_R)
        places_R = np.searchsorted(before, at_R, side="right") - 1
        rows_R = at_R - before[places_R]
        if bad:
            substitution = self._substitution(number, bad)
            own = np.flatnonzero(np.isin(epoch.shards[places_R], list(bad)))
            places_R[own], rows_R[own] = substitution.of(places_R[own], rows_R[own])
        return epoch.shards[places_R], rows_R

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = permutation(
            len(self._rows_of_shard), key_of(self._seed, self.name, epoch, "shards")
        )
        return _Epoch(
            shards=shards,
            rows_before=np.concatenate([[0], np.cumsum(self._rows_of_shard[shards])]),
            key=key_of(self._seed, self.name, epoch, "rows"),
        )

    def _make_substitution(self, number: int, bad: frozenset[int]) -> Substitution:
        shards = self._epoch(number).shards
        return substitution(
            self._rows_of_shard[shards],
            np.isin(shards, list(bad)),
            window_shards=WINDOW_SHARDS,
            key=key_of(self._seed, self.name, number, "substitutes"),
        )

    def _count_rows(self) -> Ints:
        tokens_S = self.manifest.shards.column("tokens")
        counts_S = self._layout.count_rows(tokens_S, self.lengths_of)
        if counts_S is not None:
            return counts_S
        return np.array(
            [len(self.table(shard).rows_R6) for shard in range(len(tokens_S))], np.int64
        )

    def _shard(self, index: int) -> Shard:
        """An opened shard, whose file is checked to have still its whole size."""
        shard = self._open(index)
        shard.check_size()
        return shard

    def _bad(self, index: int, error: Unreadable) -> BadShard:
        return BadShard(self.name, index, self.manifest.shards[index].file, str(error))

    def _make_table(self, index: int) -> RowTable:
        lengths_D = self.lengths_of(index)
        try:
            return self._layout.table(self._shard(index), lengths_D)
        except Unreadable as error:
            raise self._bad(index, error) from error
