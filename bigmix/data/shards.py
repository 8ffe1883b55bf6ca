"""Tokenised documents go in, an uncompressed tar shard comes out, and the way back.

A shard is a POSIX tar that the webdataset library can read. One sample of it is a *block* of documents:
`KEY.tokens.npy`, `KEY.lengths.npy` and, for chats, `KEY.loss_mask.npy` (one bit a token). The last sample also has
`KEY.blocks.npy`, the table that says where each array starts and what its checksum is, so that a reader maps the file
and takes slices: nothing is decoded, and a damaged block is known by its place when it is first touched.
"""

import io
import os
import tarfile
from bisect import bisect_right
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

from bigmix.data.manifest import LENGTHS, FileEntry, Manifest, ShardEntry
from bigmix.errors import BigmixError
from bigmix.files import sha256_of

BLOCK_TOKENS = 1 << 17
TAR_BLOCK = 512
KEPT_ARRAYS = 256  # arrays of blocks that a shard read in ranges keeps in memory

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Mask = npt.NDArray[np.bool_]
Offsets = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# The columns of the table of blocks, all uint64.
_DOCUMENTS, _TOKENS, _TOKENS_AT, _LENGTHS_AT, _MASK_AT, _TOKENS_CHECK, _LENGTHS_CHECK, _MASK_CHECK = range(8)  # fmt: skip
_COLUMNS = 8
_TABLE_DTYPE, _LENGTH_DTYPE, _BYTE = np.dtype("<u8"), np.dtype("<u4"), np.dtype(np.uint8)


class ShardWriter:
    """Writes one shard beside its final place and renames it when whole; memory holds one block."""

    def __init__(self, path: Path, dtype: str, *, masked: bool) -> None:
        self._path = path
        self._beside = path.with_name(path.name + ".tmp")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masked = masked
        self._tar = tarfile.open(self._beside, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._table: list[list[int]] = []
        self._ids: list[Tokens] = []
        self._masks: list[Mask] = []
        self._open_tokens = 0
        self._documents = 0
        self._loss_tokens = 0
        self.tokens = 0

    def add(self, ids: Tokens, loss_mask: Mask | None) -> None:
        """Append a document: ids [T] and, for a chat, which of them are in the loss [T]."""
        self._ids.append(ids)
        if loss_mask is not None:
            self._masks.append(loss_mask)
        self._loss_tokens += len(ids) - 1 if loss_mask is None else int(loss_mask.sum())
        self._open_tokens += len(ids)
        self._documents += 1
        self.tokens += len(ids)
        if self._open_tokens >= BLOCK_TOKENS:
            self._flush()

    def close(self) -> ShardEntry:
        """Finish the file; only after the rename does it exist under its name."""
        if self._ids:
            self._flush()
        table = np.array(self._table, _TABLE_DTYPE).reshape(-1, _COLUMNS)
        blocks_at = self._member(f"{max(0, len(table) - 1):06d}.blocks.npy", table)
        self._tar.close()
        entry = ShardEntry(
            file=self._path.name,
            bytes=self._beside.stat().st_size,
            sha256=sha256_of(self._beside),
            documents=self._documents,
            tokens=self.tokens,
            loss_tokens=self._loss_tokens,
            blocks=len(table),
            blocks_at=blocks_at,
            blocks_check=f"{_check(table):016x}",
        )
        with self._beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._beside, self._path)
        return entry

    def abort(self) -> None:
        """Leave nothing behind."""
        self._tar.close()
        self._beside.unlink(missing_ok=True)

    def _flush(self) -> None:
        key = f"{len(self._table):06d}"
        tokens = np.concatenate(self._ids).astype(self._dtype)
        lengths = np.array([len(ids) for ids in self._ids], _LENGTH_DTYPE)
        tokens_at = self._member(f"{key}.tokens.npy", tokens)
        lengths_at = self._member(f"{key}.lengths.npy", lengths)
        mask_at, mask_check = 0, 0
        if self._masked:
            bits = np.packbits(np.concatenate(self._masks), bitorder="little")
            mask_at, mask_check = self._member(f"{key}.loss_mask.npy", bits), _check(bits)
        self._table.append(
            [
                len(lengths),
                len(tokens),
                tokens_at,
                lengths_at,
                mask_at,
                _check(tokens),
                _check(lengths),
                mask_check,
            ]
        )
        self._ids, self._masks, self._open_tokens = [], [], 0

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
    """The checksum of an array's bytes: XXH3, which is read at the speed of memory."""
    return xxhash.xxh3_64_intdigest(array.tobytes())


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteSource:
    """Where the bytes of a shard are: `read(start, stop)` gives them as uint8; `name` is for messages.

    `is_mapped` tells that reading costs nothing, so that arrays need not be kept.
    """

    name: str
    read: Callable[[int, int], Bytes]
    is_mapped: bool


def mapped(path: Path, size: int) -> ByteSource:
    """A file of `size` bytes on local disk, mapped into memory.

    Raises BigmixError where it is missing or of another size.
    """
    try:
        # asarray: a slice of a memmap object costs ten times one of a plain array.
        content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise BigmixError(
            f"{path} cannot be read ({error}); restore the file or prepare the source again"
        ) from error
    if len(content) != size:
        raise BigmixError(
            f"{path} has {len(content)} bytes, the manifest says {size}; restore the file or prepare the source again"
        )
    return ByteSource(name=str(path), read=lambda start, stop: content[start:stop], is_mapped=True)


class Shard:
    """A shard as flat arrays over all its blocks; positions are token positions in the shard.

    Each array of a block is held against its checksum when it is first read. Raises BigmixError that names the file
    and the byte where it is damaged.
    """

    def __init__(self, source: ByteSource, entry: ShardEntry, dtype: str) -> None:
        self._source = source
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._arrays: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        size = entry.blocks * _COLUMNS * _TABLE_DTYPE.itemsize
        raw = self._bytes(entry.blocks_at, size, int(entry.blocks_check, 16))
        self._table: list[list[int]] = raw.view(_TABLE_DTYPE).reshape(-1, _COLUMNS).tolist()
        self._begins = [0, *accumulate(block[_TOKENS] for block in self._table)]
        self._first_documents = [0, *accumulate(block[_DOCUMENTS] for block in self._table)]
        self._size = entry.bytes
        self._file: memoryview | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self._begins[-1]

    @property
    def lengths(self) -> Offsets:
        """Tokens of each document."""
        ends = [self._ends_of(block) for block in range(len(self._table))]
        lengths = [np.diff(each, prepend=0) for each in ends]
        return np.concatenate([np.zeros(0, np.int64), *lengths])

    @property
    def offsets(self) -> Offsets:
        """Where each document begins, and behind the last one the end of all."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def tokens(self, start: int, stop: int) -> Tokens:
        """The ids at token positions [start, stop)."""
        ids: Tokens = np.frombuffer(b"".join(self.pieces(start, stop)), self._dtype)
        return ids

    def pieces(self, start: int, stop: int) -> list[memoryview]:
        """The ids at token positions [start, stop) as they lie in the file, block by block."""
        found, width = [], self._dtype.itemsize
        while start < stop:
            block = bisect_right(self._begins, start) - 1
            begin, end = self._begins[block], min(self._begins[block + 1], stop)
            found.append(self._ids_of(block)[width * (start - begin) : width * (end - begin)])
            start = end
        return found

    def addresses(self, starts: Offsets) -> Offsets:
        """Where documents that begin at these token positions lie in the file, in tokens from its beginning."""
        blocks = np.searchsorted(self._begins, starts, side="right") - 1
        at = np.array([row[_TOKENS_AT] // self._dtype.itemsize for row in self._table], np.int64)
        return starts + (at - self._begins[:-1])[blocks]

    def documents(self, parts: Sequence[Sequence[int]]) -> list[memoryview]:
        """The ids of documents, or of their beginnings; `parts` gives of each its address, start in a row, and length."""
        width, file = self._dtype.itemsize, self._file or self._checked_file()
        if file is None:
            return [self._document(width * address, width * length) for address, _, length, _ in parts]  # fmt: skip
        return [
            file[width * address : width * (address + length)] for address, _, length, _ in parts
        ]

    def _checked_file(self) -> memoryview | None:
        """The whole of a mapped file, after all of its blocks have been checked; None where it is not mapped."""
        if self._source.is_mapped:
            for block in range(len(self._table)):
                self._ids_of(block)
            self._file = self._source.read(0, self._size).data
        return self._file

    def _document(self, at: int, size: int) -> memoryview:
        """Bytes of the file out of one block's ids; a document lies in one block."""
        block = bisect_right(self._table, at, key=itemgetter(_TOKENS_AT)) - 1
        low = at - self._table[block][_TOKENS_AT]
        return self._ids_of(block)[low : low + size]

    def loss_mask(self, start: int, stop: int) -> Mask:
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

    def loss_runs(self) -> tuple[Offsets, Offsets]:
        """Runs of tokens [begin, end) in the loss, in order; none of them holds the first token of a document.

        That token is predicted by nothing.
        """
        runs = [self._runs_of(block) + self._begins[block] for block in range(len(self._table))]
        flat = np.concatenate([np.zeros(0, np.int64), *runs])
        return flat[0::2], flat[1::2]

    def borders(self, start: int, stop: int) -> tuple[int, list[int]]:
        """The document that holds the token at `start`, and where others begin in (start, stop), counted from start."""
        block = bisect_right(self._begins, start) - 1
        ends = self._ends_of(block)
        inside = int(ends.searchsorted(start - self._begins[block], side="right"))
        first, found = self._first_documents[block] + inside, []
        while True:
            begin = self._begins[block]
            last = int(ends.searchsorted(stop - begin))
            found += (ends[inside:last] + (begin - start)).tolist()
            if self._begins[block + 1] >= stop:
                return first, found
            block, inside = block + 1, 0
            ends = self._ends_of(block)

    def _ids_of(self, block: int) -> memoryview:
        """The ids of a block, as bytes."""
        row = self._table[block]
        return self._array(row[_TOKENS_AT], row[_TOKENS] * self._dtype.itemsize, row[_TOKENS_CHECK], _BYTE).data  # fmt: skip

    def _bits_of(self, block: int) -> npt.NDArray[Any]:
        row = self._table[block]
        assert row[_MASK_AT], "a text shard has no mask"
        return self._array(row[_MASK_AT], (row[_TOKENS] + 7) >> 3, row[_MASK_CHECK], _BYTE)

    def _ends_of(self, block: int) -> Offsets:
        """Where each document of a block ends, counted from the block's beginning."""
        row = self._table[block]
        key = -row[_LENGTHS_AT]  # beside the array as it lies in the file
        ends = self._arrays.get(key)
        if ends is None:
            lengths = self._array(
                row[_LENGTHS_AT], row[_DOCUMENTS], row[_LENGTHS_CHECK], _LENGTH_DTYPE
            )
            ends = self._keep(key, np.cumsum(lengths, dtype=np.int64))
        return ends

    def _runs_of(self, block: int) -> Offsets:
        """Where the mask of a block turns on and off, counted from the block's beginning; 64 tokens at a time."""
        bits = self._bits_of(block)
        words = np.zeros(len(bits) // 8 + 2, np.uint64)
        mask = words.view(np.uint8)
        mask[: len(bits)] = bits
        firsts = np.concatenate([[0], self._ends_of(block)[:-1]])
        np.bitwise_and.at(mask, firsts >> 3, ~(1 << (firsts & 7)).astype(np.uint8))
        turns = words ^ (words << np.uint64(1))
        turns[1:] ^= words[:-1] >> np.uint64(63)
        busy = np.flatnonzero(turns)
        flags = np.unpackbits(turns[busy].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        word, bit = np.nonzero(flags)
        return busy[word] * 64 + bit

    def _array(self, at: int, count: int, check: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        array = self._arrays.get(at)
        if array is None:
            array = self._keep(at, self._bytes(at, count * dtype.itemsize, check).view(dtype))
        return array

    def _keep(self, at: int, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Hold an array that has been checked; what is not mapped takes memory and is bounded."""
        self._arrays[at] = array
        if not self._source.is_mapped and len(self._arrays) > KEPT_ARRAYS:
            self._arrays.popitem(last=False)
        return array

    def _bytes(self, at: int, size: int, check: int) -> Bytes:
        raw = self._source.read(at, at + size)
        if xxhash.xxh3_64_intdigest(raw.data) != check:
            raise BigmixError(
                f"{self._source.name}: the block at byte {at} ({size} bytes) is not what was prepared: its "
                "checksum differs; restore the file or prepare the source again"
            )
        return raw


def open_shard(folder: Path, entry: ShardEntry, dtype: str) -> Shard:
    """A shard on local disk."""
    return Shard(mapped(folder / entry.file, entry.bytes), entry, dtype)


def write_lengths(folder: Path, dtype: str, shards: Sequence[ShardEntry]) -> FileEntry:
    """Write the lengths of the documents of all shards as one file beside them; what the manifest says of it."""
    path = folder / LENGTHS
    total = sum(entry.documents for entry in shards)
    beside = path.with_name(path.name + ".tmp")
    lengths = np.lib.format.open_memmap(beside, mode="w+", dtype="<u4", shape=(total,))
    at = 0
    for entry in shards:
        lengths[at : at + entry.documents] = open_shard(folder, entry, dtype).lengths
        at += entry.documents
    lengths.flush()
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    return FileEntry(file=LENGTHS, bytes=path.stat().st_size, sha256=sha256_of(path))


def with_lengths(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of a chat source with its file of lengths, which is written now; that of a text as it is."""
    if manifest.kind == "text":
        return manifest
    lengths = write_lengths(folder, manifest.dtype, manifest.shards)
    return manifest.model_copy(update={"lengths": lengths})
