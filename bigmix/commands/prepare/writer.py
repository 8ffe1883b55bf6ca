"""Writes the shards of a part of a source, and decides which documents go into them.

Duplicates are dropped, and a fraction of the documents is held out and written to a source of its
own; both are decided from the hashes of the documents.

Letter: D documents.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigmix.commands.prepare.progress import SHARD, Progress, held_out_folder, write_progress
from bigmix.commands.prepare.tokenise import DroppedRecord, Hashes, TokenisedBatch
from bigmix.data.shards.manifest import Manifest, ShardEntry, ShardTable, Statistics, statistics_of
from bigmix.data.shards.shard import ShardWriter
from bigmix.types import Flags

FRESH = 1 << 16  # hashes that a set holds before they are sorted into an array


class Seen:
    """The hashes of all documents so far, in sorted arrays whose sizes double.

    Takes 16 bytes for each document, 32 while two arrays are merged.
    """

    def __init__(self) -> None:
        self._fresh: set[bytes] = set()
        self._sorted: list[Hashes] = []

    def add(self, hashes: Hashes) -> Flags:
        """Add hashes [D]; returns which of them are new [D]: of equal ones only the first is."""
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
    """Which documents are held out [D]: those with a hash in the first `fraction` of all hashes."""
    first = np.frombuffer(hashes.tobytes(), ">u8")[::2]
    flags: Flags = first < np.uint64(int(fraction * 2.0**64))
    return flags


PartPosition = tuple[int, int]  # a piece, and a record in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The size of a shard, whether duplicates are dropped, and the fraction of documents that is
    held out.
    """

    shard_tokens: int
    deduplicate: bool
    held_out: float


class PartWriter:
    """Writes the shards of one part, and counts the documents written and dropped."""

    def __init__(
        self,
        output: Path,
        begun: Progress,
        rules: Rules,
        *,
        seen: Seen,
        position: Callable[[int], PartPosition],
    ) -> None:
        """Continue from `begun`; `position` gives the position of the part after a number of its
        records.
        """
        self._output = output
        self._begun = begun
        self._rules = rules
        self._seen = seen
        self._position = position
        self._dropped = Counter(begun.source.dropped)
        self._first_dropped = dict(begun.first_dropped)
        self._source = _SourceWriter(output, begun, begun.source)
        self._held_out = (
            None
            if begun.held_out is None
            else _SourceWriter(held_out_folder(output), begun, begun.held_out)
        )
        self.num_read = begun.source.read

    @property
    def num_tokens(self) -> int:
        """Tokens written so far, without those that are held out."""
        return self._source.num_tokens

    def add(self, batch: TokenisedBatch) -> None:
        """Write the documents of a batch and count the dropped ones; whenever a shard is full,
        finish it and write the progress.
        """
        if self._rules.deduplicate:
            batch = self._without_duplicates(batch)
        while (num_records := self._records_to_end_of_shard(batch)) is not None:
            full, batch = batch.split(num_records)
            self._add(full)
            self.save(whole=False)
        self._add(batch)

    def save(self, *, whole: bool) -> Progress:
        """Finish the open shards, and write that all records so far are done."""
        piece, record = self._position(self.num_read)
        source = self._source.close()
        progress = self._begun.model_copy(
            update={
                "piece": piece,
                "row": record,
                "first_dropped": self._first_dropped,
                "source": source.model_copy(
                    update={"read": self.num_read, "dropped": dict(sorted(self._dropped.items()))}
                ),
                "held_out": None if self._held_out is None else self._held_out.close(),
                "whole": whole,
            }
        )
        write_progress(self._output, progress)
        return progress

    def abort(self) -> None:
        """Remove the open shards, if there are any."""
        for writer in filter(None, (self._source, self._held_out)):
            writer.abort()

    def _without_duplicates(self, batch: TokenisedBatch) -> TokenisedBatch:
        is_new = self._seen.add(batch.hashes)
        duplicates = batch.records[~is_new].tolist()
        dropped = [DroppedRecord(record, "duplicate", None) for record in duplicates]
        return batch.select(is_new, [*batch.dropped, *dropped])

    def _records_to_end_of_shard(self, batch: TokenisedBatch) -> int | None:
        """How many records of a batch fill the open shard; None where they do not fill it."""
        learned = ~self._is_held_out(batch)
        num_tokens = self._source.num_open_tokens + np.cumsum(batch.num_tokens[learned])
        at = int(num_tokens.searchsorted(self._rules.shard_tokens))
        return None if at == len(num_tokens) else int(batch.records[learned][at]) + 1

    def _is_held_out(self, batch: TokenisedBatch) -> Flags:
        return is_held_out(batch.hashes, self._rules.held_out)

    def _add(self, batch: TokenisedBatch) -> None:
        self.num_read += batch.num_read
        for dropped in batch.dropped:
            self._dropped[dropped.reason] += 1
            if dropped.place is not None:
                self._first_dropped.setdefault(dropped.reason, dropped.place)
        if self._held_out is None:
            self._source.add(batch)
            return
        held_out = self._is_held_out(batch)
        if held_out.any():
            self._dropped["held_out"] += int(held_out.sum())
            self._held_out.add(batch.select(held_out, ()))
        self._source.add(batch.select(~held_out, ()))


class _SourceWriter:
    """Writes the shards of one of the two sources: the documents to learn, or those held out."""

    def __init__(self, folder: Path, progress: Progress, begun: Manifest) -> None:
        self._folder = folder
        self._prefix = SHARD if progress.parts == 1 else f"{SHARD}{progress.part + 1:05d}-"
        self._begun = begun
        self._shards: list[ShardEntry] = list(begun.shards)
        self._loss_bytes = begun.loss_bytes
        self._statistics = begun.statistics or Statistics()
        self._writer: ShardWriter | None = None
        self.num_tokens = begun.tokens

    @property
    def num_open_tokens(self) -> int:
        """Tokens in the open shard."""
        return 0 if self._writer is None else self._writer.num_tokens

    def add(self, batch: TokenisedBatch) -> None:
        """Write the documents of a batch, into a new shard where none is open."""
        if len(batch.records) == 0:
            return
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{self._prefix}{len(self._shards):06d}.tar"
            self._writer = ShardWriter(path, self._begun.dtype, masked=batch.loss_mask is not None)
        self._writer.add_many(batch.ids, batch.num_tokens, batch.loss_mask)
        self.num_tokens += len(batch.ids)
        self._loss_bytes += int(batch.loss_bytes.sum())
        self._statistics += statistics_of(
            tokens=batch.num_tokens,
            loss_tokens=batch.num_loss_tokens,
            turns=batch.num_turns,
            characters=batch.num_characters,
            text_bytes=batch.text_bytes,
        )

    def close(self) -> Manifest:
        """Finish the open shard, if there is one; returns the counts over all shards."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
        num_documents = sum(shard.documents for shard in self._shards)
        return self._begun.model_copy(
            update={
                "read": num_documents,
                "documents": num_documents,
                "tokens": self.num_tokens,
                "loss_tokens": sum(shard.loss_tokens for shard in self._shards),
                "loss_bytes": self._loss_bytes,
                "statistics": self._statistics,
                "shards": ShardTable.of(self._shards),
            }
        )

    def abort(self) -> None:
        """Remove the open shard, if there is one."""
        if self._writer is None:
            return
        try:
            self._writer.abort()
        except OSError:  # a full disk takes not even the end of the archive
            for path in self._folder.glob(f"{self._prefix}{len(self._shards):06d}.tar.tmp"):
                path.unlink()
        self._writer = None
