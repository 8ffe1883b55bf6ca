"""Hugging Face datasets: arrow files, interleaved iterable datasets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from corpus import Corpus, Document, Source
from reader import Mapped, Reader
from workers import packed_batches

NOTE = (
    "interleave_datasets of two arrow datasets with a shuffle buffer of 1,000, greedy packing by"
    " us; resume drops the shuffle buffers and the packer; no checksum"
)
PACKAGES = ("datasets",)
PART_TOKENS = 10_000_000
FEATURES = datasets.Features(
    {"ids": datasets.List(datasets.Value("uint16")), "mask": datasets.List(datasets.Value("uint8"))}
)


def write(corpus: Corpus, folder: Path) -> None:
    """Through its own writer; text has no mask."""
    for name, source in corpus.sources.items():
        made = datasets.Dataset.from_generator(
            _samples,
            features=FEATURES,
            gen_kwargs={"source": source},
            cache_dir=str(folder / "cache"),
        )
        made.save_to_disk(str(folder / name))


def _samples(source: Source) -> Iterator[dict[str, Any]]:
    for ids_T, mask_T in source.documents():
        yield {"ids": ids_T, "mask": mask_T}


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Documents come as lists: interleaving loses a numpy format set before it, and one set after
    it costs twice as much.
    """
    weights = corpus.document_weights
    mixed = datasets.interleave_datasets(
        [
            datasets.load_from_disk(str(folder / name))
            .to_iterable_dataset(num_shards=4)
            .shuffle(seed=0, buffer_size=1000)
            for name in weights
        ],
        probabilities=list(weights.values()),
        seed=0,
        stopping_strategy="all_exhausted",
    )
    if state is not None:
        mixed.load_state_dict(state)
    return Reader(batches=packed_batches(Mapped(_document, mixed), workers), state=mixed.state_dict)


def _document(sample: dict[str, Any]) -> Document:
    return Document(sample["ids"], sample["mask"])
