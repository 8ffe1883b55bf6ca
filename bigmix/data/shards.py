"""Tokenised documents go in, an uncompressed tar shard comes out, and the way back.

A shard is a POSIX tar that the webdataset library can read. One sample of it is a *block* of documents:
`KEY.tokens.npy`, `KEY.lengths.npy` and, for chats, `KEY.loss_mask.npy` (one bit a token). The last sample also has
`KEY.blocks.npy`, the table that says where each array starts and what its checksum is, so that a reader maps the file
and takes slices: nothing is decoded, and a damaged block is known by its place when it is first touched.
"""

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_TABLE_DTYPE = np.dtype("<u8")


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
        lengths = np.array([len(ids) for ids in self._ids], "<u4")
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


@dataclass(frozen=True, kw_only=True, slots=True)
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
        self._checked: set[int] = set()
        self._kept: OrderedDict[int, Bytes] = OrderedDict()
        size = entry.blocks * _COLUMNS * _TABLE_DTYPE.itemsize
        raw = self._array(entry.blocks_at, size, int(entry.blocks_check, 16))
        self._table = raw.view(_TABLE_DTYPE).reshape(-1, _COLUMNS).tolist()
        self._begins = np.cumsum([0, *(block[_TOKENS] for block in self._table)])
        self._lengths: Offsets | None = None
        self._offsets: Offsets | None = None

    @property
    def lengths(self) -> Offsets:
        """Tokens of each document."""
        if self._lengths is None:
            parts = [
                self._array(b[_LENGTHS_AT], 4 * b[_DOCUMENTS], b[_LENGTHS_CHECK]).view("<u4")
                for b in self._table
            ]
            self._lengths = np.concatenate([*parts, np.zeros(0, "<u4")]).astype(np.int64)
        return self._lengths

    @property
    def offsets(self) -> Offsets:
        """Where each document begins, and behind the last one the end of all."""
        if self._offsets is None:
            self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        return self._offsets

    def tokens(self, start: int, stop: int) -> Tokens:
        """The ids at token positions [start, stop)."""
        parts = []
        for block, low, high in self._overlaps(start, stop):
            size = block[_TOKENS] * self._dtype.itemsize
            raw = self._array(block[_TOKENS_AT], size, block[_TOKENS_CHECK])
            parts.append(raw.view(self._dtype)[low:high])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def loss_mask(self, start: int, stop: int) -> Mask:
        """Which of the tokens [start, stop) are in the loss; for a chat shard."""
        parts = []
        for block, low, high in self._overlaps(start, stop):
            assert block[_MASK_AT], "a text shard has no mask"
            bits = self._array(block[_MASK_AT], -(-block[_TOKENS] // 8), block[_MASK_CHECK])
            shift = low % 8
            flags = np.unpackbits(
                bits[low // 8 : -(-high // 8)], count=shift + high - low, bitorder="little"
            )
            parts.append(flags[shift:].view(np.bool_))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _overlaps(self, start: int, stop: int) -> list[tuple[list[int], int, int]]:
        first = int(self._begins.searchsorted(start, side="right")) - 1
        begin, end = int(self._begins[first]), int(self._begins[first + 1])
        if stop <= end:
            return [(self._table[first], start - begin, stop - begin)]
        rest = self._overlaps(end, stop)
        return [(self._table[first], start - begin, end - begin), *rest]

    def _array(self, at: int, size: int, check: int) -> Bytes:
        """The raw bytes of an array, checked when they are first read."""
        if at in self._kept:
            self._kept.move_to_end(at)
            return self._kept[at]
        raw = self._source.read(at, at + size)
        if at not in self._checked:
            if xxhash.xxh3_64_intdigest(raw.data) != check:
                raise BigmixError(
                    f"{self._source.name}: the block at byte {at} ({size} bytes) is not what was prepared: its "
                    "checksum differs; restore the file or prepare the source again"
                )
            if self._source.is_mapped:
                self._checked.add(at)
        if not self._source.is_mapped:
            self._keep(at, raw)
        return raw

    def _keep(self, at: int, raw: Bytes) -> None:
        self._kept[at] = raw
        if len(self._kept) > KEPT_ARRAYS:
            self._kept.popitem(last=False)


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
