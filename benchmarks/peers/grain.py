"""grain: a random-access source over a memory map, mixed, and packed by grain itself."""

from pathlib import Path
from typing import Any

import grain.python as grain
import numpy as np
from corpus import BATCH_ROWS, BATCH_TOKENS, IGNORE, ROW_TOKENS, Batch, Corpus, Document
from grain.experimental import ConcatThenSplitIterDataset
from reader import Reader

NOTE = (
    "MapDataset.mix over a memory map, global order, its own ConcatThenSplit (segments and"
    " positions too); exact resume; share per document, no checksum of the file"
)
PACKAGES = ("grain",)
PART_TOKENS = 100_000_000


def write(corpus: Corpus, folder: Path) -> None:
    """Nothing: the corpus's flat files are the random-access source."""


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Without workers no thread reads ahead: over a memory map they only cost."""
    weights = corpus.document_weights
    mixed = grain.MapDataset.mix(
        [
            grain.MapDataset.source(source).shuffle(seed=0).repeat(None)
            for source in corpus.sources.values()
        ],
        weights=list(weights.values()),
    ).map(_features)
    documents = mixed.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    lengths = {"ids": ROW_TOKENS, "labels": ROW_TOKENS}
    rows = ConcatThenSplitIterDataset(documents, length_struct=lengths).batch(BATCH_ROWS)
    if workers:
        rows = rows.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(rows)
    if state is not None:
        iterator.set_state(state)
    return Reader(batches=map(_batch, iterator), state=iterator.get_state)


def _features(document: Document) -> dict[str, Any]:
    """Labels are made for each document, since packing cuts and joins each feature alone."""
    ids = document.ids_T.astype(np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    mask = document.mask_T
    labels[:-1] = ids[1:] if mask is None else np.where(mask[1:], ids[1:], IGNORE)
    return {"ids": ids, "labels": labels}


def _batch(features: dict[str, Any]) -> Batch:
    return Batch(features["ids"], features["labels"], BATCH_TOKENS)
