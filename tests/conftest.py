"""What several test modules share and is slow to make."""

import os
import random
from pathlib import Path

import pytest
import torch

from bigmix.data.tokenizer import train_tokenizer

# Tests run beside each other: threads that wait for each other's cores are several times slower than one.
torch.set_num_threads(1)
# Processes that tests start would each compile the whole of bigmix anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Without a GPU the kernels run in triton's interpreter; it must be chosen before a module with kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
