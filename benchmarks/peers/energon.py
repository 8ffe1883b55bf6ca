"""Megatron Energon: its WebDataset layout with an index, blended, packed in its own two stages."""

from pathlib import Path
from typing import Any

import numpy as np
from corpus import BATCH_ROWS, IGNORE, ROW_TOKENS, Batch, Corpus
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors.base_dataset import Sample
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from reader import Reader

from peers import webdataset as tars

NOTE = (
    "metadataset blend, shuffle buffer of 1,000, its own two-stage packing (next fit, chats whole,"
    " rows of one or more sources, padded); exact resume; no checksum"
)
PACKAGES = ("megatron-energon",)
PART_TOKENS = 10_000_000


def write(corpus: Corpus, folder: Path) -> None:
    """webdataset's tars, indexed by Energon, and a metadataset that blends them."""
    tars.write(corpus, folder)
    for name in corpus.sources:
        shards = sorted(path.name for path in (folder / name).glob("*.tar"))
        BaseWebdatasetFactory.prepare_dataset(
            folder / name, shards, split_parts_ratio=[("train", 1.0)], workers=1
        )
        (folder / name / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )
    blend = "".join(
        f"    - {{weight: {weight}, path: {name}}}\n"
        for name, weight in corpus.document_weights.items()
    )
    (folder / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        + blend.replace("    - ", "      - ")
    )


@edataclass
class Tokens(Sample):
    """A document, or the row that documents were packed into: ids and labels [T]."""

    ids: Any
    labels: Any


@stateless
def cook(sample: dict[str, Any]) -> Tokens:
    """A document with the label of each position."""
    raw, mask = tars.document_of(np.asarray(sample["tokens.npy"]))
    ids = raw.astype(np.int32)
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[:-1] = ids[1:] if mask is None else np.where(mask[1:], ids[1:], IGNORE)
    return Tokens(**basic_sample_keys(sample), ids=ids, labels=labels)


class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
    """The two stages of packing that Energon leaves to its user."""

    cookers = (Cooker(cook),)

    def select_samples_to_pack(self, samples: list[Tokens]) -> list[list[Tokens]]:
        """Next fit: a document that no longer fits opens the next row."""
        rows: list[list[Tokens]] = [[]]
        filled = 0
        for sample in samples:
            if filled + len(sample.ids) > ROW_TOKENS:
                rows.append([])
                filled = 0
            rows[-1].append(sample)
            filled += len(sample.ids)
        return rows

    @stateless
    def pack_selected_samples(self, samples: list[Tokens]) -> Tokens:
        """One row."""
        ids, labels = np.zeros(ROW_TOKENS, np.int32), np.full(ROW_TOKENS, IGNORE, np.int32)
        at = 0
        for sample in samples:
            ids[at : at + len(sample.ids)] = sample.ids
            labels[at : at + len(sample.ids)] = sample.labels
            at += len(sample.ids)
        return Tokens.derive_from(samples[0], ids=ids, labels=labels)

    @stateless
    def batch(self, samples: list[Tokens]) -> Batch:
        """Eight rows; padding is id 0, which random ids hardly ever are."""
        ids_BT = np.stack([sample.ids for sample in samples])
        return Batch(
            ids_BT, np.stack([sample.labels for sample in samples]), int(np.count_nonzero(ids_BT))
        )


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """Its savable loader."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        folder / "blend.yaml",
        worker_config=config,
        batch_size=BATCH_ROWS,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        packing_buffer_size=200,
        task_encoder=Encoder(),
    )
    loader = get_savable_loader(dataset)
    if state is not None:
        loader.restore_state_rank(state)
    return Reader(batches=iter(loader), state=loader.save_state_rank)
