"""LitData: an optimised folder of tokens without documents, read in blocks of one row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from corpus import BATCH_ROWS, BATCH_TOKENS, ROW_TOKENS, SHARES, Batch, Corpus
from litdata.streaming.cache import Cache
from litdata.streaming.item_loader import TokensLoader
from reader import Forever, Reader

NOTE = (
    "TokensLoader: a fixed block of 2,048 tokens is a row; documents are forgotten; no loss mask,"
    " no labels, no checksum"
)
PACKAGES = ("litdata",)
PART_TOKENS = 200_000_000


def write(corpus: Corpus, folder: Path) -> None:
    """Documents are cut anywhere, so that any run of tokens is an item."""
    for name, source in corpus.sources.items():
        cache = Cache(
            str(folder / name), chunk_bytes="32MB", item_loader=TokensLoader(block_size=ROW_TOKENS)
        )
        total = int(source.offsets_D[-1])
        for index, begin in enumerate(range(0, total, BATCH_TOKENS)):
            tokens = source.tokens_N[begin : min(total, begin + BATCH_TOKENS)]
            cache[index] = torch.from_numpy(np.array(tokens))
        cache.done()
        cache.merge()


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Its own loader makes the batches."""
    combined = litdata.CombinedStreamingDataset(
        [
            litdata.StreamingDataset(
                str(folder / name),
                item_loader=TokensLoader(block_size=ROW_TOKENS),
                shuffle=True,
                drop_last=False,
                seed=0,
            )
            for name in SHARES
        ],
        seed=0,
        weights=list(SHARES.values()),
        iterate_over_all=False,
    )
    loader = litdata.StreamingDataLoader(combined, batch_size=BATCH_ROWS, num_workers=workers)
    if state is not None:
        loader.load_state_dict(state)
    return Reader(batches=_batches(loader), state=loader.state_dict)


def _batches(loader: Any) -> Iterator[Batch]:
    for ids_BT in Forever(loader):
        yield Batch(ids_BT.numpy().astype(np.int32), None, ids_BT.numel())
