"""Writes tokenised documents to uncompressed tar shards, and reads shards.

A shard is a POSIX tar that the webdataset library can read. One sample of it is a *block* of
documents: `KEY.tokens.npy`, `KEY.lengths.npy` and, for chats, `KEY.loss_mask.npy` (one bit a
token). The last sample also has `KEY.blocks.npy`, a table of where each array starts and of its
checksum. So a reader maps the file and takes slices: nothing is decoded, and a damaged block is
found when it is first read.

Letters: T tokens, D documents, B blocks.
"""

import io
import mmap
import tarfile
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from bigmix.data.shards.manifest import LENGTHS, FileEntry, Manifest, ShardEntry
from bigmix.errors import BigmixError
from bigmix.files import atomic_write, put_in_place, sha256_of, temporary_path
from bigmix.types import Flags, Ints

BLOCK_TOKENS = 1 << 17
TAR_BLOCK = 512
KEPT_ARRAYS = 256  # arrays of blocks that a shard read in ranges keeps in memory

TokenIds = npt.NDArray[np.unsignedinteger[Any]]
Bytes = npt.NDArray[np.uint8]

# The columns of the table of blocks, all uint64: counts, byte offsets and checksums.
_DOCUMENTS, _TOKENS, _TOKENS_AT, _LENGTHS_AT, _MASK_AT = range(5)
_TOKENS_CHECK, _LENGTHS_CHECK, _MASK_CHECK = range(5, 8)
_COLUMNS = 8
_TABLE_DTYPE, _LENGTH_DTYPE, _BYTE = np.dtype("<u8"), np.dtype("<u4"), np.dtype(np.uint8)


class Unreadable(BigmixError):
    """A shard is missing, truncated or not what was prepared, and no later try will change it."""


class ShardWriter:
    """Writes one shard, which gets its name when it is whole; memory holds one block."""

    def __init__(self, path: Path, dtype: str, *, masked: bool) -> None:
        self._path = path
        self._temporary = temporary_path(path)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masked = masked
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._table: list[list[int]] = []
        self._ids: list[TokenIds] = []
        self._masks: list[Flags] = []
        self._lengths: list[Ints] = []
        self._open_tokens = 0
        self._documents = 0
        self._loss_tokens = 0
        self.num_tokens = 0

    def add(self, ids: TokenIds, loss_mask: Flags | None) -> None:
        """Append a document: ids [T] and, for a chat, which of them are in the loss [T]."""
        self.add_many(ids, np.array([len(ids)]), loss_mask)

    def add_many(self, ids: TokenIds, lengths: Ints, loss_mask: Flags | None) -> None:
        """Append documents of these lengths [D] that are laid end to end [T]; the file is the same
        as if they were added one by one.
        """
        ends = np.cumsum(lengths)
        document, token = 0, 0
        while document < len(lengths):
            # A block ends with the document that fills it.
            least = BLOCK_TOKENS - self._open_tokens + token
            stop = min(int(ends.searchsorted(least)) + 1, len(lengths))
            end = int(ends[stop - 1])
            mask = None if loss_mask is None else loss_mask[token:end]
            self._append(ids[token:end], lengths[document:stop], mask)
            document, token = stop, end

    def _append(self, ids: TokenIds, lengths: Ints, loss_mask: Flags | None) -> None:
        """Add documents to the open block, which none but the last may fill."""
        self._ids.append(ids)
        self._lengths.append(lengths)
        if loss_mask is not None:
            self._masks.append(loss_mask)
        in_loss = len(ids) - len(lengths) if loss_mask is None else np.count_nonzero(loss_mask)
        self._loss_tokens += int(in_loss)
        self._open_tokens += len(ids)
        self._documents += len(lengths)
        self.num_tokens += len(ids)
        if self._open_tokens >= BLOCK_TOKENS:
            self._flush()

    def close(self) -> ShardEntry:
        """Finish the file and give it its name."""
        if self._ids:
            self._flush()
        table = np.array(self._table, _TABLE_DTYPE).reshape(-1, _COLUMNS)
        blocks_at = self._member(f"{max(0, len(table) - 1):06d}.blocks.npy", table)
        self._tar.close()
        entry = ShardEntry(
            file=self._path.name,
            bytes=self._temporary.stat().st_size,
            sha256=sha256_of(self._temporary),
            documents=self._documents,
            tokens=self.num_tokens,
            loss_tokens=self._loss_tokens,
            blocks=len(table),
            blocks_at=blocks_at,
            blocks_check=f"{_check(table):016x}",
        )
        put_in_place(self._temporary, self._path)
        return entry

    def abort(self) -> None:
        """Delete what was written."""
        self._tar.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        key = f"{len(self._table):06d}"
        tokens = np.concatenate(self._ids).astype(self._dtype)
        lengths = np.concatenate(self._lengths).astype(_LENGTH_DTYPE)
        tokens_at = self._member(f"{key}.tokens.npy", tokens)
        lengths_at = self._member(f"{key}.lengths.npy", lengths)
        mask_at, mask_check = 0, 0
        if self._masked:
            bits = np.packbits(np.concatenate(self._masks), bitorder="little")
            mask_at, mask_check = self._member(f"{key}.loss_mask.npy", bits), _check(bits)
        offsets, checks = (tokens_at, lengths_at, mask_at), (_check(tokens), _check(lengths))
        self._table.append([len(lengths), len(tokens), *offsets, *checks, mask_check])
        self._ids, self._lengths, self._masks, self._open_tokens = [], [], [], 0

    def _member(self, name: str, array: npt.NDArray[Any]) -> int:
        """Append an array as a member; returns the byte offset of its raw data in the tar."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, allow_pickle=False)
        info = tarfile.TarInfo(name)
        info.size = buffer.tell()
        buffer.seek(0)
        self._tar.addfile(info, buffer)
        padded = -(-info.size // TAR_BLOCK) * TAR_BLOCK
        return self._tar.offset - padded + info.size - array.nbytes


def _check(array: npt.NDArray[Any]) -> int:
    """The checksum of an array's bytes: XXH3, which is as fast as memory is read."""
    return xxhash.xxh3_64_intdigest(array.tobytes())


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteSource:
    """Where the bytes of a shard come from: `read(start, stop)` gives them as uint8; `name` is for
    messages.

    `mapping` is the whole file where it is mapped into memory, so that arrays need not be kept.
    `damaged` is called with what is wrong where the bytes are not those that were prepared, so that
    a damaged copy is not read again; it raises BigmixError where more than this file is at fault.
    """

    name: str
    read: Callable[[int, int], Bytes]
    mapping: mmap.mmap | None = None
    damaged: Callable[[str], None] | None = None


def mapped(path: Path, size: int) -> ByteSource:
    """A file of `size` bytes on local disk, mapped into memory.

    Raises Unreadable where it is missing or of another size.
    """
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise Unreadable(
            f"{path} cannot be read ({error}); restore the file or prepare the source again"
        ) from error
    if len(mapping) != size:
        raise Unreadable(
            f"{path} has {len(mapping)} bytes, the manifest says {size}; restore the file or"
            " prepare the source again"
        )
    content = np.frombuffer(mapping, np.uint8)
    return ByteSource(name=str(path), read=lambda start, stop: content[start:stop], mapping=mapping)


class Shard:
    """A shard as flat arrays over all its blocks; positions are token positions in the shard.

    The checksum of each array of a block is checked when it is first read. Unreadable is raised,
    with the file and the byte, where one is damaged.
    """

    def __init__(self, source: ByteSource, entry: ShardEntry, dtype: str) -> None:
        self._source = source
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.width = int(self._dtype.itemsize)  # bytes of an id
        self._arrays: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        size = entry.blocks * _COLUMNS * _TABLE_DTYPE.itemsize
        raw = self._bytes(entry.blocks_at, size, int(entry.blocks_check, 16))
        self._table: list[list[int]] = raw.view(_TABLE_DTYPE).reshape(-1, _COLUMNS).tolist()
        self._begins = [0, *accumulate(block[_TOKENS] for block in self._table)]
        self._first_documents = [0, *accumulate(block[_DOCUMENTS] for block in self._table)]
        self._size = entry.bytes
        self._file: mmap.mmap | None = None
        self._ends: dict[int, list[int]] = {}

    def check_size(self) -> None:
        """Raise Unreadable where the mapped file has become shorter: the kernel kills a process
        that reads behind its end.
        """
        mapping = self._source.mapping
        if mapping is not None and mapping.size() < self._size:
            raise Unreadable(
                f"{self._source.name} has {mapping.size()} bytes and had {self._size} when it was"
                " opened: it was truncated while it was read; restore the file or prepare the"
                " source again"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self._begins[-1]

    @property
    def lengths(self) -> Ints:
        """Tokens of each document."""
        parts = [self._lengths_of(block) for block in range(len(self._table))]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    @property
    def offsets(self) -> Ints:
        """Where each document begins, and behind the last one the end of all."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def tokens(self, start: int, stop: int) -> TokenIds:
        """The ids at token positions [start, stop)."""
        ids: TokenIds = np.frombuffer(self.piece(start, stop), self._dtype)
        return ids

    def piece(self, start: int, stop: int) -> bytes:
        """The bytes of the ids at token positions [start, stop)."""
        block, width = bisect_right(self._begins, start) - 1, self.width
        begin, end = self._begins[block], self._begins[block + 1]
        if stop <= end:
            return self._ids_of(block, width * (start - begin), width * (stop - begin))
        first = self._ids_of(block, width * (start - begin), width * (end - begin))
        return first + self.piece(end, stop)

    def addresses(self, starts: Ints) -> Ints:
        """Where the parts of documents that begin at these positions are in the file, in tokens
        from its beginning.
        """
        blocks = np.searchsorted(self._begins, starts, side="right") - 1
        at = np.array([row[_TOKENS_AT] // self.width for row in self._table], np.int64)
        return starts + (at - self._begins[:-1])[blocks]

    def pieces_at(
        self, addresses: npt.NDArray[Any], lengths: npt.NDArray[Any], padding: bytes
    ) -> list[bytes]:
        """The bytes of the ids of parts of documents; of `padding` where an address is below 0."""
        begins = addresses.astype(np.int64) * self.width
        ends = (begins + lengths * self.width).tolist()
        file = self._file or self._checked_file()
        if file is None:
            pieces = [self._piece(at, end) for at, end in zip(begins.tolist(), ends, strict=True)]
        else:
            # The parts are all over the file. Read together, many of their first bytes come from
            # memory at a time.
            self._source.read(0, self._size).take(begins, mode="clip")
            # bytes and not views: a million views that stay alive would keep Python's garbage
            # collector busy.
            pieces = [file[at:end] for at, end in zip(begins.tolist(), ends, strict=True)]
        for at in np.flatnonzero(begins < 0).tolist():
            pieces[at] = padding[: int(lengths[at]) * self.width]
        return pieces

    def _checked_file(self) -> mmap.mmap | None:
        """A mapped file, after all of its blocks have been checked; None where it is not mapped."""
        if self._source.mapping is not None:
            for block in range(len(self._table)):
                self._ids_of(block, 0, 0)
            self._file = self._source.mapping
        return self._file

    def _piece(self, at: int, end: int) -> bytes:
        """Bytes [at, end) of the file from the ids of one block; a document lies in one block."""
        if at < 0:
            return b""
        block = bisect_right(self._table, at, key=itemgetter(_TOKENS_AT)) - 1
        first = self._table[block][_TOKENS_AT]
        return self._ids_of(block, at - first, end - first)

    def loss_mask(self, start: int, stop: int) -> Flags:
        """Which of the tokens [start, stop) are in the loss; for a chat shard."""
        parts = [np.zeros(0, np.bool_)]
        while start < stop:
            block = bisect_right(self._begins, start) - 1
            begin, end = self._begins[block], min(self._begins[block + 1], stop)
            low, high = start - begin, end - begin
            bits = self._bits_of(block)[low // 8 : -(-high // 8)]
            flags = np.unpackbits(bits, bitorder="little")[low % 8 :][: high - low]
            parts.append(flags.view(np.bool_))
            start = end
        return np.concatenate(parts)

    def loss_runs(self) -> tuple[Ints, Ints]:
        """Runs of tokens [begin, end) in the loss, in order, without the first token of each
        document, which no other predicts.
        """
        # Each block begins at a new word, so that all are searched 64 tokens at a time.
        words_B = [row[_TOKENS] // 64 + 1 for row in self._table]
        first_words = [0, *accumulate(words_B)]
        words = np.zeros(first_words[-1], np.uint64)
        mask = words.view(np.uint8)
        shifts = np.array([64 * word for word in first_words[:-1]]) - self._begins[:-1]
        for block, word in enumerate(first_words[:-1]):
            bits = self._bits_of(block)
            mask[8 * word : 8 * word + len(bits)] = bits
        documents_B = [row[_DOCUMENTS] for row in self._table]
        firsts = self.offsets[:-1] + np.repeat(shifts, documents_B)
        np.bitwise_and.at(mask, firsts >> 3, ~(1 << (firsts & 7)).astype(np.uint8))
        turns = _turns(words)
        blocks = np.searchsorted(first_words, turns >> 6, side="right") - 1
        turns -= np.append(shifts, 0)[blocks].astype(np.int64)
        return turns[0::2], turns[1::2]

    def borders(self, start: int, stop: int) -> tuple[int, list[int]]:
        """The document of the token at `start`, and where others begin in (start, stop), counted
        from `start`.
        """
        block = bisect_right(self._begins, start) - 1
        ends = self._ends_of(block)
        inside = bisect_right(ends, start - self._begins[block])
        first, found = self._first_documents[block] + inside, list[int]()
        while True:
            shift = self._begins[block] - start
            last = bisect_left(ends, stop - self._begins[block])
            found += [end + shift for end in ends[inside:last]]
            if self._begins[block + 1] >= stop:
                return first, found
            block, inside = block + 1, 0
            ends = self._ends_of(block)

    def _ids_of(self, block: int, low: int, high: int) -> bytes:
        """The bytes [low, high) of a block's ids."""
        at, count = self._table[block][_TOKENS_AT], self._table[block][_TOKENS]
        ids = self._array(at, count * self.width, self._table[block][_TOKENS_CHECK], _BYTE)
        if self._source.mapping is not None:
            return self._source.mapping[at + low : at + high]
        return ids[low:high].tobytes()

    def _bits_of(self, block: int) -> npt.NDArray[Any]:
        row = self._table[block]
        assert row[_MASK_AT], "a text shard has no mask"
        return self._array(row[_MASK_AT], (row[_TOKENS] + 7) >> 3, row[_MASK_CHECK], _BYTE)

    def _ends_of(self, block: int) -> list[int]:
        """Where each document of a block ends, counted from the beginning of the block."""
        ends = self._ends.get(block)
        if ends is None:
            ends = np.cumsum(self._lengths_of(block), dtype=np.int64).tolist()
            self._ends[block] = ends
        return ends

    def _lengths_of(self, block: int) -> npt.NDArray[Any]:
        row = self._table[block]
        return self._array(row[_LENGTHS_AT], row[_DOCUMENTS], row[_LENGTHS_CHECK], _LENGTH_DTYPE)

    def _array(self, at: int, count: int, check: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        array = self._arrays.get(at)
        if array is None:
            array = self._keep(at, self._bytes(at, count * dtype.itemsize, check).view(dtype))
        return array

    def _keep(self, at: int, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Keep an array that has been checked; at most KEPT_ARRAYS if the file is not mapped."""
        self._arrays[at] = array
        if self._source.mapping is None and len(self._arrays) > KEPT_ARRAYS:
            self._arrays.popitem(last=False)
        return array

    def _bytes(self, at: int, size: int, check: int) -> Bytes:
        raw = self._source.read(at, at + size)
        if xxhash.xxh3_64_intdigest(raw.data) != check:
            reason = (
                f"{self._source.name}: the block at byte {at} ({size} bytes) is not what was"
                " prepared: its checksum differs; restore the file or prepare the source again"
            )
            if self._source.damaged is not None:
                self._source.damaged(reason)
            raise Unreadable(reason)
        return raw


def _turns(words: npt.NDArray[np.uint64]) -> Ints:
    """Where the bits turn on and off, in order."""
    turns = words ^ (words << np.uint64(1))
    turns[1:] ^= words[:-1] >> np.uint64(63)
    found, busy = [], np.flatnonzero(turns)
    turns = turns[busy]
    while len(busy):
        lowest = turns & (~turns + np.uint64(1))
        # A power of two is exact as a float, and its exponent is the place of the bit.
        found.append(busy * 64 + np.frexp(lowest.astype(np.float64))[1] - 1)
        turns ^= lowest
        left = turns != 0
        busy, turns = busy[left], turns[left]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))


def open_shard(folder: Path, entry: ShardEntry, dtype: str) -> Shard:
    """A shard on local disk."""
    return Shard(mapped(folder / entry.file, entry.bytes), entry, dtype)


def write_lengths(folder: Path, dtype: str, shards: Sequence[ShardEntry]) -> FileEntry:
    """Write the lengths of the documents of all shards to one file in their folder; returns its
    entry for the manifest.
    """
    path = folder / LENGTHS
    total = sum(entry.documents for entry in shards)
    with atomic_write(path) as temporary:
        lengths = np.lib.format.open_memmap(temporary, mode="w+", dtype="<u4", shape=(total,))
        at = 0
        for entry in shards:
            lengths[at : at + entry.documents] = open_shard(folder, entry, dtype).lengths
            at += entry.documents
        lengths.flush()
    return FileEntry(file=LENGTHS, bytes=path.stat().st_size, sha256=sha256_of(path))


def with_lengths(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of a chat source with its file of lengths, which is written now; that of a text
    source as it is.
    """
    if not manifest.has_loss_masks:
        return manifest
    lengths = write_lengths(folder, manifest.dtype, manifest.shards)
    return manifest.model_copy(update={"lengths": lengths})
