"""The outer limit: one array copied row by row to the type of the batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from corpus import BATCH_ROWS, BATCH_TOKENS, ROW_TOKENS, Batch, Corpus
from reader import WHOLE_CORPUS, Reader

NOTE = (
    "limit: one contiguous array, copied row by row from uint16 to int32; no documents, no sources"
)
PACKAGES = ("numpy",)
PART_TOKENS = WHOLE_CORPUS


def write(corpus: Corpus, folder: Path) -> None:
    """Nothing: the corpus is read as it is."""


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Batches of consecutive rows of the file."""
    return Reader(batches=_batches(corpus), state=None)


def _batches(corpus: Corpus) -> Iterator[Batch]:
    tokens = corpus.sources["chat"].tokens_N
    while True:
        for begin in range(0, len(tokens) - BATCH_TOKENS, BATCH_TOKENS):
            ids_BT = np.empty((BATCH_ROWS, ROW_TOKENS), np.int32)
            for row in range(BATCH_ROWS):
                start = begin + row * ROW_TOKENS
                ids_BT[row] = tokens[start : start + ROW_TOKENS]
            yield Batch(ids_BT, None, BATCH_TOKENS)
