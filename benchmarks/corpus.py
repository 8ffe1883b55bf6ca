"""Generates two sources of tokenised documents as flat files, from which every format is made.

Lengths are lognormal, as those of chats and web pages are; ids are random, since no loader looks at
them. Letters: N tokens of a source, D documents, T tokens of a document, B rows of a batch.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

ROW_TOKENS, BATCH_ROWS = 2048, 8
BATCH_TOKENS = ROW_TOKENS * BATCH_ROWS
IGNORE = -100
VOCABULARY = 50_000
SHARES = {"chat": 0.8, "text": 0.2}
LENGTHS = {"chat": (5.2, 0.8), "text": (6.5, 0.8)}
SHARD_TOKENS = 4_000_000
VERSION = 2
WHOLE = "whole.json"  # written last: a folder with this file is whole

Array = npt.NDArray[Any]


class Document(NamedTuple):
    """Ids, uint16 [T], and which of them are in the loss, uint8 [T]; None where all but the first
    are.
    """

    ids_T: Array
    mask_T: Array | None


class Batch(NamedTuple):
    """Rows of int32: ids, and the label that each position must predict; labels are None where a
    peer has none.
    """

    ids_BT: Array
    labels_BT: Array | None
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One source as flat arrays; document d has the tokens [offsets[d], offsets[d + 1])."""

    name: str
    tokens_N: Array
    mask_N: Array | None
    offsets_D: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets_D) - 1

    def __getitem__(self, index: int) -> Document:
        return self.slice(int(self.offsets_D[index]), int(self.offsets_D[index + 1]))

    def slice(self, start: int, stop: int) -> Document:
        """The tokens at positions [start, stop), as one document."""
        mask = None if self.mask_N is None else self.mask_N[start:stop]
        return Document(self.tokens_N[start:stop], mask)

    def documents(self) -> Iterator[Document]:
        """All documents in the order of the file."""
        edges = self.offsets_D.tolist()
        return (self.slice(a, b) for a, b in pairwise(edges))

    def shards(self, shard_tokens: int = SHARD_TOKENS, at_least: int = 4) -> Iterator[range]:
        """Runs of documents of about `shard_tokens` tokens each; at least four for the peers, so
        that two workers have work.
        """
        total = int(self.offsets_D[-1])
        count = max(at_least, round(total / shard_tokens))
        edges = np.searchsorted(self.offsets_D, np.linspace(0, total, count + 1))
        return (range(a, b) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The sources by name, and how many tokens they have together."""

    sources: Mapping[str, Source]
    num_tokens: int

    @property
    def document_weights(self) -> dict[str, float]:
        """The chance of a document to be of each source with which the shares of tokens are met."""
        raw = {
            name: SHARES[name] * len(source) / int(source.offsets_D[-1])
            for name, source in self.sources.items()
        }
        return {name: value / sum(raw.values()) for name, value in raw.items()}

    def first(self, num_tokens: int) -> "Corpus":
        """The first documents of each source, with `num_tokens` tokens together, for a peer that is
        too slow for all.
        """
        if num_tokens >= self.num_tokens:
            return self
        parts = {}
        for name, source in self.sources.items():
            stop = int(np.searchsorted(source.offsets_D, num_tokens * SHARES[name]))
            parts[name] = Source(
                name=name,
                tokens_N=source.tokens_N,
                mask_N=source.mask_N,
                offsets_D=source.offsets_D[: stop + 1],
            )
        return Corpus(sources=parts, num_tokens=num_tokens)


def write_corpus(folder: Path, num_tokens: int) -> None:
    """Generate the corpus, unless the folder has the whole of it."""
    if is_whole(folder, num_tokens):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, share in SHARES.items():
        _write_source(folder, name, int(num_tokens * share))
    mark_whole(folder, num_tokens)


def _write_source(folder: Path, name: str, num_tokens: int) -> None:
    draw = np.random.default_rng(sorted(SHARES).index(name))
    mean, spread = LENGTHS[name]
    raw = draw.lognormal(mean, spread, int(num_tokens / np.exp(mean)) + 1000)
    lengths = np.clip(raw, 8, ROW_TOKENS).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets = offsets[: int(np.searchsorted(offsets, num_tokens)) + 1]
    total = int(offsets[-1])
    np.save(folder / f"{name}.offsets.npy", offsets)
    with (folder / f"{name}.tokens").open("wb") as file:
        for begin in range(0, total, 1 << 22):
            size = min(1 << 22, total - begin)
            file.write(draw.integers(0, VOCABULARY, size, dtype=np.uint16).tobytes())
    if name == "chat":
        # The second half of a chat is the answer.
        with (folder / f"{name}.mask").open("wb") as file:
            for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                half = (stop - start) // 2 + 1
                file.write(b"\0" * half + b"\1" * (stop - start - half))


def read_corpus(folder: Path) -> Corpus:
    """The corpus of a folder, mapped into memory."""
    sources = {}
    for name in SHARES:
        mask = folder / f"{name}.mask"
        sources[name] = Source(
            name=name,
            tokens_N=_mapped(folder / f"{name}.tokens", np.uint16),
            mask_N=_mapped(mask, np.uint8) if mask.is_file() else None,
            offsets_D=np.load(folder / f"{name}.offsets.npy"),
        )
    num_tokens = sum(int(source.offsets_D[-1]) for source in sources.values())
    return Corpus(sources=sources, num_tokens=num_tokens)


def _mapped(path: Path, dtype: Any) -> Array:
    # asarray: a slice of a memmap object costs ten times one of a plain array.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def is_whole(folder: Path, num_tokens: int) -> bool:
    """Whether a folder was written to its end, for this number of tokens."""
    mark = folder / WHOLE
    expected = {"tokens": num_tokens, "version": VERSION}
    return mark.is_file() and json.loads(mark.read_text()) == expected


def mark_whole(folder: Path, num_tokens: int) -> None:
    """Mark a folder as written to its end."""
    (folder / WHOLE).write_text(json.dumps({"tokens": num_tokens, "version": VERSION}))


def pack(documents: Iterable[Document]) -> Iterator[Batch]:
    """Documents laid end to end and cut where a batch ends: the cheapest packing, two slice
    assignments a document.
    """
    ids, in_loss, at = np.empty(BATCH_TOKENS, np.int32), np.empty(BATCH_TOKENS, np.bool_), 0
    for ids_T, mask_T in documents:
        begin, length = 0, len(ids_T)
        while begin < length:
            count = min(length - begin, BATCH_TOKENS - at)
            ids[at : at + count] = ids_T[begin : begin + count]
            in_loss[at : at + count] = True if mask_T is None else mask_T[begin : begin + count]
            if begin == 0:
                in_loss[at] = False  # nothing predicts the first token of a document
            begin, at = begin + count, at + count
            if at == BATCH_TOKENS:
                yield labelled(ids, in_loss)
                ids, at = np.empty(BATCH_TOKENS, np.int32), 0


def labelled(ids: Array, in_loss: Array) -> Batch:
    """A batch from its flat tokens and which of them are in the loss: rows with the label of each
    position.
    """
    ids_BT = ids.reshape(BATCH_ROWS, ROW_TOKENS)
    labels_BT = np.full(ids_BT.shape, IGNORE, np.int32)
    in_loss_BT = in_loss.reshape(ids_BT.shape)
    np.copyto(labels_BT[:, :-1], ids_BT[:, 1:], where=in_loss_BT[:, 1:])
    return Batch(ids_BT, labels_BT, BATCH_TOKENS)
