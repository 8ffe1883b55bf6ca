"""The commands `bigmix prepare`, which makes a prepared source from raw text, and `bigmix tokenizer
train`, which trains a tokenizer on it.
"""

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmix.commands.arguments import INPUTS, columns_of, count
from bigmix.data.shards.manifest import Manifest, read_manifest
from bigmix.errors import DONE, BadInput
from bigmix.terminal import Table, Terminal, quiet_third_party_logs
from bigmix.text.formats import Conversation, Text, utf8_of

if TYPE_CHECKING:
    from bigmix.commands.prepare.job import PrepareSettings

_PICTURE = "report.png"


def add_prepare(subparsers: Any) -> None:
    """Add `bigmix prepare`."""
    parser = subparsers.add_parser(
        "prepare",
        help="raw text or chats to tokenised shards",
        description=(
            "Tokenise inputs into a prepared source: tar shards and a manifest. A command that was"
            " stopped continues at its last complete shard when it is given again."
        ),
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help=INPUTS)
    add("--tokenizer", help="Hugging Face folder or name, or a sentencepiece .model")
    add("--output", required=True, help="folder of the prepared source")
    add("--kind", choices=("text", "chat", "auto"), default="auto", help="default: recognised")
    add(
        "--template",
        choices=("plain", "tokenizer"),
        default="plain",
        help=(
            "plain: built in, adds no special tokens (default); tokenizer: the tokenizer's chat"
            " template"
        ),
    )
    add("--columns", metavar="PART=COLUMN,...", help="such as prompt=question,response=answer")
    add("--processes", type=count, default=os.cpu_count() or 1, help="default: all cores")
    add("--max-tokens", type=count, help="drop documents with more tokens, counted")
    add("--shard-tokens", type=count, default=64_000_000, help="tokens of a shard (default 64M)")
    add("--limit", type=count, help="read at most this many records")
    add("--split-on", metavar="TEXT", help="split .txt files into documents at each TEXT")
    add("--skip-bad-lines", action="store_true", help="drop and count broken JSON lines")
    add("--deduplicate", action="store_true", help="keep the first of identical documents")
    add(
        "--held-out",
        metavar="FRACTION",
        help="put this fraction of the documents, such as 0.005, into OUTPUT-held-out",
    )
    add("--part", metavar="I/N", help="prepare the I-th of N parts, such as 3/8; then --merge")
    add("--merge", action="store_true", help="make one source of the parts in --output")
    add("--report", action="store_true", help=f"draw {_PICTURE} in --output; works without INPUT")
    parser.set_defaults(func=_prepare)


def _prepare(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    terminal = Terminal()
    if known.merge:
        _merge(terminal, known)
    elif known.inputs or not known.report:
        _make(terminal, known)
    else:
        report_source(terminal, known.output, read_manifest(known.output), {})
    if known.report and known.part is None:
        _draw(terminal, Path(known.output))
    return DONE


def _make(terminal: Terminal, known: argparse.Namespace) -> None:
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.commands.prepare.job import prepare

    settings = _settings(known)
    counter = terminal.counter("documents", "tokens")
    try:
        prepared = prepare(settings, counter)
    finally:
        terminal.close()
    terminal.note(f"recognised as {prepared.layout.described()}")
    for text in filter(None, [prepared.layout.note, *prepared.warnings]):
        terminal.warning(text)
    if known.part is not None:
        counts = f"{prepared.manifest.documents:,} documents, {prepared.manifest.tokens:,} tokens"
        terminal.note(f"part {known.part} of {known.output} is complete: {counts}")
        terminal.note(f"when all are: bigmix prepare --merge --output {known.output}")
        return
    report_source(terminal, known.output, prepared.manifest, prepared.first_dropped)
    report_held_out(terminal, prepared.held_out)


def _merge(terminal: Terminal, known: argparse.Namespace) -> None:
    from bigmix.commands.prepare.progress import merge

    if known.inputs or known.part is not None:
        what = f"--part {known.part}" if known.part is not None else f"inputs {known.inputs[0]} ..."
        raise BadInput(f"--merge has {what}, takes only --output, the folder of the parts")
    merged = merge(Path(known.output))
    report_source(terminal, known.output, merged.manifest, merged.first_dropped)
    report_held_out(terminal, merged.held_out)


def _settings(known: argparse.Namespace) -> "PrepareSettings":
    """The settings that the arguments ask for; raises BadInput with all their faults."""
    # As above: seconds of import.
    from bigmix.commands.prepare.job import PrepareSettings, faults_of_settings
    from bigmix.text.readers import ReadOptions

    faults = []
    if not known.inputs:
        faults.append("no INPUT is given; name files, folders, globs or hf:NAME")
    if known.tokenizer is None:
        faults.append("--tokenizer is missing; give a folder, a name on the hub or a .model file")
    part = _part_of(known.part, faults)
    held_out = fraction_of(known.held_out, faults)
    try:
        columns = columns_of(known.columns)
    except BadInput as error:
        columns = None
        faults += error.faults
    settings = PrepareSettings(
        inputs=known.inputs,
        tokenizer=known.tokenizer or "",
        output=known.output,
        kind=None if known.kind == "auto" else known.kind,
        template=known.template,
        columns=columns,
        read=ReadOptions(split_on=known.split_on, skip_bad_lines=known.skip_bad_lines),
        processes=known.processes,
        max_tokens=known.max_tokens,
        shard_tokens=known.shard_tokens,
        limit=known.limit,
        part=part,
        deduplicate=known.deduplicate,
        held_out=held_out,
    )
    faults += faults_of_settings(settings)
    if faults:
        raise BadInput(*faults)
    return settings


def _part_of(text: str | None, faults: list[str]) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None:
        faults.append(
            f"--part is {text!r}, must be I/N with whole numbers; write 3/8 for the third of eight"
        )
        return None
    return int(found[1]), int(found[2])


def fraction_of(text: str | None, faults: list[str]) -> float:
    """The number of --held-out, 0 where it is not given; adds to the faults where it is wrong."""
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 0.5:
        faults.append(
            f"--held-out is {text}, must be above 0 and at most 0.5; give a fraction such as 0.005"
        )
        return 0.0
    return value


def report_source(
    terminal: Terminal, output: str, manifest: Manifest, first_dropped: Mapping[str, str]
) -> None:
    """Print the table of a prepared source."""
    loss = manifest.loss_tokens / manifest.tokens
    cells = [("documents", f"{manifest.documents:,} of {manifest.read:,}")]
    for reason, number in manifest.dropped.items():
        place = f", the first at {first_dropped[reason]}" if reason in first_dropped else ""
        name = "held out" if reason == "held_out" else f"dropped: {reason}"
        cells.append((name, f"{number:,}{place}"))
    cells += [
        ("tokens", f"{manifest.tokens:,}"),
        ("loss tokens", f"{manifest.loss_tokens:,} ({loss:.1%})"),
        *_lengths(manifest),
        ("shards", f"{len(manifest.shards):,}"),
        ("tokenizer", f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} entries"),
    ]
    if manifest.template is not None:
        cells.append(("chat template", manifest.template.name))
    terminal.table(Table(title=f"{manifest.kind} source {output}", columns=("", ""), rows=cells))


def _lengths(manifest: Manifest) -> Sequence[tuple[str, str]]:
    found = manifest.statistics
    if found is None:
        return []
    mean = manifest.tokens / manifest.documents
    cells = [
        ("tokens of a document", f"{mean:,.0f} on average, half have {found.length_of_half()}")
    ]
    if manifest.kind == "chat":
        turns = sum(k * n for k, n in enumerate(found.documents_by_turns)) / manifest.documents
        more = "at least " if found.documents_by_turns[-1] else ""  # its last bin has no upper end
        cells.append(("turns of a chat", f"{more}{turns:.1f} on average"))
    characters, text_bytes = found.characters / manifest.tokens, found.text_bytes / manifest.tokens
    cells.append(("text of a token", f"{characters:.2f} characters, {text_bytes:.2f} bytes"))
    return cells


def report_held_out(terminal: Terminal, held_out: Manifest | None) -> None:
    """Print how many documents are held out, where there are any."""
    if held_out is not None:
        terminal.note(f"held out: {held_out.documents:,} documents, {held_out.tokens:,} tokens")


def _draw(terminal: Terminal, output: Path) -> None:
    from bigmix.commands.prepare.picture import draw

    path = output / _PICTURE
    draw(read_manifest(str(output)), title=output.name, path=path)
    terminal.note(f"picture: {path}")


def add_tokenizer(subparsers: Any) -> None:
    """Add `bigmix tokenizer train`."""
    parser = subparsers.add_parser(
        "tokenizer", help="train a tokenizer, for training a model from scratch"
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train on the texts of the inputs")
    add = train.add_argument
    add("inputs", nargs="+", metavar="INPUT", help=INPUTS)
    add("--vocab-size", type=count, default=32_000, help="default 32000")
    add("--kind", choices=("bpe", "unigram"), default="bpe", help="default: byte-level BPE")
    add("--output", required=True, help="folder of the tokenizer")
    add("--columns", metavar="PART=COLUMN,...", help="as for `bigmix prepare`")
    add("--limit", type=count, help="read at most this many records")
    train.set_defaults(func=_train_tokenizer)


def _train_tokenizer(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    # transformers takes seconds to import: `bigmix --help` should not.
    from bigmix.text.tokenizer import load_tokenizer, train_tokenizer

    texts = _Encodable(_texts(known.inputs, columns_of(known.columns), known.limit))
    path = train_tokenizer(
        texts, vocab_size=known.vocab_size, kind=known.kind, folder=Path(known.output)
    )
    size = load_tokenizer(str(path)).vocab_size
    terminal = Terminal()
    if texts.num_left_out:
        terminal.warning(
            f"{texts.num_left_out:,} texts contain half of a surrogate pair, which is no text, and"
            " are left out"
        )
    terminal.note(f"tokenizer with {size:,} entries written to {path}")
    return DONE


class _Encodable:
    """The texts that UTF-8 can write; the others are left out and counted."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.num_left_out = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if utf8_of(text) is None:
                self.num_left_out += 1
            else:
                yield text


def _texts(
    inputs: list[str], columns: Mapping[str, str] | None, limit: int | None
) -> Iterator[str]:
    """The text of each document; of a conversation the text of each turn."""
    from bigmix.text.readers import raw_documents

    for document in raw_documents(inputs, columns=columns, limit=limit):
        if isinstance(document, Text):
            yield document.text
        elif isinstance(document, Conversation):
            yield from (str(turn["content"]) for turn in document.messages if turn.get("content"))
