"""Tokenised documents go in, uncompressed tar shards and their manifest come out, and the way back.

A shard is a POSIX tar that the webdataset library can read. One sample of it is a *block* of documents:
`KEY.tokens.npy`, `KEY.lengths.npy` and, for chats, `KEY.loss_mask.npy` (one bit a token). The manifest keeps
where each array starts, so that a reader maps the file and takes slices: nothing is decoded.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from bigmix.errors import BadInput

MANIFEST = "manifest.json"
VERSION = 1
BLOCK_TOKENS = 1 << 20
TAR_MAGIC_AT = 257  # of a 512-byte ustar header
TAR_BLOCK = 512

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Mask = npt.NDArray[np.bool_]
Offsets = npt.NDArray[np.int64]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(_Frozen):
    """A run of documents inside a shard; `*_at` are byte offsets of raw arrays in the tar."""

    documents: int
    tokens: int
    tokens_at: int
    lengths_at: int
    loss_mask_at: int | None


class ShardEntry(_Frozen):
    """One tar file of a source."""

    file: str
    bytes: int
    sha256: str
    documents: int
    tokens: int
    loss_tokens: int
    blocks: tuple[Block, ...]


class TokenizerEntry(_Frozen):
    """Which tokenizer made the tokens; the fingerprint decides whether two are the same."""

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int


class TemplateEntry(_Frozen):
    """Which chat template rendered the conversations."""

    name: str
    sha256: str


class Manifest(_Frozen):
    """What a prepared source holds. It is written last: what is listed is whole.

    `loss_tokens` counts the tokens that have a prediction in the loss while documents are not split, `loss_bytes`
    the UTF-8 bytes of the text behind them; bits per byte follow from both. `read` documents went in, `dropped`
    counts by reason those that did not come out.
    """

    version: Literal[1] = 1
    kind: Literal["text", "chat"]
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    template: TemplateEntry | None
    read: int
    dropped: dict[str, int]
    documents: int
    tokens: int
    loss_tokens: int
    loss_bytes: int
    shards: tuple[ShardEntry, ...]


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id: 65536 entries fit uint16."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one shard beside its final place and renames it when whole; memory holds one block."""

    def __init__(self, path: Path, dtype: str, *, masked: bool) -> None:
        self._path = path
        self._beside = path.with_name(path.name + ".tmp")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._masked = masked
        self._tar = tarfile.open(self._beside, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._blocks: list[Block] = []
        self._ids: list[Tokens] = []
        self._masks: list[Mask] = []
        self._open_tokens = 0
        self._loss_tokens = 0
        self.tokens = 0

    def add(self, ids: Tokens, loss_mask: Mask | None) -> None:
        """Append a document: ids [T] and, for a chat, which of them are in the loss [T]."""
        self._ids.append(ids)
        if loss_mask is not None:
            self._masks.append(loss_mask)
        self._loss_tokens += len(ids) - 1 if loss_mask is None else int(loss_mask.sum())
        self._open_tokens += len(ids)
        self.tokens += len(ids)
        if self._open_tokens >= BLOCK_TOKENS:
            self._flush()

    def close(self) -> ShardEntry:
        """Finish the file; only after the rename does it exist under its name."""
        self._flush()
        self._tar.close()
        entry = ShardEntry(
            file=self._path.name,
            bytes=self._beside.stat().st_size,
            sha256=sha256_of(self._beside),
            documents=sum(block.documents for block in self._blocks),
            tokens=self.tokens,
            loss_tokens=self._loss_tokens,
            blocks=tuple(self._blocks),
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
        if not self._ids:
            return
        key = f"{len(self._blocks):06d}"
        tokens = np.concatenate(self._ids).astype(self._dtype)
        lengths = np.array([len(ids) for ids in self._ids], "<u4")
        tokens_at = self._member(f"{key}.tokens.npy", tokens)
        lengths_at = self._member(f"{key}.lengths.npy", lengths)
        mask_at = None
        if self._masked:
            bits = np.packbits(np.concatenate(self._masks), bitorder="little")
            mask_at = self._member(f"{key}.loss_mask.npy", bits)
        self._blocks.append(
            Block(
                documents=len(lengths),
                tokens=len(tokens),
                tokens_at=tokens_at,
                lengths_at=lengths_at,
                loss_mask_at=mask_at,
            )
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


class Shard:
    """A shard as flat arrays over all its blocks, mapped, not loaded; positions are token positions in the shard."""

    def __init__(self, path: Path, entry: ShardEntry, dtype: str) -> None:
        # asarray: a slice of a memmap object costs ten times one of a plain array.
        self._map = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self._blocks = entry.blocks
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._begins = np.cumsum([0, *(block.tokens for block in entry.blocks)])
        lengths = [
            self._slice(block.lengths_at, block.documents, np.dtype("<u4"))
            for block in entry.blocks
        ]
        self.lengths: Offsets = np.concatenate(lengths).astype(np.int64)
        self.offsets: Offsets = np.concatenate([[0], np.cumsum(self.lengths)])

    def tokens(self, start: int, stop: int) -> Tokens:
        """The ids at token positions [start, stop)."""
        parts = [
            self._slice(block.tokens_at, block.tokens, self._dtype)[low:high]
            for block, low, high in self._overlaps(start, stop)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def loss_mask(self, start: int, stop: int) -> Mask:
        """Which of the tokens [start, stop) are in the loss; for a chat shard."""
        parts = []
        for block, low, high in self._overlaps(start, stop):
            assert block.loss_mask_at is not None, "a text shard has no mask"
            bits = self._slice(
                block.loss_mask_at + low // 8, -(-high // 8) - low // 8, np.dtype(np.uint8)
            )
            shift = low % 8
            flags = np.unpackbits(bits, count=shift + high - low, bitorder="little")[shift:]
            parts.append(flags.view(np.bool_))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _overlaps(self, start: int, stop: int) -> list[tuple[Block, int, int]]:
        first = int(np.searchsorted(self._begins, start, side="right")) - 1
        found = []
        for index in range(first, len(self._blocks)):
            begin, end = int(self._begins[index]), int(self._begins[index + 1])
            if begin >= stop:
                break
            found.append((self._blocks[index], max(start, begin) - begin, min(stop, end) - begin))
        return found

    def _slice(self, offset: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return self._map[offset : offset + count * dtype.itemsize].view(dtype)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest last and in one step, so that a folder with a manifest is whole."""
    replace_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def read_manifest(folder: str) -> Manifest:
    """The manifest of a prepared source.

    Raises BadInput where there is none, where it is not a whole manifest, or where it is of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise BadInput(
            f"{folder} is not a prepared source: it has no {MANIFEST}; make it with `bigmix prepare`"
        )
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("version")
        if version != VERSION:
            raise BadInput(
                f"{path} has version {version}, this bigmix reads {VERSION}; prepare the source again"
            )
        return Manifest.model_validate_json(text)
    except (ValidationError, ValueError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(
            f"{path} is not a whole manifest ({first}); prepare the source again"
        ) from error


def faults_of_shards(folder: str, manifest: Manifest, *, checksum_bytes: int) -> Sequence[str]:
    """Every shard that is missing, of another size, no tar at a block's place or, up to `checksum_bytes` in all, changed."""
    faults = []
    for entry in manifest.shards:
        path = Path(folder) / entry.file
        fault = _fault_of_file(path, entry)
        if fault is None and checksum_bytes >= entry.bytes:
            checksum_bytes -= entry.bytes
            if sha256_of(path) != entry.sha256:
                fault = "its sha256 is not the manifest's: its content has changed"
        if fault is not None:
            faults.append(f"{path}: {fault}; restore the file or prepare the source again")
    return faults


def _fault_of_file(path: Path, entry: ShardEntry) -> str | None:
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    if size != entry.bytes:
        return f"it has {size} bytes, the manifest says {entry.bytes}"
    with path.open("rb") as file:
        file.seek(TAR_MAGIC_AT)
        if entry.blocks and file.read(5) != b"ustar":
            return "it is not a tar (no header at offset 0)"
    return None


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _feed(digest, file)
    return digest.hexdigest()


def _feed(digest: Any, file: IO[bytes]) -> None:
    while part := file.read(1 << 20):
        digest.update(part)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
