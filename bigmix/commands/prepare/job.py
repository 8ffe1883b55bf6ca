"""Prepares a source from raw documents: checks the settings, tokenises the inputs, writes shards.

The job is one part or several; a last step merges the parts. A part that is stopped continues at
its last complete shard.
"""

import errno
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from bigmix.commands.prepare.parts import (
    InputFile,
    PartRecords,
    divide,
    files_of,
    listing,
    records_before,
)
from bigmix.commands.prepare.progress import (
    PARTS,
    TOKENIZER_FOLDER,
    Progress,
    faults_of_identity,
    faults_of_output,
    file_of_part,
    locked_part,
    merge,
    nothing_left,
    read_progress,
    remove_begun,
)
from bigmix.commands.prepare.tokenise import Job, hashes_of, in_batches, start_early, tokenise
from bigmix.commands.prepare.writer import PartWriter, Rules, Seen
from bigmix.data.shards.location import MANIFEST
from bigmix.data.shards.manifest import (
    Manifest,
    ShardTable,
    Statistics,
    TemplateEntry,
    TokenizerEntry,
    token_dtype,
)
from bigmix.errors import BadInput, BigmixError
from bigmix.text.chat_template import Template, check_first, encode_chat, open_template
from bigmix.text.formats import Conversation, Document, Kind, Layout, Text, document_of, recognise
from bigmix.text.readers import TEXT_SUFFIXES, RawRecord, ReadOptions, format_of, read_records
from bigmix.text.tokenizer import Tokenizer, load_tokenizer

# Increase with every change by which the same inputs and settings give other shards.
PREPARE_VERSION = 1
FIRST_RECORDS = 256  # decide how the inputs are read; their chats are checked
LARGEST_HELD_OUT = 0.5
MANY_DROPPED = 0.05  # the fraction of the documents above which there is a warning
MANY_UNKNOWN = 0.01  # the same of the tokens
_SAMPLES, _SAMPLED = 64, 4_000  # texts that are searched for unknown tokens, and characters of each
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ReportProgress = Callable[[int, int], None]  # documents read and tokens written so far


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareSettings:
    """What to prepare, and how.

    `limit` is the number of records to read, `max_tokens` the largest number of tokens in a
    document, `shard_tokens` the number of tokens in a shard. `part` = (i, n) prepares the i-th of n
    parts, from 1; None prepares the source in one go. `held_out` is the fraction of the documents
    that goes to a source of its own.
    """

    inputs: Sequence[str]
    tokenizer: str
    output: str
    kind: Kind | None = None  # None: recognised from the first records
    template: Literal["plain", "tokenizer"] = "plain"
    columns: Mapping[str, str] | None = None  # which column plays which part; None: recognised
    read: ReadOptions = field(default_factory=ReadOptions)
    processes: int = 1
    max_tokens: int | None = None
    shard_tokens: int = 64_000_000
    limit: int | None = None
    part: tuple[int, int] | None = None
    deduplicate: bool = False
    held_out: float = 0.0


def faults_of_settings(settings: PrepareSettings) -> Sequence[str]:
    """A message for each setting that is not allowed."""
    faults = [
        f"--{name.replace('_', '-')} is {value}, must be at least 1"
        for name in ("processes", "max_tokens", "shard_tokens", "limit")
        if (value := getattr(settings, name)) is not None and value < 1
    ]
    if not 0 <= settings.held_out <= LARGEST_HELD_OUT:
        faults.append(
            f"--held-out is {settings.held_out}, must be above 0 and at most {LARGEST_HELD_OUT}; "
            "give a fraction such as 0.005, or leave it out"
        )
    if Path(settings.output).name in ("", ".."):
        faults.append(
            f"--output is {settings.output}, must be a folder with a name: the folder of held-out"
            " documents is named after it"
        )
    if settings.read.split_on == "":
        faults.append("--split-on is empty; give the text that separates documents")
    part, num_parts = settings.part or (1, 1)
    if not 1 <= part <= num_parts:
        faults.append(
            f"--part is {part}/{num_parts}, must be from 1/{num_parts} to {num_parts}/{num_parts}; "
            "give each of these parts to one command"
        )
    if settings.limit is not None and num_parts > 1:
        faults.append(
            f"--limit is {settings.limit}, must be left out with --part: it counts the records of"
            " all parts; try a limit without --part"
        )
    return faults


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A prepared source, or the part of it that was prepared.

    `first_dropped` says for each reason where the first dropped document was read.
    """

    manifest: Manifest
    held_out: Manifest | None
    layout: Layout
    warnings: Sequence[str]
    first_dropped: Mapping[str, str]


def prepare(settings: PrepareSettings, report: ReportProgress = lambda *_: None) -> Prepared:
    """Tokenise the inputs into the output folder, which has a manifest only once it is complete.

    Work that was stopped continues at its last complete shard and ends with the same bytes. Raises
    BadInput where a setting is not allowed, the output holds anything else, an input is broken or
    not recognised, or no document is left; BigmixError where the disk is full.
    """
    output = Path(settings.output)
    faults = [*faults_of_settings(settings)] or [
        *faults_of_output(output, holds_out=settings.held_out > 0)
    ]
    if faults:
        raise BadInput(*faults)
    if settings.processes > 1:
        start_early()
    with _started(settings, output), _full_disk_reported(output):
        job, warnings = _job(settings, load_tokenizer(settings.tokenizer))
        progress = _prepare_part(settings, job, report)
        manifest, held_out = progress.source, progress.held_out
        first_dropped = progress.first_dropped
        if settings.part is None:
            if manifest.documents == 0:  # nothing to continue from
                file_of_part(output, 0, 1).unlink()
                raise nothing_left(manifest)
            merged = merge(output)
            manifest, held_out = merged.manifest, merged.held_out
            if settings.held_out and held_out is None:
                warnings = [*warnings, "no document is held out: there are too few of them"]
    return Prepared(
        manifest=manifest,
        held_out=held_out,
        layout=job.layout,
        warnings=[*warnings, *warnings_about_dropped(manifest)],
        first_dropped=first_dropped,
    )


@contextmanager
def _started(settings: PrepareSettings, output: Path) -> Iterator[None]:
    """The output folder, locked for this part; removed again where the job ends without a complete
    shard.
    """
    try:
        (output / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"output {output} cannot be created ({error.strerror}); give another --output"
        ) from error
    part, num_parts = settings.part or (1, 1)
    with locked_part(output, part - 1, num_parts):
        try:
            yield
        finally:
            # Other parts may be in progress in the folder.
            is_empty = not (output / MANIFEST).exists() and not any(output.glob(f"{PARTS}/*.json"))
            if settings.part is None and is_empty:
                remove_begun(output, holds_out=settings.held_out > 0)


@contextmanager
def _full_disk_reported(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BigmixError(
            f"{output} cannot be written: {error.strerror}; make room and run the same command"
            " again, it continues at its last complete shard"
        ) from error


def _job(settings: PrepareSettings, tokenizer: Tokenizer) -> tuple[Job, Sequence[str]]:
    """How the records become tokens, decided from the first records of all parts, and warnings.

    Raises BadInput where there is no record, or where nothing can be learned from the chats.
    """
    first = islice(read_records(settings.inputs, settings.read), settings.limit)
    records = list(islice(first, FIRST_RECORDS))
    columns = [record.columns for record in records if record.columns is not None]
    if not columns:
        raise BadInput(f"no records are in {', '.join(settings.inputs)}; give inputs with data")
    layout = recognise(columns, kind=settings.kind, columns=settings.columns)
    template, warnings = None, list[str]()
    documents = [document_of(record, layout) for record in columns]
    warnings.extend(_unknown(tokenizer, documents))
    if settings.limit is None:
        warnings.extend(_uncut(records, settings.read.split_on))
    if layout.kind == "chat":
        template = open_template(tokenizer, settings.template)
        chats = [each for each in documents if isinstance(each, Conversation)]
        samples = [encode_chat(tokenizer, template, chat) for chat in chats]
        warnings.extend(check_first(tokenizer, template, samples))
    job = Job(
        tokenizer=tokenizer,
        layout=layout,
        template=template,
        max_tokens=settings.max_tokens,
        read=settings.read,
    )
    return job, warnings


def _unknown(tokenizer: Tokenizer, documents: Sequence[Document]) -> Iterator[str]:
    """A warning where many tokens of the first documents are unknown."""
    if tokenizer.unk_id is None:
        return
    texts = [each.text for each in documents if isinstance(each, Text)]
    texts += [t["content"] for d in documents if isinstance(d, Conversation) for t in d.messages]
    sample = "\n".join(text[:_SAMPLED] for text in texts[:_SAMPLES])
    ids = tokenizer.encode([sample.encode(errors="replace").decode()])[0]
    part = float((ids == tokenizer.unk_id).mean()) if len(ids) else 0.0
    if part > MANY_UNKNOWN:
        yield (
            f"{part:.1%} of the tokens of the first documents are"
            f" {tokenizer.text_of(tokenizer.unk_id)!r}: the text that they replace is lost; use a"
            " tokenizer that falls back to bytes"
        )


def _uncut(records: Sequence[RawRecord], split_on: str | None) -> Iterator[str]:
    """A warning where --split-on splits nothing among the first records."""
    numbers = [record.number for record in records if format_of(record.file) in TEXT_SUFFIXES]
    if split_on is None or max(numbers, default=1) > 1:
        return
    where = f"{len(numbers)} text files" if numbers else "the inputs, of which none is a text file"
    yield (
        f"--split-on {split_on!r} splits nothing in {where}; give the text that separates"
        " documents, such as $'\\n\\n'"
    )


def _prepare_part(settings: PrepareSettings, job: Job, report: ReportProgress) -> Progress:
    """Prepare what is left of a part."""
    output = Path(settings.output)
    places = listing(settings.inputs)
    progress = _begun(settings, job, _identity(settings, job, places))
    if progress.whole:
        return progress
    pieces = divide(places, progress.parts)
    records = PartRecords(pieces[progress.part], settings.read, progress)
    seen = Seen()
    if settings.deduplicate:
        before = records_before(pieces, settings.read, progress)
        with closing(in_batches(hashes_of, job, before, settings.processes)) as batches:
            for hashes in batches:
                seen.add(hashes)
    _save_tokenizer(job.tokenizer, output)
    rules = Rules(
        shard_tokens=settings.shard_tokens,
        deduplicate=settings.deduplicate,
        held_out=settings.held_out,
    )
    writer = PartWriter(output, progress, rules, seen=seen, position=records.position)
    limit = None if settings.limit is None else settings.limit - progress.source.read
    report(writer.num_read, writer.num_tokens)
    try:
        left = islice(records, limit)
        with closing(in_batches(tokenise, job, left, settings.processes)) as batches:
            for batch in batches:
                writer.add(batch)
                report(writer.num_read, writer.num_tokens)
        return writer.save(whole=True)
    finally:
        writer.abort()


def _begun(settings: PrepareSettings, job: Job, identity: Mapping[str, str]) -> Progress:
    """The progress of the part: none yet, or that of an earlier command.

    Raises BadInput where the earlier command had other settings.
    """
    part, num_parts = settings.part or (1, 1)
    output = Path(settings.output)
    nothing = Manifest(
        kind=job.layout.kind,
        dtype=token_dtype(job.tokenizer.vocab_size),
        tokenizer=_tokenizer_entry(job.tokenizer),
        template=_template_entry(job.template),
        read=0,
        dropped={},
        documents=0,
        tokens=0,
        loss_tokens=0,
        loss_bytes=0,
        statistics=Statistics(),
        shards=ShardTable.of([]),
    )
    fresh = Progress(
        part=part - 1,
        parts=num_parts,
        identity=dict(identity),
        source=nothing,
        held_out=nothing if settings.held_out else None,
    )
    path = file_of_part(output, part - 1, num_parts)
    others = [
        each
        for each in (output / PARTS).glob("*.json")
        if not each.match(f"*-of-{num_parts:05d}.json")
    ]
    if others:
        raise BadInput(
            f"--part is {part}/{num_parts}, but {output} was begun in another number of parts"
            f" ({others[0].name}); give that number, or remove the folder and prepare again"
        )
    if not path.exists():
        return fresh
    begun = read_progress(path)
    faults = faults_of_identity(begun, fresh, output)
    if faults:
        raise BadInput(*faults)
    return begun


def _identity(
    settings: PrepareSettings, job: Job, places: Sequence[InputFile]
) -> Mapping[str, str]:
    """Everything that the tokens of a part depend on.

    `skip_bad_lines` is not part of it: it decides whether a bad line stops the command, and no
    token. Progress files hold these texts, so that a change of them is a change of the format.
    """
    files = [each for place in places for each in files_of(place.name)]
    text = json.dumps([[place.name for place in places], files])
    size = sum(each[1] for each in files)
    template = job.template
    return {
        "inputs": (
            f"{len(places)} files of {size:,} bytes (names, sizes and times of change: "
            f"{hashlib.sha256(text.encode()).hexdigest()[:12]})"
        ),
        "split-on": repr(settings.read.split_on),
        "tokenizer": f"{job.tokenizer.fingerprint[:16]}",
        "template": "none" if template is None else f"{template.name} {template.sha256[:16]}",
        "columns": job.layout.described(),
        "max-tokens": str(settings.max_tokens),
        "shard-tokens": str(settings.shard_tokens),
        "limit": str(settings.limit),
        "deduplicate": "yes" if settings.deduplicate else "no",
        "held-out": str(settings.held_out),
        "version of prepare": str(PREPARE_VERSION),
    }


def _save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write the tokenizer, unless another part has; several may try at the same time."""
    unfinished = output / f"{TOKENIZER_FOLDER}.tmp-{secrets.token_hex(4)}"
    try:
        if not (output / TOKENIZER_FOLDER).exists():
            tokenizer.save(unfinished)
            unfinished.rename(output / TOKENIZER_FOLDER)
    except OSError:
        if not (output / TOKENIZER_FOLDER).exists():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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


def warnings_about_dropped(manifest: Manifest) -> Sequence[str]:
    """A warning for each reason for which many documents were dropped; those that were held out do
    not count.
    """
    return [
        f"{count / manifest.read:.0%} of the documents were dropped as {reason}"
        for reason, count in manifest.dropped.items()
        if reason != "held_out" and count > MANY_DROPPED * manifest.read
    ]
