"""bigmix; what is used of its interface is in `ours`."""

from pathlib import Path
from typing import Any

import ours
from corpus import Corpus
from reader import WHOLE_CORPUS, Reader

NOTE = (
    "best-fit rows of one source, chats whole, exact share in every prefix, where parts begin and"
    " runs of loss tokens (the device makes positions and labels of them), checksums, resume at any"
    " step; a batch is a micro-batch of a step of 64 rows"
)
PACKAGES = ("bigmix",)
PART_TOKENS = WHOLE_CORPUS


def write(corpus: Corpus, folder: Path) -> None:
    """Prepared sources."""
    ours.write(corpus, folder)


def open_reader(corpus: Corpus, folder: Path, *, workers: int, state: Any) -> Reader:
    """With `workers` the loader's thread is used, as in training; without, the calls that the
    thread makes.
    """
    return ours.open_reader(folder, threaded=bool(workers), skip=state or 0)
