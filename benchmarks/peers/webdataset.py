"""webdataset: each document is a sample, whose arrays are one member of a tar."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from corpus import Corpus, Document
from reader import Mapped, Reader
from workers import packed_batches

NOTE = (
    "RandomMix of two .npy pipelines, shuffle buffer of 1,000, greedy packing by us; no packing of"
    " its own, no resume, no checksum, share only by chance"
)
PACKAGES = ("webdataset",)
PART_TOKENS = 40_000_000


def write(corpus: Corpus, folder: Path) -> None:
    """Each shard is a tar with one member for each document, ids [T] or ids and mask [2, T], since
    members are slow to read.
    """
    for name, source in corpus.sources.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for shard, documents in enumerate(source.shards()):
            with webdataset.TarWriter(str(folder / name / f"{shard:06d}.tar")) as tar:
                for index in documents:
                    ids_T, mask_T = source[index]
                    array = ids_T if mask_T is None else np.stack([ids_T, mask_T])
                    tar.write({"__key__": f"{index:08d}", "tokens.npy": array})


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """RandomMix ends with its first source, so that each source is repeated."""
    weights = corpus.document_weights
    mix = webdataset.RandomMix(
        [_pipeline(folder / name) for name in weights], list(weights.values()), longest=False
    )
    return Reader(batches=packed_batches(Mapped(_document, mix), workers), state=None)


def _pipeline(folder: Path) -> Any:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return webdataset.WebDataset(tars, shardshuffle=100, seed=0).repeat().shuffle(1000)


def _document(sample: dict[str, Any]) -> Document:
    # Cheaper than the library's own decoder, which looks at every field's name first.
    return document_of(np.lib.format.read_array(io.BytesIO(sample["tokens.npy"])))


def document_of(array: Any) -> Document:
    """A document from the array of its member."""
    return Document(array, None) if array.ndim == 1 else Document(array[0], array[1])


def shuffled(items: Iterator[Any]) -> Iterator[Any]:
    """The library's shuffle buffer over any items, for the comparison of orders."""
    return iter(webdataset.shuffle(1000)(items))
