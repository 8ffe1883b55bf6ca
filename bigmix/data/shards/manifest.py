"""The manifest of a prepared source: what the source holds. It is written last, so that a folder
with a manifest is whole.

The shards are listed by column, so that a manifest of a million of them is a few arrays and not a
million objects. Where the arrays of a shard begin is in the shard itself, in its table of blocks.
"""

import json
import os
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    InstanceOf,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from bigmix.data.shards.location import MANIFEST
from bigmix.errors import BadInput
from bigmix.files import replace_text, sha256_of
from bigmix.types import Ints

LENGTH_BINS = 32
LOSS_BINS = 10
TURN_BINS = 33


class Statistics(BaseModel):
    """What the documents of a source are like; the statistics of two parts add up.

    Bin k of `documents_by_length` and `tokens_by_length` is for documents of 2^k to 2^(k+1) - 1
    tokens. For chats, bin k of `documents_by_loss` is for those with k to k + 1 tenths of their
    tokens in the loss, the last bin with its upper end, and bin k of `documents_by_turns` for those
    with k turns, the last bin for more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents_by_length: tuple[int, ...] = (0,) * LENGTH_BINS
    tokens_by_length: tuple[int, ...] = (0,) * LENGTH_BINS
    documents_by_loss: tuple[int, ...] = (0,) * LOSS_BINS
    documents_by_turns: tuple[int, ...] = (0,) * TURN_BINS
    characters: int = 0
    text_bytes: int = 0

    def length_of_half(self) -> str:
        """The tokens of at least half of the documents: "less than 512" where the middle one is in
        the bin of 256 to 511.
        """
        half = (sum(self.documents_by_length) + 1) // 2
        up_to = list(accumulate(self.documents_by_length))
        return f"less than {2 << bisect_left(up_to, half):,}"

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            documents_by_length=_sum(self.documents_by_length, other.documents_by_length),
            tokens_by_length=_sum(self.tokens_by_length, other.tokens_by_length),
            documents_by_loss=_sum(self.documents_by_loss, other.documents_by_loss),
            documents_by_turns=_sum(self.documents_by_turns, other.documents_by_turns),
            characters=self.characters + other.characters,
            text_bytes=self.text_bytes + other.text_bytes,
        )


def statistics_of(
    *, tokens: Ints, loss_tokens: Ints | None, turns: Ints, characters: Ints, text_bytes: Ints
) -> Statistics:
    """The statistics of some documents, from columns with one entry for each document.

    `loss_tokens` is None for texts.
    """
    # frexp gives the exponent exactly: 2^k to 2^(k+1) - 1 have k + 1.
    bins = np.frexp(tokens.astype(np.float64))[1] - 1
    by_loss, by_turns = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if loss_tokens is not None:
        by_loss = np.minimum(LOSS_BINS * loss_tokens // tokens, LOSS_BINS - 1)
        by_turns = np.minimum(turns, TURN_BINS - 1)
    return Statistics(
        documents_by_length=_counted(bins, LENGTH_BINS),
        tokens_by_length=tuple(
            np.bincount(bins, tokens, minlength=LENGTH_BINS).astype(np.int64).tolist()
        ),
        documents_by_loss=_counted(by_loss, LOSS_BINS),
        documents_by_turns=_counted(by_turns, TURN_BINS),
        characters=int(characters.sum()),
        text_bytes=int(text_bytes.sum()),
    )


def _counted(bins: npt.NDArray[np.integer], size: int) -> tuple[int, ...]:
    return tuple(np.bincount(bins, minlength=size).tolist())


def _sum(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


LENGTHS = "lengths.npy"
VERSION = 2

_NUMBERS = ("bytes", "documents", "tokens", "loss_tokens", "blocks", "blocks_at")
_TEXTS = ("file", "sha256", "blocks_check")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One tar file of a source; its table of `blocks` blocks begins at byte `blocks_at` and has the
    checksum `blocks_check`.
    """

    file: str
    bytes: int
    sha256: str
    documents: int
    tokens: int
    loss_tokens: int
    blocks: int
    blocks_at: int
    blocks_check: str


class ShardTable(Sequence[ShardEntry]):
    """The shards of a source: a sequence of entries, kept by column."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        """Raises ValueError where a column is missing, of another length or of another type."""
        numbers = {name: np.asarray(columns[name], np.int64) for name in _NUMBERS}
        texts = {name: np.asarray(columns[name], np.bytes_) for name in _TEXTS}
        self._columns: dict[str, npt.NDArray[Any]] = numbers | texts
        sizes = {column.shape for column in self._columns.values()}
        if len(sizes) != 1 or len(sizes.pop()) != 1:
            raise ValueError("the columns of the shards have different lengths")

    @classmethod
    def of(cls, entries: Sequence[ShardEntry]) -> "ShardTable":
        """The table of these entries."""
        return cls({name: [getattr(e, name) for e in entries] for name in _NUMBERS + _TEXTS})

    def column(self, name: str) -> Ints:
        """A column of numbers, one for each shard: bytes, documents, tokens, loss_tokens, blocks or
        blocks_at.
        """
        return self._columns[name]

    @property
    def files(self) -> list[str]:
        """The name of each shard."""
        return [name.decode() for name in self._columns["file"].tolist()]

    def indices_of(self, files: Collection[str]) -> list[int]:
        """The indices of the shards with these names; names that are not listed are ignored."""
        names = np.array([name.encode() for name in files], np.bytes_)
        found: list[int] = np.flatnonzero(np.isin(self._columns["file"], names)).tolist()
        return found

    def __len__(self) -> int:
        return len(self._columns["bytes"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row: dict[str, Any] = {name: int(self._columns[name][index]) for name in _NUMBERS}
        row |= {name: self._columns[name][index].decode() for name in _TEXTS}
        return ShardEntry(**row)

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.to_lists() == other.to_lists()

    def __hash__(self) -> int:
        return hash(len(self))

    def select(self, files: Sequence[str]) -> "ShardTable":
        """The shards with these names, in this order; raises KeyError with the first name that is
        not listed.
        """
        index_of = {name: at for at, name in enumerate(self.files)}
        at = [index_of[file] for file in files]
        return ShardTable({name: values[at] for name, values in self._columns.items()})

    def to_lists(self) -> dict[str, list[Any]]:
        """The columns, as they are written to JSON."""
        return {
            name: column.astype(np.str_).tolist() if name in _TEXTS else column.tolist()
            for name, column in self._columns.items()
        }


def _as_table(value: Any) -> ShardTable:
    if isinstance(value, ShardTable):
        return value
    if isinstance(value, Mapping):
        missing = [name for name in _NUMBERS + _TEXTS if name not in value]
        if missing:
            raise ValueError(f"the shards have no column {missing[0]}")
        return ShardTable(value)
    return ShardTable.of(tuple(value))


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


class FileEntry(_Frozen):
    """A file next to the shards."""

    file: str
    bytes: int
    sha256: str


class Manifest(_Frozen):
    """What a prepared source holds. It is written last: what is listed is whole.

    `loss_tokens` counts the tokens that have a prediction in the loss while documents are not
    split, `loss_bytes` the UTF-8 bytes of their text; bits per byte follow from both. `read`
    documents were read, and `dropped` counts by reason those that were not kept. `lengths` is a
    file with the tokens of every document of a chat source, in the order of the shards, from which
    rows are packed without reading the shards. `statistics` says what the documents are like.
    """

    version: Literal[2] = 2
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
    lengths: FileEntry | None = None
    statistics: Statistics | None = None
    shards: Annotated[
        InstanceOf[ShardTable],
        PlainValidator(_as_table),
        PlainSerializer(ShardTable.to_lists, when_used="json"),
    ]

    @property
    def has_loss_masks(self) -> bool:
        """Whether the shards mark the tokens in the loss; in a text these are all but the first."""
        return self.kind == "chat"


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest type that holds every id: 65536 entries fit uint16."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest last and in one step, so that a folder with a manifest is whole."""
    replace_text(folder / MANIFEST, manifest.model_dump_json() + "\n")


def parse_manifest(text: bytes | str, place: str) -> Manifest:
    """The manifest in a JSON text that was read from `place`.

    Raises BadInput where it is not a whole manifest, or of another version.
    """
    try:
        tree = json.loads(text)
        version = tree.get("version")
        if version != VERSION:
            raise BadInput(
                f"{place} has version {version}, this bigmix reads {VERSION}; prepare the source"
                " again"
            )
        return Manifest.model_validate(tree)
    except (ValidationError, ValueError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(
            f"{place} is not a whole manifest ({first}); prepare the source again"
        ) from error


def read_manifest(folder: str) -> Manifest:
    """The manifest of a prepared source on local disk.

    Raises BadInput where there is none, where it is not a whole manifest, or where it is of another
    version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise BadInput(
            f"{folder} is not a prepared source: it has no {MANIFEST}; make it with `bigmix"
            " prepare`"
        )
    return parse_manifest(path.read_bytes(), str(path))


def faults_of_shards(folder: str, manifest: Manifest, *, checksum_bytes: int) -> Sequence[str]:
    """A fault for every shard that is missing, of another size, or of another content.

    The content is checked of the first shards that have at most `checksum_bytes` bytes together.
    """
    # One listing for all shards: to ask the file system about each of a million takes minutes.
    with os.scandir(folder) as listing:
        found = {item.name: item.stat().st_size for item in listing if item.is_file()}
    faults, shards = [], manifest.shards
    for index, (file, size) in enumerate(
        zip(shards.files, shards.column("bytes").tolist(), strict=True)
    ):
        fault = _fault_of_size(found.get(file), size)
        if fault is None and checksum_bytes >= size:
            checksum_bytes -= size
            if sha256_of(Path(folder) / file) != shards[index].sha256:
                fault = "its sha256 is not the manifest's: its content has changed"
        if fault is not None:
            faults.append(
                f"{Path(folder) / file}: {fault}; restore the file or prepare the source again"
            )
    return faults


def _fault_of_size(found: int | None, expected: int) -> str | None:
    if found is None:
        return "the file is missing"
    return (
        None if found == expected else f"it has {found} bytes, the manifest says {expected} bytes"
    )
