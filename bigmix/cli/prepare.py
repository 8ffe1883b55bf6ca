"""`bigmix prepare` and `bigmix tokenizer train`: raw text becomes a prepared source, or a tokenizer."""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmix.errors import DONE, BadInput
from bigmix.recipe.models import whole_number
from bigmix.terminal import Table, Terminal, tame_libraries

if TYPE_CHECKING:
    from bigmix.data.prepare import Prepared, PrepareSettings

_INPUTS = (
    ".txt, .jsonl(.gz/.zst), .parquet, WebDataset .tar, a glob or folder of them, a saved dataset, "
    "or hf:NAME[:CONFIG][:SPLIT]"
)


def add_prepare(subparsers: Any) -> None:
    """Add `bigmix prepare`."""
    parser = subparsers.add_parser(
        "prepare",
        help="raw text or chats to tokenised shards",
        description="Tokenise inputs into a prepared source: tar shards and a manifest.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=_INPUTS)
    add("--tokenizer", required=True, help="Hugging Face folder or name, or a sentencepiece .model")
    add("--output", required=True, help="folder of the prepared source; must not exist")
    add("--kind", choices=("text", "chat", "auto"), default="auto", help="default: recognised")
    add(
        "--template",
        choices=("plain", "tokenizer"),
        default="plain",
        help="plain: built in, adds no special tokens (default); tokenizer: the tokenizer's chat template",
    )
    add("--columns", metavar="PART=COLUMN,...", help="such as prompt=question,response=answer")
    add("--processes", type=_count, default=os.cpu_count() or 1, help="default: all cores")
    add("--max-tokens", type=_count, help="drop documents with more tokens, counted")
    add("--shard-tokens", type=_count, default=64_000_000, help="tokens of a shard (default 64M)")
    add("--limit", type=_count, help="read only so many rows")
    add("--split-on", metavar="TEXT", help="cut .txt files into documents where TEXT stands")
    add("--skip-bad-lines", action="store_true", help="count broken JSON lines, do not stop")
    parser.set_defaults(func=_prepare)


def add_tokenizer(subparsers: Any) -> None:
    """Add `bigmix tokenizer train`."""
    parser = subparsers.add_parser("tokenizer", help="train a tokenizer, for work from scratch")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train on the texts of the inputs")
    add = train.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=_INPUTS)
    add("--vocab-size", type=_count, default=32_000, help="default 32000")
    add("--kind", choices=("bpe", "unigram"), default="bpe", help="default: byte-level BPE")
    add("--output", required=True, help="folder of the tokenizer")
    add("--columns", metavar="PART=COLUMN,...", help="as for `bigmix prepare`")
    add("--limit", type=_count, help="read only so many rows")
    train.set_defaults(func=_train_tokenizer)


def _count(text: str) -> int:
    value = whole_number(text)
    if not isinstance(value, int) or value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; write it like 500, 64M or 2e6")
    return value


def _columns(text: str | None) -> Mapping[str, str] | None:
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(part and equals and column for part, equals, column in pairs):
        raise BadInput(
            f"--columns is {text!r}; write PART=COLUMN pairs with commas between, such as prompt=question,response=answer"
        )
    return {part: column for part, _, column in pairs}


def _prepare(known: argparse.Namespace) -> int:
    tame_libraries()
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.data.documents import ReadOptions
    from bigmix.data.prepare import PrepareSettings, prepare

    settings = PrepareSettings(
        inputs=known.inputs,
        tokenizer=known.tokenizer,
        output=known.output,
        kind=None if known.kind == "auto" else known.kind,
        template=known.template,
        columns=_columns(known.columns),
        read=ReadOptions(split_on=known.split_on, skip_bad_lines=known.skip_bad_lines),
        processes=known.processes,
        max_tokens=known.max_tokens,
        shard_tokens=known.shard_tokens,
        limit=known.limit,
    )
    terminal = Terminal()
    counter = terminal.counter("documents", "tokens")
    try:
        prepared = prepare(settings, counter)
    finally:
        terminal.close()
    _tell(terminal, settings, prepared)
    return DONE


def _tell(terminal: Terminal, settings: "PrepareSettings", prepared: "Prepared") -> None:
    manifest = prepared.manifest
    terminal.note(f"recognised as {prepared.layout.described()}")
    for text in filter(None, [prepared.layout.note, *prepared.warnings]):
        terminal.warning(text)
    loss = manifest.loss_tokens / manifest.tokens
    cells = [("documents", f"{manifest.documents:,} of {manifest.read:,}")]
    cells += [
        (f"dropped: {reason}", f"{count:,}, the first at {prepared.first_dropped[reason]}")
        for reason, count in manifest.dropped.items()
    ]
    cells += [
        ("tokens", f"{manifest.tokens:,}"),
        ("loss tokens", f"{manifest.loss_tokens:,} ({loss:.1%})"),
        ("shards", f"{len(manifest.shards)}"),
        ("tokenizer", f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} entries"),
    ]
    if manifest.template is not None:
        cells.append(("chat template", manifest.template.name))
    terminal.table(
        Table(title=f"{manifest.kind} source {settings.output}", columns=("", ""), rows=cells)
    )


def _train_tokenizer(known: argparse.Namespace) -> int:
    tame_libraries()
    # As above.
    from bigmix.data.tokenizer import load_tokenizer, train_tokenizer

    texts = _texts(known.inputs, _columns(known.columns), known.limit)
    path = train_tokenizer(
        texts, vocab_size=known.vocab_size, kind=known.kind, folder=Path(known.output)
    )
    size = load_tokenizer(str(path)).vocab_size
    Terminal().note(f"tokenizer with {size:,} entries written to {path}")
    return DONE


def _texts(
    inputs: list[str], columns: Mapping[str, str] | None, limit: int | None
) -> Iterator[str]:
    """The text of each document, of a chat that of all its turns."""
    from itertools import chain, islice

    from bigmix.data.documents import ReadOptions, read_rows
    from bigmix.data.recognise import Conversation, Text, document_of, recognise

    read = islice(read_rows(inputs, ReadOptions()), limit)
    rows = (row.columns for row in read if row.columns is not None)
    first = list(islice(rows, 256))
    if not first:
        raise BadInput(f"no rows are in {', '.join(inputs)}; give inputs with text")
    layout = recognise(first, kind=None, columns=columns)
    for row in chain(first, rows):
        document = document_of(row, layout)
        if isinstance(document, Text):
            yield document.text
        elif isinstance(document, Conversation):
            yield from (str(turn["content"]) for turn in document.messages if turn.get("content"))
