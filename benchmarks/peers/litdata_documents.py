"""LitData: an optimised folder with a document an item."""

from pathlib import Path
from typing import Any

import litdata
from corpus import Corpus, Document
from litdata.streaming.cache import Cache
from reader import Forever, Mapped, Reader
from workers import packed_batches

NOTE = (
    "CombinedStreamingDataset of documents, greedy packing by us; no packing of its own; "
    "what lay in the packer is lost at a resume; no checksum"
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
    """Iterated itself; in worker processes, the worker packs."""
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
    if state is not None:
        combined.load_state_dict(state)
    return Reader(
        batches=packed_batches(Mapped(_document, Forever(combined)), workers),
        state=lambda: combined.state_dict(num_workers=0, batch_size=1),
    )


def _document(item: list[Any]) -> Document:
    return Document(item[0], item[1] if len(item) > 1 else None)
