"""Reads the records of input files, saved datasets and datasets of the hub.

Inputs are files, globs, folders and hub names; the records come one by one, each with the file and
the line that it is from. What a record means is decided in `formats`; `raw_documents` does both. A
file that is truncated, or is not in the format that its name says, raises BadInput with the place:
no input ends early without an error.
"""

import codecs
import glob
import gzip
import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from bigmix.errors import BadInput
from bigmix.text.formats import Document, Kind, document_of, recognise

HUB = "hf:"
SAVED_DATASET = "state.json"  # in a folder that save_to_disk of datasets wrote
SAVED_SPLITS = "dataset_dict.json"
TEXT_SUFFIXES = (".txt",)
LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json",)
PARQUET_SUFFIXES = (".parquet",)
TAR_SUFFIXES = (".tar", ".tgz")
PACKED_SUFFIXES = (".gz", ".zst")
ALLOWED = ".txt, .jsonl, .json, .tar (each also .gz or .zst) and .parquet"
CHUNK = 1 << 20
TAR_BLOCK = 512
BLOCK_RECORDS = 256  # neighbours that stay in one part where all parts read an input
BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, pyarrow.ArrowException)
_FIRST_RECORDS = 256


class RawRecord(NamedTuple):
    """One record of an input, with the file that it is from.

    `number` counts lines in a JSON-lines file and records elsewhere, from 1. A line of a JSON-lines
    file stays unread in `line` until `parsed` reads it: as bytes it is cheap to skip and to send to
    another process. `columns` is None until then, and afterwards for a line that is no JSON object
    where such lines are skipped.
    """

    file: str
    number: int
    columns: Mapping[str, Any] | None
    line: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LineSpan:
    """One input (a file, a saved dataset or a hub name), or its part [start, stop).

    `start` and `stop` are bytes at the start of lines in a JSON-lines file, row groups in a parquet
    file, and records in a saved dataset. `stripe` = (index, count) keeps only the blocks of 256
    records whose number leaves the remainder `index` when divided by `count`.
    """

    place: str
    start: int = 0
    stop: int | None = None
    stripe: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How inputs are read.

    `split_on` separates the documents of a text file; with None the file is one document.
    `skip_bad_lines` gives records without columns for lines that are no JSON object, which
    otherwise raise BadInput.
    """

    split_on: str | None = None
    skip_bad_lines: bool = False


def raw_documents(
    inputs: Sequence[str],
    *,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Iterator[Document]:
    """The document of each of the first `limit` records, before any tokenizer is involved.

    The first 256 records decide how all are read. Raises BadInput where there is no record, or
    where no known layout fits them.
    """
    read = islice(read_records(inputs, ReadOptions()), limit)
    records = (record.columns for record in read if record.columns is not None)
    first = list(islice(records, _FIRST_RECORDS))
    if not first:
        raise BadInput(f"no records are in {', '.join(inputs)}; give inputs with text")
    layout = recognise(first, kind=kind, columns=columns)
    return (document_of(record, layout) for record in chain(first, records))


def read_records(inputs: Sequence[str], options: ReadOptions) -> Iterator[RawRecord]:
    """All records of all inputs, in the order of the inputs; the files of a glob or folder are
    sorted by name.

    Raises BadInput at once where an input does not exist, and while reading where a file is broken.
    """
    places = places_of(inputs)
    return (
        parsed(record, options)
        for place in places
        for record in read_span(LineSpan(place=place), options)
    )


def places_of(inputs: Sequence[str]) -> Sequence[str]:
    """The files, saved datasets and hub names that the inputs mean, in order.

    Raises BadInput where one does not exist or has a format that cannot be read.
    """
    return [place for each in inputs for place in _places(each)]


def _places(given: str) -> Sequence[str]:
    path = Path(given)
    if given.startswith(HUB) or (path / SAVED_DATASET).is_file():
        return [given]
    if (path / SAVED_SPLITS).is_file():
        splits = ", ".join(json.loads((path / SAVED_SPLITS).read_text("utf-8"))["splits"])
        raise BadInput(f"input {given} holds several splits ({splits}); give {given}/SPLIT")
    if path.is_file():
        if format_of(given) is None:
            raise BadInput(f"input {given} has a format that cannot be read; allowed are {ALLOWED}")
        return [given]
    matching = map(Path, glob.iglob(given, recursive=True))  # noqa: PTH207
    found = path.rglob("*") if path.is_dir() else matching
    files = sorted(str(file) for file in found if file.is_file() and format_of(str(file)))
    if not files:
        raise BadInput(
            f"input {given} is no file, glob or folder with files; allowed are {ALLOWED}, "
            f"or {HUB}NAME[:CONFIG][:SPLIT] for a dataset of the hub"
        )
    return files


def format_of(name: str) -> str | None:
    """The suffix that decides how a file is read, without the suffix of its compression; None where
    the file cannot be read.
    """
    path = Path(name)
    if path.suffix in PACKED_SUFFIXES:
        path = path.with_suffix("")
    known = TEXT_SUFFIXES + LINE_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES + TAR_SUFFIXES
    return path.suffix if path.suffix in known else None


def read_span(span: LineSpan, options: ReadOptions) -> Iterator[RawRecord]:
    """The records of a span; lines of JSON-lines files are left for `parsed` to read.

    Raises BadInput while reading where a file is broken.
    """
    records = _read(span, options)
    if span.stripe is None:
        return records
    index, count = span.stripe
    return (record for at, record in enumerate(records) if at // BLOCK_RECORDS % count == index)


def _read(span: LineSpan, options: ReadOptions) -> Iterator[RawRecord]:
    place, suffix = span.place, format_of(span.place)
    if place.startswith(HUB):
        records: Iterable[Mapping[str, Any]] = _read_hub(place)
    elif Path(place).is_dir():
        records = _read_saved(span)
    elif suffix in LINE_SUFFIXES:
        yield from _read_lines(span)
        return
    elif suffix in JSON_SUFFIXES:
        yield from _read_json(span, options)
        return
    elif suffix in PARQUET_SUFFIXES:
        records = _read_parquet(span)
    elif suffix in TAR_SUFFIXES:
        records = _read_tar(place)
    else:
        records = ({"text": text} for text in _read_text(place, options.split_on))
    unit = "row group" if suffix in PARQUET_SUFFIXES else "record"
    file = place if span.start == 0 else f"{place} from {unit} {span.start}"
    for number, columns in enumerate(records, 1):
        yield RawRecord(file=file, number=number, columns=columns)


@contextmanager
def opened(place: str) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file.

    Raises BadInput where the file cannot be opened, and, with the byte, where it is broken.
    """
    try:
        raw = Path(place).open("rb")  # noqa: SIM115
    except OSError as error:
        raise BadInput(
            f"{place} cannot be opened ({error.strerror}); make it readable, or give another file"
        ) from error
    with raw as file:
        stream: IO[bytes] = file
        if place.endswith((".gz", ".tgz")):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif place.endswith(".zst"):
            # pyarrow reads several frames in one file, and raises where the last one is truncated.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        try:
            yield stream
        except BROKEN as error:
            raise BadInput(
                f"{place} is broken at or before byte {file.tell()} ({error}); "
                "fetch or write the file again"
            ) from error


def _read_text(place: str, split_on: str | None) -> Iterator[str]:
    """The documents of a text file, in bounded memory where it is split; only the separators are
    removed.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, at = "", 0
    with opened(place) as stream:
        while chunk := stream.read(CHUNK):
            held += _decoded(place, decoder, chunk, at=at)
            at += len(chunk)
            if split_on is not None:
                *ended, held = held.split(split_on)
                yield from ended
        held += _decoded(place, decoder, b"", at=at, final=True)
    # A separator at the end of a file ends the last document and does not begin an empty one.
    if held or split_on is None:
        yield held


def _decoded(
    place: str, decoder: codecs.IncrementalDecoder, chunk: bytes, *, at: int, final: bool = False
) -> str:
    """The text of the bytes that begin at byte `at`, with those that the decoder has kept."""
    num_kept = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{place} is not UTF-8 ({error.reason} at byte {at - num_kept + error.start:,});"
            " convert it, for instance with iconv"
        ) from error


def _read_lines(span: LineSpan) -> Iterator[RawRecord]:
    file = span.place if span.start == 0 else f"{span.place} from byte {span.start}"
    with opened(span.place) as stream:
        if span.start:
            stream.seek(span.start)
        bytes_left = math.inf if span.stop is None else span.stop - span.start
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield RawRecord(file=file, number=number, columns=None, line=line)
            bytes_left -= len(line)
            if bytes_left <= 0:
                return


def parsed(record: RawRecord, options: ReadOptions) -> RawRecord:
    """The record with its line read, where it has one.

    Raises BadInput where the line holds no JSON object and such lines are not to be skipped.
    """
    if record.line is None:
        return record
    columns, fault = _parsed(record.line)
    if fault is not None and not options.skip_bad_lines:
        raise BadInput(
            f"{record.file}, line {record.number}: {fault}; correct the line, or give"
            " --skip-bad-lines to drop and count such lines"
        )
    return RawRecord(file=record.file, number=record.number, columns=columns)


def _parsed(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    """The JSON object of a line, or why there is none."""
    try:
        # The same as the codec utf-8-sig, in a fifth of its time.
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    # JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object"
    return value, None


def _read_json(span: LineSpan, options: ReadOptions) -> Iterator[RawRecord]:
    """A file that holds one array of objects, or JSON lines in spite of its name."""
    place = span.place
    with opened(place) as stream:
        content = stream.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_lines(span)
        return
    try:
        elements = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: not JSON ({error}); correct the file") from error
    for number, element in enumerate(elements, 1):
        columns = element if isinstance(element, dict) else None
        if columns is None and not options.skip_bad_lines:
            raise BadInput(
                f"{place}, element {number}: a JSON {type(element).__name__}, not an object;"
                " correct it, or give --skip-bad-lines to drop and count such elements"
            )
        yield RawRecord(file=place, number=number, columns=columns)


def _read_parquet(span: LineSpan) -> Iterator[Mapping[str, Any]]:
    with opened(span.place) as stream, pyarrow.parquet.ParquetFile(stream) as file:
        stop = file.num_row_groups if span.stop is None else span.stop
        for batch in file.iter_batches(BLOCK_RECORDS, row_groups=range(span.start, stop)):
            try:
                records = batch.to_pylist()
            except (OverflowError, ValueError) as error:
                raise BadInput(
                    f"{span.place} holds a value that Python cannot represent ({error}); convert or"
                    " drop its column"
                ) from error
            yield from records


def _read_hub(place: str) -> Iterator[Mapping[str, Any]]:
    # datasets takes a second to import: only inputs that need it pay for that.
    import datasets

    name, config, split = ([*place.removeprefix(HUB).split(":"), "", ""])[:3]
    try:
        yield from datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(
            f"{place} cannot be read with datasets ({error}); spell it {HUB}NAME[:CONFIG][:SPLIT], "
            f"as in {HUB}openai/gsm8k:main:train"
        ) from error


def _read_saved(span: LineSpan) -> Iterator[Mapping[str, Any]]:
    # As above: a second of import.
    import datasets

    try:
        saved = datasets.load_from_disk(span.place)
        stop = len(saved) if span.stop is None else span.stop
        yield from saved.select(range(span.start, stop))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{span.place} is not a complete saved dataset ({error}); save it again"
        ) from error


def _read_tar(place: str) -> Iterator[Mapping[str, Any]]:
    """The samples of a WebDataset tar: neighbouring members with the same key are one record, .txt
    is its `text` and .json its other columns.
    """
    with opened(place) as stream:
        # tarfile checks the members that it skips only in a file that can seek.
        source = stream if stream.seekable() else io.BytesIO(stream.read())
        key, columns = None, dict[str, Any]()
        for name, content in _members(place, source):
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if key is not None and key != (folder, stem):
                yield columns
                columns = {}
            key = (folder, stem)
            columns |= _member_columns(place, name, suffix, content)
        if key is not None:
            yield columns


def _members(place: str, source: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar."""
    with tarfile.open(fileobj=source, mode="r:") as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isfile() else None
            if content is not None:
                yield info.name, content.read()
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
        # tarfile takes a truncated or damaged header for the end of the archive.
        source.seek(tar.offset)
        if source.read(TAR_BLOCK) != bytes(TAR_BLOCK):
            raise BadInput(
                f"{place} is truncated: no header and no end of archive at byte {tar.offset}; "
                "fetch or write the file again"
            )
        # Reading to the end also makes a compressed file check its own checksum.
        while rest := source.read(CHUNK):
            if rest.count(0) != len(rest):
                raise BadInput(
                    f"{place} has data after the end of its archive at byte {tar.offset}; give tars"
                    " that were joined with cat as separate files"
                )


def _member_columns(place: str, name: str, suffix: str, content: bytes) -> Mapping[str, Any]:
    try:
        if suffix == "txt":
            return {"text": content.decode("utf-8-sig")}
        if suffix == "json":
            value = json.loads(content.decode("utf-8-sig"))
            return value if isinstance(value, dict) else {}
    except ValueError as error:
        raise BadInput(
            f"{place}, member {name}: not {suffix} in UTF-8 ({error}); correct it"
        ) from error
    return {}
