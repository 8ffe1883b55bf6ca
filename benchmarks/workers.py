"""Documents go in, packed batches come out, of this process or of torch's worker processes."""

from collections.abc import Iterable, Iterator
from typing import Any

from corpus import Batch, Document, pack
from torch.utils.data import DataLoader, IterableDataset


class Packed(IterableDataset):  # type: ignore[type-arg]
    """The batches of an iterable of documents, packed in the process that iterates."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents = documents

    def __iter__(self) -> Iterator[Batch]:
        return pack(self._documents)


def packed_batches(documents: Iterable[Document], workers: int) -> Iterator[Batch]:
    """Packed in this process, or in worker processes of torch's DataLoader."""
    if not workers:
        return pack(documents)
    loader = DataLoader(Packed(documents), batch_size=None, num_workers=workers)
    return map(as_arrays, loader)


def as_arrays(batch: Any) -> Batch:
    """DataLoader turns arrays into tensors on the way; this is the way back, without a copy."""
    return Batch(batch[0].numpy(), batch[1].numpy(), batch[2])
