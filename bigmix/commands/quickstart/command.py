"""The command `bigmix quickstart`, which goes from raw text to a comparison of three runs by the
commands that a user would type.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bigmix
from bigmix.cluster.world import free_port
from bigmix.commands.quickstart.corpus import build_corpus
from bigmix.errors import DONE, BadInput, BigmixError
from bigmix.terminal import Terminal

FOLDER = Path("runs/quickstart")
_RECIPES = Path(__file__).resolve().parent
_TRAIN = Path(bigmix.__file__).resolve().parent.parent / "launch" / "train.py"
RANKS = 2


def add_quickstart(subparsers: Any) -> None:
    """Add `bigmix quickstart`."""
    parser = subparsers.add_parser(
        "quickstart",
        help=(
            "see two-way training keep what one-way training loses, in four minutes on two CPU"
            " cores"
        ),
        description=(
            "Pretrains a small model on the standard library's source code, teaches it to write"
            f" docstrings one-way and two-way, and compares. Everything is written to {FOLDER}."
        ),
    )
    parser.set_defaults(func=partial(_quickstart, subcommands=subparsers.choices))


def _quickstart(
    known: argparse.Namespace, *, subcommands: Mapping[str, argparse.ArgumentParser]
) -> int:
    del known
    if not _TRAIN.is_file():
        raise BadInput(
            f"{_TRAIN} does not exist; the quick start runs from a checkout of bigmix, installed"
            " with --editable"
        )
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    terminal = Terminal()
    terminal.note("corpus: source code and docstrings of this machine's Python standard library")
    build_corpus(FOLDER / "raw")
    for command in _commands():
        terminal.note(f"\n$ {shlex.join(_relative(word) for word in command)}")
        _run(command, subcommands)
    terminal.note(f"\npage        {FOLDER}/report/index.html")
    terminal.note(f"picture     {FOLDER}/report/figure.png")
    terminal.note(f"TensorBoard tensorboard --logdir {FOLDER}")
    terminal.note(f"done in {time.monotonic() - began:.0f} s")
    return DONE


def _commands() -> Iterator[Sequence[str]]:
    raw, data, tokenizer = FOLDER / "raw", FOLDER / "data", str(FOLDER / "tokenizer")
    yield [
        "bigmix",
        "tokenizer",
        "train",
        str(raw / "code.jsonl"),
        "--vocab-size",
        "2048",
        "--limit",
        "300",
        "--output",
        tokenizer,
    ]
    for name, source in (("code", "code"), ("docs", "task")):
        for part in ("", "-held-out"):
            yield [
                "bigmix",
                "prepare",
                str(raw / f"{source}{part}.jsonl"),
                "--tokenizer",
                tokenizer,
                "--output",
                str(data / f"{name}{part}"),
                "--processes",
                "1",
            ]
    for name in ("base", "one-way", "two-way"):
        yield [
            str(Path(sys.executable).with_name("deepspeed")),
            "--log_level",
            "error",
            "--master_port",
            str(free_port()),
            "--num_gpus",
            str(RANKS),
            str(_TRAIN),
            str(_RECIPES / f"{name}.yaml"),
        ]
    runs = [str(FOLDER / name) for name in ("one-way", "two-way")]
    yield ["bigmix", "compare", *runs, "--out", str(FOLDER / "report")]


def _run(command: Sequence[str], subcommands: Mapping[str, argparse.ArgumentParser]) -> None:
    program, *words = command
    if program == "bigmix":  # in this process, which has imported the libraries already
        known = subcommands[words[0]].parse_args(words[1:])
        code = known.func(known)
    else:
        # The accelerator is named: on a machine without a GPU each process would warn that it found
        # none.
        environment = os.environ | {"DS_ACCELERATOR": "cpu"}
        code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise BigmixError(
            f"`{shlex.join(command)}` ended with exit code {code}; its message above says why"
        )


def _relative(word: str) -> str:
    """A path as a user would type it in this folder; other words are unchanged."""
    path = Path(word)
    if path.parent == Path(sys.executable).parent:
        return path.name
    return os.path.relpath(word) if path.is_absolute() and path.is_file() else word
