"""Files, globs, folders and hub names go in, raw rows come out one by one, each with the place it is from.

Nothing is interpreted here: what a row means is decided in `recognise`. A file that ends early or holds what is not its
format is an error that names the place; nothing ends quietly.
"""

import codecs
import glob
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from bigmix.errors import BadInput

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
TAR_BLOCK = 512
BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, pyarrow.ArrowException)


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One row of an input: `index` counts from 1, lines in a JSON-lines file and rows elsewhere.

    `columns` is None for a line that is no JSON object, where the caller asked to go on after such lines.
    """

    file: str
    index: int
    columns: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """`split_on` cuts a text file into documents at each place where it stands; with None a file is one document."""

    split_on: str | None = None
    skip_bad_lines: bool = False


def read_rows(inputs: Sequence[str], options: ReadOptions) -> Iterator[RawRow]:
    """All rows of all inputs, in the order of the inputs, the files of a glob or folder sorted by name.

    Raises BadInput at once where an input is not there, and while reading where a file is broken.
    """
    places = [place for each in inputs for place in _places(each)]
    return (row for place in places for row in _read(place, options))


def _places(given: str) -> Sequence[str]:
    """The files behind one input; a hub name and a saved dataset stay what they are."""
    path = Path(given)
    if given.startswith(HUB) or (path / SAVED_DATASET).is_file():
        return [given]
    if (path / SAVED_SPLITS).is_file():
        splits = ", ".join(json.loads((path / SAVED_SPLITS).read_text("utf-8"))["splits"])
        raise BadInput(f"input {given} holds several splits ({splits}); give {given}/SPLIT")
    if path.is_file():
        if _format(given) is None:
            raise BadInput(f"input {given} is no file that can be read; allowed are {ALLOWED}")
        return [given]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(given, recursive=True))  # noqa: PTH207
    files = sorted(str(file) for file in found if file.is_file() and _format(str(file)))
    if not files:
        raise BadInput(
            f"input {given} is no file, glob or folder with files; allowed are {ALLOWED}, "
            f"or {HUB}NAME[:CONFIG][:SPLIT] for a dataset of the hub"
        )
    return files


def _format(name: str) -> str | None:
    """The suffix that decides how a file is read, without that of its compression."""
    path = Path(name)
    if path.suffix in PACKED_SUFFIXES:
        path = path.with_suffix("")
    known = TEXT_SUFFIXES + LINE_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES + TAR_SUFFIXES
    return path.suffix if path.suffix in known else None


def _read(place: str, options: ReadOptions) -> Iterator[RawRow]:
    suffix = _format(place)
    if place.startswith(HUB):
        rows: Iterable[Mapping[str, Any]] = _read_hub(place)
    elif Path(place).is_dir():
        rows = _read_saved(place)
    elif suffix in LINE_SUFFIXES:
        yield from _read_lines(place, options)
        return
    elif suffix in JSON_SUFFIXES:
        yield from _read_json(place, options)
        return
    elif suffix in PARQUET_SUFFIXES:
        rows = _read_parquet(place)
    elif suffix in TAR_SUFFIXES:
        rows = _read_tar(place)
    else:
        rows = ({"text": text} for text in _read_text(place, options.split_on))
    for index, columns in enumerate(rows, 1):
        yield RawRow(file=place, index=index, columns=columns)


@contextmanager
def _opened(place: str) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file; what is wrong with them is told with the place where it shows."""
    with Path(place).open("rb") as file:
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
    """The documents of a text file, in bounded memory where it is split; nothing but the mark is taken away."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held = ""
    with _opened(place) as stream:
        while chunk := stream.read(CHUNK):
            held += _decoded(place, decoder, chunk)
            if split_on is not None:
                *whole, held = held.split(split_on)
                yield from whole
        held += _decoded(place, decoder, b"", final=True)
    # The mark at the end of a file closes the last document, it does not open an empty one.
    if held or split_on is None:
        yield held


def _decoded(
    place: str, decoder: codecs.IncrementalDecoder, chunk: bytes, final: bool = False
) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{place} is not UTF-8 ({error.reason}); convert it, for instance with iconv"
        ) from error


def _read_lines(place: str, options: ReadOptions) -> Iterator[RawRow]:
    with _opened(place) as stream:
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            columns, fault = _parsed(line)
            if fault is not None and not options.skip_bad_lines:
                raise BadInput(
                    f"{place}, line {number}: {fault}; mend the line or give --skip-bad-lines "
                    "to drop and count such lines"
                )
            yield RawRow(file=place, index=number, columns=columns)


def _parsed(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    """A JSON object, or why the line is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        return None, f"not JSON ({error})"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object"
    return value, None


def _read_json(place: str, options: ReadOptions) -> Iterator[RawRow]:
    """A file that is one array of objects, or in spite of its name JSON lines."""
    with _opened(place) as stream:
        content = stream.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _read_lines(place, options)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise BadInput(f"{place}: not JSON ({error}); mend the file") from error
    for index, row in enumerate(rows, 1):
        if not isinstance(row, dict) and not options.skip_bad_lines:
            raise BadInput(
                f"{place}, element {index}: a JSON {type(row).__name__}, not an object; mend it or "
                "give --skip-bad-lines to drop and count such elements"
            )
        yield RawRow(file=place, index=index, columns=row if isinstance(row, dict) else None)


def _read_parquet(place: str) -> Iterator[Mapping[str, Any]]:
    with _opened(place) as stream, pyarrow.parquet.ParquetFile(stream) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _read_tar(place: str) -> Iterator[Mapping[str, Any]]:
    """The samples of a WebDataset tar: neighbouring members with one key, .txt as `text` and .json as columns."""
    key, columns = None, dict[str, Any]()
    with _opened(place) as stream:
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
                    f"{place} goes on behind the end of its archive at byte {tar.offset}; tars that were joined with "
                    "cat are read only when they are files of their own"
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


def _read_saved(place: str) -> Iterator[Mapping[str, Any]]:
    # As above: a second of import.
    import datasets

    try:
        yield from datasets.load_from_disk(place)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(f"{place} is no whole saved dataset ({error}); save it again") from error
