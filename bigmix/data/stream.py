"""A prepared source goes in, its n-th row comes out, for any n, without passing over the rows before.

Shards are permuted in each epoch, rows inside a window of shards; both by keys of (seed, source name, epoch), so that
another source changes nothing here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from bigmix.data.order import Indices, key_of, permutation
from bigmix.data.packing import Packing, pack_chat, pack_text
from bigmix.data.shards import Manifest, Shard, sha256_of
from bigmix.errors import BigmixError
from bigmix.records import IGNORE, Row, RowId

WINDOW_SHARDS = 16
OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class _Epoch:
    """An epoch's shards in order, how many rows come before each, and the shard at which each window begins."""

    shards: Indices
    rows_before: Indices


class Stream:
    """The rows of one source in their order. `row_tokens` is the recipe's sequence_length."""

    def __init__(
        self,
        name: str,
        folder: str,
        manifest: Manifest,
        *,
        row_tokens: int,
        long_documents: Literal["drop", "truncate"],
        seed: int,
    ) -> None:
        self.name = name
        self.manifest = manifest
        self._folder = Path(folder)
        self._row_tokens = row_tokens
        self._long_documents = long_documents
        self._seed = seed
        self._checked: set[int] = set()
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=2)(self._make_window)
        # The rows of a chat shard follow from its lengths alone, of a text shard from its size.
        self.packings: Sequence[Packing] = [
            self._pack(index) for index in range(len(manifest.shards))
        ]
        self.rows_per_epoch = sum(packing.rows for packing in self.packings)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in the rows of an epoch, padding not counted."""
        return sum(int((p.stops - p.starts).sum()) for p in self.packings)

    def locate(self, index: int) -> RowId:
        """Which row the source's `index`-th is, counted from 0 over all epochs."""
        epoch, within = divmod(index, self.rows_per_epoch)
        order = self._epoch(epoch)
        place = int(np.searchsorted(order.rows_before, within, side="right")) - 1
        window = place // WINDOW_SHARDS
        begin = int(order.rows_before[window * WINDOW_SHARDS])
        position = int(self._window(epoch, window)[within - begin]) + begin
        place = int(np.searchsorted(order.rows_before, position, side="right")) - 1
        return RowId(
            source=self.name,
            epoch=epoch,
            shard=int(order.shards[place]),
            row=position - int(order.rows_before[place]),
        )

    def in_shard_order(self) -> Sequence[RowId]:
        """Every row once, as the shards hold them; for evaluation."""
        return [
            RowId(source=self.name, epoch=0, shard=shard, row=row)
            for shard, packing in enumerate(self.packings)
            for row in range(packing.rows)
        ]

    def read(self, row_id: RowId) -> Row:
        """The tokens of a row."""
        self._check(row_id.shard)
        shard, packing = self._shard(row_id.shard), self.packings[row_id.shard]
        first, end = int(packing.firsts[row_id.row]), int(packing.firsts[row_id.row + 1])
        ids = np.zeros(self._row_tokens, np.int64)
        labels = np.full(self._row_tokens, IGNORE, np.int64)
        positions = np.empty(self._row_tokens, np.int64)
        starts = []
        at = 0
        for start, stop in zip(packing.starts[first:end], packing.stops[first:end], strict=True):
            length = int(stop - start)
            starts.append(at)
            ids[at : at + length] = shard.tokens(int(start), int(stop))
            positions[at : at + length] = np.arange(length)
            following = ids[at + 1 : at + length]
            if self.manifest.kind == "chat":
                in_loss = shard.loss_mask(int(start), int(stop))[1:]
                following = np.where(in_loss, following, IGNORE)
            labels[at : at + length - 1] = following
            at += length
        positions[at:] = np.arange(self._row_tokens - at)
        return Row(
            id=row_id,
            ids_T=ids,
            positions_T=positions,
            labels_T=labels,
            starts_P=np.array(starts, np.int64),
            documents_P=packing.documents[first:end],
            tokens=at,
        )

    def open_shard(self, index: int) -> Shard:
        """A shard as it lies on the disk, for what is not a row: lengths and masks."""
        return self._shard(index)

    def _check(self, index: int) -> None:
        """Before the first row of a shard is used, its content must be what was prepared."""
        if index in self._checked:
            return
        entry = self.manifest.shards[index]
        path = self._folder / entry.file
        if sha256_of(path) != entry.sha256:
            raise BigmixError(
                f"{path}: its sha256 is not the manifest's: its content has changed; "
                "restore the file or prepare the source again"
            )
        self._checked.add(index)

    def _pack(self, index: int) -> Packing:
        if self.manifest.kind == "text":
            return pack_text(self._shard(index).lengths, self._row_tokens)
        return pack_chat(self._shard(index).lengths, self._row_tokens, self._long_documents)

    def _open(self, index: int) -> Shard:
        entry = self.manifest.shards[index]
        return Shard(self._folder / entry.file, entry, self.manifest.dtype)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = permutation(len(self.packings), key_of(self._seed, self.name, epoch, "shards"))
        rows = np.array([self.packings[shard].rows for shard in shards], np.int64)
        return _Epoch(shards=shards, rows_before=np.concatenate([[0], np.cumsum(rows)]))

    def _make_window(self, epoch: int, window: int) -> Indices:
        rows_before = self._epoch(epoch).rows_before
        begin = window * WINDOW_SHARDS
        end = min(begin + WINDOW_SHARDS, len(rows_before) - 1)
        count = int(rows_before[end] - rows_before[begin])
        return permutation(count, key_of(self._seed, self.name, epoch, "rows", window))
