"""torchdata nodes over a memory map of documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus import Batch, Corpus, pack
from reader import WHOLE_CORPUS, Reader
from torch import Generator
from torch.utils.data import RandomSampler
from torchdata.nodes import (
    BaseNode,
    Loader,
    MapStyleWrapper,
    MultiNodeWeightedSampler,
    Prefetcher,
)
from torchdata.nodes import StopCriteria as Stop

NOTE = (
    "MultiNodeWeightedSampler over a memory map that we wrote, random order, greedy packing by us;"
    " no format, no packing, no checksum of its own; resume goes through the permutation again and"
    " loses what was in the packer"
)
PACKAGES = ("torchdata",)
PART_TOKENS = WHOLE_CORPUS


def write(corpus: Corpus, folder: Path) -> None:
    """Nothing: the corpus's flat files are mapped."""


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """With `workers` one thread works ahead, which it recommends for a chain of cheap nodes."""
    mixed = MultiNodeWeightedSampler(
        {
            name: MapStyleWrapper(
                source, RandomSampler(source, generator=Generator().manual_seed(0))
            )
            for name, source in corpus.sources.items()
        },
        corpus.document_weights,
        stop_criteria=Stop.CYCLE_FOREVER,
    )
    node: BaseNode[Batch] = PackNode(mixed)
    loader = Loader(Prefetcher(node, prefetch_factor=2) if workers else node)
    if state is not None:
        loader.load_state_dict(state)
    return Reader(batches=iter(loader), state=loader.state_dict)


class PackNode(BaseNode):  # type: ignore[type-arg]
    """Batches packed from a node of documents."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self._source = source
        self._batches: Iterator[Batch] = iter(())

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """From the beginning, or from a state of the source."""
        super().reset(initial_state)
        self._source.reset(initial_state and initial_state["source"])
        self._batches = pack(self._source)

    def next(self) -> Batch:
        """The next batch."""
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The source's alone."""
        return {"source": self._source.state_dict()}
