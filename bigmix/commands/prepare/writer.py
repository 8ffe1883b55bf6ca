"""Batches of tokenised documents go in, the shards of a part and its progress come out.

Hashes of documents go in, the news whether each was there before comes out; and which documents are
held out.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bigmix.commands.prepare.progress import SHARD, Progress, held_out_folder, write_progress
from bigmix.commands.prepare.tokenise import DroppedRow, TokenisedBatch
from bigmix.data.shards.manifest import Manifest, ShardEntry, ShardTable, Statistics, statistics_of
from bigmix.data.shards.shard import ShardWriter
from bigmix.types import Flags

FRESH = 1 << 16  # hashes that are kept in a set before they are sorted into an array

Hashes = npt.NDArray[np.bytes_]


class Seen:
    """All hashes so far, in sorted arrays that double in size: 16 bytes a document, 32 while two
    arrays are joined.
    """

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._sorted: list[Hashes] = []

    def add(self, hashes: Hashes) -> Flags:
        """Which of the hashes [D] come here for the first time [D]; of equal ones that is the
        first.
        """
        known = np.zeros(len(hashes), np.bool_)
        for array in self._sorted:
            places = np.minimum(array.searchsorted(hashes), len(array) - 1)
            known |= array[places] == hashes
        is_new = ~known
        for index in np.flatnonzero(is_new).tolist():
            key = hashes[index]
            if key in self._fresh:
                is_new[index] = False
            self._fresh.add(key)
        if len(self._fresh) >= FRESH:
            self._sort()
        return is_new

    def _sort(self) -> None:
        array = np.sort(np.array(list(self._fresh), "S16"))
        self._fresh = set()
        while self._sorted and len(self._sorted[-1]) <= len(array):
            array = np.sort(np.concatenate([self._sorted.pop(), array]), kind="stable")
        self._sorted.append(array)


def is_held_out(hashes: Hashes, fraction: float) -> Flags:
    """Which documents are held out [D]: those whose hash lies in the first `fraction` of all
    hashes.
    """
    first = np.frombuffer(hashes.tobytes(), ">u8")[::2]
    flags: Flags = first < np.uint64(int(fraction * 2.0**64))
    return flags


PartPosition = tuple[int, int]  # a piece, and a row in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """When a shard is full, whether duplicates are left out, and the fraction of documents that is
    held out.
    """

    shard_tokens: int
    deduplicate: bool
    held_out: float


class PartWriter:
    """The shards of one part, and the counts of what went into them and of what did not."""

    def __init__(
        self,
        output: Path,
        begun: Progress,
        rules: Rules,
        *,
        seen: Seen,
        position: Callable[[int], PartPosition],
    ) -> None:
        """Go on from `begun`; `position` tells where the part stands after so many rows of it."""
        self._output = output
        self._begun = begun
        self._rules = rules
        self._seen = seen
        self._position = position
        self._dropped = Counter(begun.source.dropped)
        self._first_dropped = dict(begun.first_dropped)
        self._source = _Side(output, begun, begun.source)
        self._held_out = (
            None
            if begun.held_out is None
            else _Side(held_out_folder(output), begun, begun.held_out)
        )
        self.read = begun.source.read

    @property
    def tokens(self) -> int:
        return self._source.tokens

    def add(self, batch: TokenisedBatch) -> None:
        """Write the documents of a batch and count the others; a full shard is finished, and the
        progress written.
        """
        if self._rules.deduplicate:
            batch = self._without_duplicates(batch)
        while (rows := self._rows_to_the_end_of_the_shard(batch)) is not None:
            full, batch = batch.split(rows)
            self._add(full)
            self.save(whole=False)
        self._add(batch)

    def save(self, *, whole: bool) -> Progress:
        """Finish the open shards, and write that all rows up to here are done."""
        piece, row = self._position(self.read)
        source = self._source.close()
        progress = self._begun.model_copy(
            update={
                "piece": piece,
                "row": row,
                "first_dropped": self._first_dropped,
                "source": source.model_copy(
                    update={"read": self.read, "dropped": dict(sorted(self._dropped.items()))}
                ),
                "held_out": None if self._held_out is None else self._held_out.close(),
                "whole": whole,
            }
        )
        write_progress(self._output, progress)
        return progress

    def abort(self) -> None:
        """Remove the open shards, if any are."""
        for side in filter(None, (self._source, self._held_out)):
            side.abort()

    def _without_duplicates(self, batch: TokenisedBatch) -> TokenisedBatch:
        is_new = self._seen.add(batch.hashes)
        again = [DroppedRow(row, "duplicate", None) for row in batch.rows[~is_new].tolist()]
        return batch.select(is_new, [*batch.dropped, *again])

    def _rows_to_the_end_of_the_shard(self, batch: TokenisedBatch) -> int | None:
        """How many rows of a batch fill the open shard; None where they do not."""
        learned = ~self._is_held_out(batch)
        tokens = self._source.open_tokens + np.cumsum(batch.tokens[learned])
        at = int(tokens.searchsorted(self._rules.shard_tokens))
        return None if at == len(tokens) else int(batch.rows[learned][at]) + 1

    def _is_held_out(self, batch: TokenisedBatch) -> Flags:
        return is_held_out(batch.hashes, self._rules.held_out)

    def _add(self, batch: TokenisedBatch) -> None:
        self.read += batch.read
        for row in batch.dropped:
            self._dropped[row.reason] += 1
            if row.place is not None:
                self._first_dropped.setdefault(row.reason, row.place)
        if self._held_out is None:
            self._source.add(batch)
            return
        apart = self._is_held_out(batch)
        if apart.any():
            self._dropped["held_out"] += int(apart.sum())
            self._held_out.add(batch.select(apart, ()))
        self._source.add(batch.select(~apart, ()))


class _Side:
    """The shards of what is learned, or of what is held out."""

    def __init__(self, folder: Path, progress: Progress, begun: Manifest) -> None:
        self._folder = folder
        self._prefix = SHARD if progress.parts == 1 else f"{SHARD}{progress.part + 1:05d}-"
        self._begun = begun
        self._shards: list[ShardEntry] = list(begun.shards)
        self._loss_bytes = begun.loss_bytes
        self._statistics = begun.statistics or Statistics()
        self._writer: ShardWriter | None = None
        self.tokens = begun.tokens

    @property
    def open_tokens(self) -> int:
        return 0 if self._writer is None else self._writer.num_tokens

    def add(self, batch: TokenisedBatch) -> None:
        if len(batch.rows) == 0:
            return
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._prefix}{len(self._shards):06d}.tar"
            self._writer = ShardWriter(path, self._begun.dtype, masked=batch.loss_mask is not None)
        self._writer.add_many(batch.ids, batch.tokens, batch.loss_mask)
        self.tokens += len(batch.ids)
        self._loss_bytes += int(batch.loss_bytes.sum())
        self._statistics += statistics_of(
            tokens=batch.tokens,
            loss_tokens=batch.loss_tokens,
            turns=batch.turns,
            characters=batch.characters,
            text_bytes=batch.text_bytes,
        )

    def close(self) -> Manifest:
        """Finish the open shard, if one is; what all of them hold."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
        documents = sum(shard.documents for shard in self._shards)
        return self._begun.model_copy(
            update={
                "read": documents,
                "documents": documents,
                "tokens": self.tokens,
                "loss_tokens": sum(shard.loss_tokens for shard in self._shards),
                "loss_bytes": self._loss_bytes,
                "statistics": self._statistics,
                "shards": ShardTable.of(self._shards),
            }
        )

    def abort(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.abort()
        except OSError:  # on a full disk the end of the archive cannot be written
            for path in self._folder.glob(f"{self._prefix}{len(self._shards):06d}.tar.tmp"):
                path.unlink()
        self._writer = None
