"""`bigmix tokenizer train`: raw text becomes a tokenizer."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigmix.commands.arguments import INPUTS, columns_of, count
from bigmix.errors import DONE
from bigmix.terminal import Terminal, tame_libraries


def add_tokenizer(subparsers: Any) -> None:
    """Add `bigmix tokenizer train`."""
    parser = subparsers.add_parser("tokenizer", help="train a tokenizer, for work from scratch")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train on the texts of the inputs")
    add = train.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    add("--vocab-size", type=count, default=32_000, help="default 32000")
    add("--kind", choices=("bpe", "unigram"), default="bpe", help="default: byte-level BPE")
    add("--output", required=True, help="folder of the tokenizer")
    add("--columns", metavar="PART=COLUMN,...", help="as for `bigmix prepare`")
    add("--limit", type=count, help="read only so many rows")
    train.set_defaults(func=_train_tokenizer)


def _train_tokenizer(known: argparse.Namespace) -> int:
    tame_libraries()
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.text.tokenizer import load_tokenizer, train_tokenizer

    texts = _Encodable(_texts(known.inputs, columns_of(known.columns), known.limit))
    path = train_tokenizer(
        texts, vocab_size=known.vocab_size, kind=known.kind, folder=Path(known.output)
    )
    size = load_tokenizer(str(path)).vocab_size
    terminal = Terminal()
    if texts.others:
        terminal.warning(
            f"{texts.others:,} texts hold half of a surrogate pair, which is no text, and are left out"
        )
    terminal.note(f"tokenizer with {size:,} entries written to {path}")
    return DONE


class _Encodable:
    """Those of some texts that UTF-8 can write; JSON can spell `others`, which are counted."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.others = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                self.others += 1
            else:
                yield text


def _texts(
    inputs: list[str], columns: Mapping[str, str] | None, limit: int | None
) -> Iterator[str]:
    """The text of each document, of a chat that of all its turns."""
    from bigmix.data.raw_documents import raw_documents
    from bigmix.text.formats import Conversation, Text

    for document in raw_documents(inputs, columns=columns, limit=limit):
        if isinstance(document, Text):
            yield document.text
        elif isinstance(document, Conversation):
            yield from (str(turn["content"]) for turn in document.messages if turn.get("content"))
