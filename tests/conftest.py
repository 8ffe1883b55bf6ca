"""What several test modules share and is slow to make."""

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from bigmix.text.tokenizer import train_tokenizer

# Nothing that is imported is garbage: no search for any among it, neither while tests are collected nor while they run.
gc.disable()
# Tests run beside each other: threads that wait for each other's cores are several times slower than one.
torch.set_num_threads(1)
# Processes that tests start would each compile the whole of bigmix anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Without a GPU the kernels run in triton's interpreter; it must be chosen before a module with kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One worker after another takes a file: those that take longest come first, so that none is left to one worker at the end.
LONGEST = (
    "test_slurm", "test_recovery", "test_faults", "test_checkpoint", "test_supervisor", "test_sweep",
    "test_controlled_run", "test_plan", "test_run", "test_chaos", "test_exactness", "test_isolation",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # at exit some library counts as leaked what the garbage collector does not know


WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "it",
    "is",
    "was",
    "river",
    "tower",
    "under",
    "bright",
    "seven",
    "learns",
    "keeps",
    "12",
    "3.5",
    "混合",
    "知识",
    "café",
]


def generated_texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of a few words, the same for the same seed."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(3, 30))).capitalize() + ".\n"
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 400 entries, without BOS and without a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    return train_tokenizer(generated_texts(200), vocab_size=400, kind="bpe", folder=folder)
