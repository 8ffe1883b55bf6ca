"""Raw documents go in, a prepared source comes out: shards, their manifest and the tokenizer that made them."""

import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from bigmix.data.chat import Template, check_first, encode_chat, open_template
from bigmix.data.documents import RawRow, ReadOptions, read_rows
from bigmix.data.location import MANIFEST
from bigmix.data.manifest import (
    Manifest,
    ShardEntry,
    ShardTable,
    TemplateEntry,
    TokenizerEntry,
    token_dtype,
    write_manifest,
)
from bigmix.data.recognise import Conversation, Kind, Layout, document_of, recognise
from bigmix.data.shards import ShardWriter, with_lengths
from bigmix.data.tokenise import Job, TokenisedBatch, TokenisedDocument, tokenised
from bigmix.data.tokenizer import Tokenizer, load_tokenizer
from bigmix.errors import BadInput

TOKENIZER_FOLDER = "tokenizer"
FIRST_ROWS = 256  # looked at to recognise a source and to check its chats
MANY_DROPPED = 0.05  # a share of the documents that deserves a warning

Report = Callable[[int, int], None]  # documents read and tokens written so far


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """What to prepare and how: `limit` counts rows, `max_tokens` the tokens of a document, `shard_tokens` of a shard."""

    inputs: Sequence[str]
    tokenizer: str
    output: str
    kind: Kind | None = None  # None: what the first rows show
    template: Literal["plain", "tokenizer"] = "plain"
    columns: Mapping[str, str] | None = None  # which column plays which part; None: recognised
    read: ReadOptions = field(default_factory=ReadOptions)
    processes: int = 1
    max_tokens: int | None = None
    shard_tokens: int = 64_000_000
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was made. `first_dropped` names for each reason the place of the first document that was left out."""

    manifest: Manifest
    layout: Layout
    warnings: Sequence[str]
    first_dropped: Mapping[str, str]


def prepare(settings: PrepareSettings, report: Report = lambda *_: None) -> Prepared:
    """Tokenise the inputs into the output folder, which appears under its name only when it is whole.

    Raises BadInput where the output exists, an input is broken or not recognised, or no document is left.
    """
    output = Path(settings.output)
    _check(settings, output)
    rows: Iterator[RawRow] = islice(read_rows(settings.inputs, settings.read), settings.limit)
    first = list(islice(rows, FIRST_ROWS))
    job, warnings = _job(settings, load_tokenizer(settings.tokenizer), first)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Not named by process id: in containers each run has the same, and a killed one leaves its folder behind.
    beside = output.with_name(f"{output.name}.tmp-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        collected = _Collected(job, beside, settings.shard_tokens)
        with closing(tokenised(job, chain(first, rows), settings.processes)) as batches:
            _collect(collected, batches, report)
        job.tokenizer.save(beside / TOKENIZER_FOLDER)
        manifest = with_lengths(beside, collected.manifest())
        write_manifest(beside, manifest)
        os.replace(beside, output)
    finally:
        # Where all went well the folder has its name by now, and nothing is left to remove.
        shutil.rmtree(beside, ignore_errors=True)
    return Prepared(
        manifest=manifest,
        layout=job.layout,
        warnings=[*warnings, *_warnings_about_dropped(manifest)],
        first_dropped=collected.first_dropped,
    )


def _check(settings: PrepareSettings, output: Path) -> None:
    faults = [
        f"--{name.replace('_', '-')} is {value}, must be at least 1"
        for name in ("processes", "max_tokens", "shard_tokens", "limit")
        if (value := getattr(settings, name)) is not None and value < 1
    ]
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        what = "holds a prepared source" if (output / MANIFEST).is_file() else "is not empty"
        faults.append(f"output {output} already {what}; remove it or give another --output")
    if faults:
        raise BadInput(*faults)


def _job(
    settings: PrepareSettings, tokenizer: Tokenizer, first: Sequence[RawRow]
) -> tuple[Job, Sequence[str]]:
    """Decide from the first rows what the source is, and check that its chats can be learned from."""
    columns = [row.columns for row in first if row.columns is not None]
    if not columns:
        raise BadInput(f"no rows are in {', '.join(settings.inputs)}; give inputs with data")
    layout = recognise(columns, kind=settings.kind, columns=settings.columns)
    template, warnings = None, list[str]()
    if layout.kind == "chat":
        template = open_template(tokenizer, settings.template)
        documents = [document_of(row, layout) for row in columns]
        chats = [each for each in documents if isinstance(each, Conversation)]
        samples = [encode_chat(tokenizer, template, chat) for chat in chats]
        warnings.extend(check_first(tokenizer, template, samples))
    job = Job(tokenizer=tokenizer, layout=layout, template=template, max_tokens=settings.max_tokens)
    return job, warnings


def _collect(collected: "_Collected", batches: Iterable[TokenisedBatch], report: Report) -> None:
    try:
        for batch in batches:
            collected.add(batch)
            report(collected.read, collected.tokens)
        collected.close()
    finally:
        collected.abort()


class _Collected:
    """The shards written so far, and the counts of what went into them and of what did not."""

    def __init__(self, job: Job, folder: Path, shard_tokens: int) -> None:
        self._job = job
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(job.tokenizer.vocab_size)
        self._writer: ShardWriter | None = None
        self._shards: list[ShardEntry] = []
        self._dropped: Counter[str] = Counter()
        self._loss_bytes = 0
        self.first_dropped: dict[str, str] = {}
        self.read = 0
        self.tokens = 0

    def add(self, batch: TokenisedBatch) -> None:
        """Write the documents of a batch and count the others."""
        self.read += batch.read
        self._dropped.update(batch.dropped)
        self.first_dropped = {**batch.first_dropped, **self.first_dropped}
        for document in batch.documents:
            self._add(document)

    def _add(self, document: TokenisedDocument) -> None:
        if self._writer is None:
            path = self._folder / f"shard-{len(self._shards):06d}.tar"
            self._writer = ShardWriter(path, self._dtype, masked=document.loss_mask is not None)
        self._writer.add(document.ids, document.loss_mask)
        self.tokens += len(document.ids)
        self._loss_bytes += document.loss_bytes
        if self._writer.tokens >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Finish the open shard, if one is."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None

    def abort(self) -> None:
        """Remove the open shard, if one is."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def manifest(self) -> Manifest:
        """What has been written; BadInput where that is nothing."""
        if not self._shards:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self._dropped.most_common())
            raise BadInput(
                f"none of {self.read} documents is left ({reasons}); nothing was written, see docs/data-formats.md"
            )
        return Manifest(
            kind=self._job.layout.kind,
            dtype=self._dtype,
            tokenizer=_tokenizer_entry(self._job.tokenizer),
            template=_template_entry(self._job.template),
            read=self.read,
            dropped=dict(sorted(self._dropped.items())),
            documents=sum(shard.documents for shard in self._shards),
            tokens=self.tokens,
            loss_tokens=sum(shard.loss_tokens for shard in self._shards),
            loss_bytes=self._loss_bytes,
            shards=ShardTable.of(self._shards),
        )


def _tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _template_entry(template: Template | None) -> TemplateEntry | None:
    return None if template is None else TemplateEntry(name=template.name, sha256=template.sha256)


def _warnings_about_dropped(manifest: Manifest) -> Sequence[str]:
    return [
        f"{count / manifest.read:.0%} of the documents were dropped as {reason}"
        for reason, count in manifest.dropped.items()
        if count > MANY_DROPPED * manifest.read
    ]
