"""What several test modules share and is slow to make."""

import gc
import os
from pathlib import Path

import pytest
import torch
from support.corpora import generated_texts
from support.templates import CLOSE, OPEN
from tokenizers import processors
from transformers import AutoTokenizer

from bigmix.text.tokenizer import load_tokenizer, train_tokenizer

# Nothing that is imported is garbage: no search for any among it, neither while tests are collected
# nor while they run.
gc.disable()
# Tests run beside each other: threads that wait for each other's cores are several times slower
# than one.
torch.set_num_threads(1)
# Processes that tests start would each compile the whole of bigmix anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Without a GPU the kernels run in triton's interpreter; it must be chosen before a module with
# kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One worker after another takes a file: those that take longest come first, so that none is left to
# one worker at the end.
LONGEST = (
    "test_slurm",
    "test_recovery",
    "test_faults",
    "test_checkpoints",
    "test_supervisor",
    "test_sweep",
    "test_controlled_run",
    "test_behaviour_run",
    "test_plan",
    "test_run",
    "test_chaos",
    "test_exactness",
    "test_checks",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # at exit some library counts as leaked what the garbage collector does not know


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 400 entries, without BOS and without a chat
    template.
    """
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    return train_tokenizer(generated_texts(200), vocab_size=400, kind="bpe", folder=folder)


@pytest.fixture
def with_template(tiny_tokenizer, tmp_path):
    """A function that gives the tiny tokenizer a chat template and the two tokens of ChatML."""

    def made(source, *, adds_bos=False):
        whole = AutoTokenizer.from_pretrained(tiny_tokenizer)
        whole.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
        if adds_bos:
            whole.add_special_tokens({"bos_token": "<s>"})
            whole.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", whole.bos_token_id)]
            )
        whole.chat_template = source
        whole.save_pretrained(tmp_path / "tokenizer")
        return load_tokenizer(str(tmp_path / "tokenizer"))

    return made
