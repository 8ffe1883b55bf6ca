"""Files, globs, folders and hub names go in, raw rows come out one by one, each with the place it
is from.

Nothing is interpreted here: what a row means is decided in `recognise`. A file that ends early or
holds what is not its format is an error that names the place; nothing ends quietly.

The bytes of a WebDataset tar go in, its samples come out as rows; an archive that is cut short is
an error.

Inputs go in, their documents come out as recognised, before any tokenizer has seen them.
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

TAR_BLOCK = 512


def read_tar(place: str, stream: IO[bytes]) -> Iterator[Mapping[str, Any]]:
    """The samples of a tar: neighbouring members with one key, .txt as `text` and .json as
    columns.
    """
    key, columns = None, dict[str, Any]()
    # The tar is read through a file that can seek; only then does tarfile check what it skips.
    source = stream if stream.seekable() else io.BytesIO(stream.read())
    for member in _members(place, source):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if key is not None and key != (folder, stem):
            yield columns
            columns = {}
        key = (folder, stem)
        columns |= _member_columns(place, member.name, suffix, member.content)
    if key is not None:
        yield columns


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    name: str
    content: bytes


def _members(place: str, source: IO[bytes]) -> Iterator[_Member]:
    with tarfile.open(fileobj=source, mode="r:") as tar:
        for info in tar:
            content = tar.extractfile(info) if info.isfile() else None
            if content is not None:
                yield _Member(name=info.name, content=content.read())
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        # tarfile takes a cut or damaged header for the end of the archive.
        source.seek(tar.offset)
        if source.read(TAR_BLOCK) != bytes(TAR_BLOCK):
            raise BadInput(
                f"{place} is cut short: no header and no end of archive at byte {tar.offset}; "
                "fetch or write the file again"
            )
        # Reading on to the end also makes a compressed file check its own checksum.
        while rest := source.read(CHUNK):
            if rest.count(0) != len(rest):
                raise BadInput(
                    f"{place} goes on behind the end of its archive at byte {tar.offset}; tars that"
                    " were joined with cat are read only when they are files of their own"
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
            f"{place}, member {name}: not {suffix} in UTF-8 ({error}); mend it"
        ) from error
    return {}


HUB = "hf:"
SAVED_DATASET = "state.json"  # in a folder that datasets' save_to_disk wrote
SAVED_SPLITS = "dataset_dict.json"
TEXT_SUFFIXES = (".txt",)
LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json",)
PARQUET_SUFFIXES = (".parquet",)
TAR_SUFFIXES = (".tar", ".tgz")
PACKED_SUFFIXES = (".gz", ".zst")
ALLOWED = ".txt, .jsonl, .json, .tar (each also .gz or .zst) and .parquet"
CHUNK = 1 << 20
BLOCK_ROWS = 256  # rows that go together where an input is dealt out
BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, pyarrow.ArrowException)


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
    """A stretch of one input, which is a file, a saved dataset or a hub name: all of it, or [start,
    stop).

    These are bytes from the start of a line to the start of another in a JSON-lines file, row
    groups in a parquet file, and rows in a saved dataset. `dealt` = (index, count) takes the blocks
    of 256 rows whose number leaves `index` when divided by `count`.
    """

    place: str
    start: int = 0
    stop: int | None = None
    dealt: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """`split_on` cuts a text file into documents at each place where it stands; with None a file is
    one document.
    """

    split_on: str | None = None
    skip_bad_lines: bool = False


def read_records(inputs: Sequence[str], options: ReadOptions) -> Iterator[RawRecord]:
    """All rows of all inputs, in the order of the inputs, the files of a glob or folder sorted by
    name.

    Raises BadInput at once where an input is not there, and while reading where a file is broken.
    """
    places = places_of(inputs)
    return (
        parsed(row, options)
        for place in places
        for row in read_span(LineSpan(place=place), options)
    )


def places_of(inputs: Sequence[str]) -> Sequence[str]:
    """The files, saved datasets and hub names behind the inputs, in order; BadInput where one is
    not there.
    """
    return [place for each in inputs for place in _places(each)]


def _places(given: str) -> Sequence[str]:
    """The files behind one input; a hub name and a saved dataset stay what they are."""
    path = Path(given)
    if given.startswith(HUB) or (path / SAVED_DATASET).is_file():
        return [given]
    if (path / SAVED_SPLITS).is_file():
        splits = ", ".join(json.loads((path / SAVED_SPLITS).read_text("utf-8"))["splits"])
        raise BadInput(f"input {given} holds several splits ({splits}); give {given}/SPLIT")
    if path.is_file():
        if format_of(given) is None:
            raise BadInput(f"input {given} is no file that can be read; allowed are {ALLOWED}")
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
    """The suffix that decides how a file is read, without that of its compression; None where it
    cannot be.
    """
    path = Path(name)
    if path.suffix in PACKED_SUFFIXES:
        path = path.with_suffix("")
    known = TEXT_SUFFIXES + LINE_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES + TAR_SUFFIXES
    return path.suffix if path.suffix in known else None


def read_span(span: LineSpan, options: ReadOptions) -> Iterator[RawRecord]:
    """The rows of a span; `parsed` makes rows of lines.

    Raises BadInput while reading where a file is broken.
    """
    rows = _read(span, options)
    if span.dealt is None:
        return rows
    index, parts = span.dealt
    return (row for at, row in enumerate(rows) if at // BLOCK_ROWS % parts == index)


def _read(span: LineSpan, options: ReadOptions) -> Iterator[RawRecord]:
    place, suffix = span.place, format_of(span.place)
    if place.startswith(HUB):
        rows: Iterable[Mapping[str, Any]] = _read_hub(place)
    elif Path(place).is_dir():
        rows = _read_saved(span)
    elif suffix in LINE_SUFFIXES:
        yield from _read_lines(span)
        return
    elif suffix in JSON_SUFFIXES:
        yield from _read_json(span, options)
        return
    elif suffix in PARQUET_SUFFIXES:
        rows = _read_parquet(span)
    elif suffix in TAR_SUFFIXES:
        rows = _read_tar(place)
    else:
        rows = ({"text": text} for text in _read_text(place, options.split_on))
    unit = "row group" if suffix in PARQUET_SUFFIXES else "row"
    file = place if span.start == 0 else f"{place} from {unit} {span.start}"
    for number, columns in enumerate(rows, 1):
        yield RawRecord(file=file, number=number, columns=columns)


@contextmanager
def opened(place: str) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; what is wrong with them is told with the place where it
    shows.
    """
    try:
        raw = Path(place).open("rb")  # noqa: SIM115
    except OSError as error:
        raise BadInput(
            f"{place} cannot be opened ({error.strerror}); see to it that it may be read"
        ) from error
    with raw as file:
        stream: IO[bytes] = file
        if place.endswith((".gz", ".tgz")):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif place.endswith(".zst"):
            # pyarrow unpacks several frames in one file, and raises where the last one is cut.
            stream = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        try:
            yield stream
        except BROKEN as error:
            raise BadInput(
                f"{place} is broken at or before byte {file.tell()} ({error}); "
                "fetch or write the file again"
            ) from error


def _read_text(place: str, split_on: str | None) -> Iterator[str]:
    """The documents of a text file, in bounded memory where it is split; nothing but the mark is
    taken away.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, at = "", 0
    with opened(place) as stream:
        while chunk := stream.read(CHUNK):
            held += _decoded(place, decoder, chunk, at=at)
            at += len(chunk)
            if split_on is not None:
                *whole, held = held.split(split_on)
                yield from whole
        held += _decoded(place, decoder, b"", at=at, final=True)
    # The mark at the end of a file closes the last document, it does not open an empty one.
    if held or split_on is None:
        yield held


def _decoded(
    place: str, decoder: codecs.IncrementalDecoder, chunk: bytes, *, at: int, final: bool = False
) -> str:
    """The text of bytes that begin `at`, with what the decoder has kept of those before."""
    kept = len(decoder.getstate()[0])
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{place} is not UTF-8 ({error.reason} at byte {at - kept + error.start:,}); convert"
            " it, for instance with iconv"
        ) from error


def _read_lines(span: LineSpan) -> Iterator[RawRecord]:
    file = span.place if span.start == 0 else f"{span.place} from byte {span.start}"
    with opened(span.place) as stream:
        if span.start:
            stream.seek(span.start)
        left = math.inf if span.stop is None else span.stop - span.start
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield RawRecord(file=file, number=number, columns=None, line=line)
            left -= len(line)
            if left <= 0:
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
            f"{record.file}, line {record.number}: {fault}; mend the line or give --skip-bad-lines "
            "to drop and count such lines"
        )
    return RawRecord(file=record.file, number=record.number, columns=columns)


def _parsed(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    """A JSON object, or why the line is none."""
    try:
        # What the codec utf-8-sig does, at a fifth of its time.
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    # JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object"
    return value, None


def _read_json(span: LineSpan, options: ReadOptions) -> Iterator[RawRecord]:
    """A file that is one array of objects, or in spite of its name JSON lines."""
    place = span.place
    with opened(place) as stream:
        content = stream.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_lines(span)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: not JSON ({error}); mend the file") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) and not options.skip_bad_lines:
            raise BadInput(
                f"{place}, element {number}: a JSON {type(row).__name__}, not an object; mend it or"
                " give --skip-bad-lines to drop and count such elements"
            )
        yield RawRecord(file=place, number=number, columns=row if isinstance(row, dict) else None)


def _read_parquet(span: LineSpan) -> Iterator[Mapping[str, Any]]:
    with opened(span.place) as stream, pyarrow.parquet.ParquetFile(stream) as file:
        stop = file.num_row_groups if span.stop is None else span.stop
        for batch in file.iter_batches(BLOCK_ROWS, row_groups=range(span.start, stop)):
            try:
                rows = batch.to_pylist()
            except (OverflowError, ValueError) as error:
                raise BadInput(
                    f"{span.place} holds a value that Python has none for ({error}); convert or"
                    " drop its column"
                ) from error
            yield from rows


def _read_tar(place: str) -> Iterator[Mapping[str, Any]]:
    with opened(place) as stream:
        yield from read_tar(place, stream)


def _read_hub(place: str) -> Iterator[Mapping[str, Any]]:
    # datasets takes a second to import, which only those pay who read with it.
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
        whole = datasets.load_from_disk(span.place)
        stop = len(whole) if span.stop is None else span.stop
        yield from whole.select(range(span.start, stop))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{span.place} is no whole saved dataset ({error}); save it again"
        ) from error


_FIRST_ROWS = 256


def raw_documents(
    inputs: Sequence[str],
    *,
    kind: Kind | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Iterator[Document]:
    """The document of each of the first `limit` rows; the first 256 rows decide how they are read.

    Raises BadInput where there is no row, or where no known layout fits them.
    """
    read = islice(read_records(inputs, ReadOptions()), limit)
    rows = (row.columns for row in read if row.columns is not None)
    first = list(islice(rows, _FIRST_ROWS))
    if not first:
        raise BadInput(f"no rows are in {', '.join(inputs)}; give inputs with text")
    layout = recognise(first, kind=kind, columns=columns)
    return (document_of(row, layout) for row in chain(first, rows))
