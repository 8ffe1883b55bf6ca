"""The limit of a loader that shuffles: as document_copy, with all documents in a random order."""

from pathlib import Path
from typing import Any

import numpy as np
from corpus import Corpus
from reader import WHOLE_CORPUS, Reader

from peers.document_copy import copied

NOTE = (
    "limit: as document_copy, in a random order of all documents: what is not read in sequence is"
    " slow to come from memory"
)
PACKAGES = ("numpy",)
PART_TOKENS = WHOLE_CORPUS


def write(corpus: Corpus, folder: Path) -> None:
    """Nothing: the corpus is read as it is."""


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Batches of chats and of text in turn."""
    draw = np.random.default_rng(0)
    orders = {name: draw.permutation(len(source)) for name, source in corpus.sources.items()}
    return copied(corpus, orders)
