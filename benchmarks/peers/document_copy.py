"""The limit of every loader that packs documents: each one copied from the map to its place, and nothing else."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from corpus import BATCH_ROWS, BATCH_TOKENS, ROW_TOKENS, Batch, Corpus, Source
from reader import WHOLE_CORPUS, Reader

NOTE = "limit: documents in file order, one slice assignment each, uint16 to int32; no labels, no mixing, no order"
PACKAGES = ("numpy",)
PART_TOKENS = WHOLE_CORPUS


def write(corpus: Corpus, folder: Path) -> None:
    """Nothing: the corpus is read as it is."""


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Four batches of chats and one of text in turn, so that documents have the lengths of the mixture."""
    chat, text = (_batches(corpus.sources[name]) for name in ("chat", "text"))
    return Reader(batches=(next(batches) for batches in cycle([chat] * 4 + [text])), state=None)


def _batches(source: Source) -> Iterator[Batch]:
    """The last document of a batch is cut; each batch starts with a whole one."""
    tokens, edges = source.tokens_N, source.offsets_D.tolist()
    document = 0
    while True:
        ids, at = np.empty(BATCH_TOKENS, np.int32), 0
        while at < BATCH_TOKENS:
            start, stop = edges[document], edges[document + 1]
            end = at + stop - start
            if end > BATCH_TOKENS:
                stop, end = start + BATCH_TOKENS - at, BATCH_TOKENS
            ids[at:end] = tokens[start:stop]
            at = end
            document = document + 1 if document + 2 < len(edges) else 0
        yield Batch(ids.reshape(BATCH_ROWS, ROW_TOKENS), None, BATCH_TOKENS)
