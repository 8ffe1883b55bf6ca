"""The limit of every loader that packs documents: each document is copied from the memory map to
its place, and nothing else is done.
"""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from corpus import BATCH_ROWS, BATCH_TOKENS, ROW_TOKENS, Array, Batch, Corpus, Source
from reader import WHOLE_CORPUS, Reader

NOTE = (
    "limit: documents in file order, one slice assignment each, uint16 to int32; no labels, no"
    " mixing, no order"
)
PACKAGES = ("numpy",)
PART_TOKENS = WHOLE_CORPUS


def write(corpus: Corpus, folder: Path) -> None:
    """Nothing: the corpus is read as it is."""


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Batches of chats and of text in turn."""
    return copied(corpus, {name: np.arange(len(s)) for name, s in corpus.sources.items()})


def copied(corpus: Corpus, orders: dict[str, Array]) -> Reader:
    """Four batches of chats and one of text in turn, so that documents have the lengths of the
    mixture.
    """
    chat, text = (_batches(corpus.sources[name], orders[name]) for name in ("chat", "text"))
    return Reader(batches=(next(batches) for batches in cycle([chat] * 4 + [text])), state=None)


def _batches(source: Source, order: Array) -> Iterator[Batch]:
    """The last document of a batch is cut; each batch starts with a whole one."""
    tokens = source.tokens_N
    starts, stops = source.offsets_D[order].tolist(), source.offsets_D[order + 1].tolist()
    documents = cycle(zip(starts, stops, strict=True))
    while True:
        ids, at = np.empty(BATCH_TOKENS, np.int32), 0
        while at < BATCH_TOKENS:
            start, stop = next(documents)
            end = at + stop - start
            if end > BATCH_TOKENS:
                stop, end = start + BATCH_TOKENS - at, BATCH_TOKENS
            ids[at:end] = tokens[start:stop]
            at = end
        yield Batch(ids.reshape(BATCH_ROWS, ROW_TOKENS), None, BATCH_TOKENS)
