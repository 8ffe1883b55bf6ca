"""MosaicML streaming: MDS shards of ndarray columns."""

from pathlib import Path
from typing import Any

import numpy as np
import streaming
from corpus import BATCH_ROWS, Corpus, Document
from reader import Forever, Mapped, Reader
from streaming.base.util import clean_stale_shared_memory
from workers import packed_batches

NOTE = (
    "MDS documents, streams mixed by proportion, py1e order, greedy packing by us; its resume"
    " counts samples, so that what was in the packer is lost; no checksum by default"
)
PACKAGES = ("mosaicml-streaming",)
PART_TOKENS = 20_000_000
COLUMNS = {"ids": "ndarray:uint16", "mask": "ndarray:uint8"}


def write(corpus: Corpus, folder: Path) -> None:
    """No compression and no hashes: the fastest to read."""
    for name, source in corpus.sources.items():
        with streaming.MDSWriter(out=str(folder / name), columns=COLUMNS, exist_ok=True) as out:
            for ids_T, mask_T in source.documents():
                # A column cannot be absent; text has a mask of ones.
                mask = np.ones(len(ids_T), np.uint8) if mask_T is None else mask_T
                out.write({"ids": ids_T, "mask": mask})


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Shared memory that an earlier process has left would be refused."""
    clean_stale_shared_memory()
    weights = corpus.document_weights
    dataset = streaming.StreamingDataset(
        streams=[
            streaming.Stream(local=str(folder / name), proportion=weight)
            for name, weight in weights.items()
        ],
        shuffle=True,
        shuffle_seed=0,
        batch_size=BATCH_ROWS,
    )
    if state is not None:
        dataset.load_state_dict(state)
    seen = 0

    def document(sample: dict[str, Any]) -> Document:
        nonlocal seen
        seen += 1
        return Document(sample["ids"], sample["mask"])

    return Reader(
        batches=packed_batches(Mapped(document, Forever(dataset)), workers),
        state=lambda: dataset.state_dict(num_samples=seen, from_beginning=False),
    )
