"""LitData: an optimised folder in which each document is an item."""

from itertools import chain
from pathlib import Path
from typing import Any

import litdata
from corpus import Corpus, Document, pack
from litdata.streaming.cache import Cache
from reader import Forever, Reader

NOTE = (
    "CombinedStreamingDataset of documents, greedy packing by us; no packing of its own; what was"
    " in the packer is lost at a resume; no checksum"
)
PACKAGES = ("litdata",)
PART_TOKENS = 100_000_000


def write(corpus: Corpus, folder: Path) -> None:
    """Through the writer that `litdata.optimize` uses in its workers."""
    for name, source in corpus.sources.items():
        cache = Cache(str(folder / name), chunk_bytes="32MB")
        for index, (ids_T, mask_T) in enumerate(source.documents()):
            cache[index] = [ids_T] if mask_T is None else [ids_T, mask_T]
        cache.done()
        cache.merge()


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Its own loader gives lists of documents; only its state is whole."""
    weights = corpus.document_weights
    combined = litdata.CombinedStreamingDataset(
        [
            litdata.StreamingDataset(str(folder / name), shuffle=True, drop_last=False, seed=0)
            for name in weights
        ],
        seed=0,
        weights=list(weights.values()),
        iterate_over_all=False,
    )
    loader = litdata.StreamingDataLoader(
        combined, batch_size=64, num_workers=workers, collate_fn=list
    )
    if state is not None:
        loader.load_state_dict(state)
    items = chain.from_iterable(Forever(loader))
    return Reader(batches=pack(map(_document, items)), state=loader.state_dict)


def _document(item: list[Any]) -> Document:
    return Document(item[0], item[1] if len(item) > 1 else None)
