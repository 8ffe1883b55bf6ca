"""Divides inputs into the parts of a job, and reads the records of a part from where it stopped.

Only the names and sizes of the inputs decide what a part reads, so that it is the same on every
machine. Each record belongs to exactly one part.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import pyarrow.parquet

from bigmix.commands.prepare.progress import Progress
from bigmix.text.readers import (
    HUB,
    LINE_SUFFIXES,
    PARQUET_SUFFIXES,
    SAVED_DATASET,
    LineSpan,
    RawRecord,
    ReadOptions,
    format_of,
    opened,
    places_of,
    read_span,
)

PIECE_BYTES = 64 << 20
PIECES_PER_PART = 8  # at least, where inputs can be cut: the more, the more even are the parts

InputPiece = Sequence[LineSpan]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One input with its size in bytes, which is 0 for a dataset of the hub."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weighed:
    span: LineSpan
    size: int


def listing(inputs: Sequence[str]) -> Sequence[InputFile]:
    """The files, saved datasets and hub names that the inputs mean, with their sizes.

    Raises BadInput where one does not exist.
    """
    return [
        InputFile(name=name, size=sum(size for _, size, _ in files_of(name)))
        for name in places_of(inputs)
    ]


def files_of(place: str) -> Iterator[tuple[str, int, int]]:
    """Name, size in bytes and time of change in ns of each file of an input."""
    path = Path(place)
    if place.startswith(HUB):
        return
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        found = file.stat()
        yield str(file), found.st_size, found.st_mtime_ns


def divide(places: Sequence[InputFile], num_parts: int) -> Sequence[Sequence[InputPiece]]:
    """The pieces of each part, in the order of the inputs; a piece is what may have to be read
    again after a restart.

    Files, and spans of long ones, go to the parts in order, so that each part has the same number
    of bytes. An input that cannot be cut and is longer than a part is read by all parts, and each
    takes its own blocks of records.
    """
    total = sum(place.size for place in places)
    target = PIECE_BYTES
    if num_parts > 1:
        target = max(1, min(PIECE_BYTES, total // (PIECES_PER_PART * num_parts)))
    spans: list[list[_Weighed]] = [[] for _ in range(num_parts)]
    cut = [list(_cut(place, target, num_parts, total)) for place in places]
    shared = sum(each.size for found in cut for each in found if each.span.stripe is None)
    before = 0
    for each in (each for found in cut for each in found):
        if each.span.stripe is not None:
            spans[each.span.stripe[0]].append(each)
            continue
        middle = 2 * before + each.size
        spans[min(num_parts - 1, middle * num_parts // max(1, 2 * shared))].append(each)
        before += each.size
    return [list(_grouped(each, target)) for each in spans]


def _cut(place: InputFile, target: int, num_parts: int, total: int) -> Iterator[_Weighed]:
    """The spans of an input, of about `target` bytes each where it can be cut."""
    suffix = format_of(place.name)
    is_line = suffix in LINE_SUFFIXES and place.name.endswith(suffix or "")
    if is_line and place.size > target:
        yield from _cut_lines(place, target)
    elif suffix in PARQUET_SUFFIXES and place.size > target:
        yield from _cut_row_groups(place, target)
    elif (Path(place.name) / SAVED_DATASET).is_file() and place.size > target:
        yield from _cut_saved(place, target)
    elif num_parts > 1 and (place.name.startswith(HUB) or place.size > total // num_parts):
        for part in range(num_parts):
            span = LineSpan(place=place.name, stripe=(part, num_parts))
            yield _Weighed(span=span, size=place.size // num_parts)
    else:
        yield _Weighed(span=LineSpan(place=place.name), size=place.size)


def _cut_lines(place: InputFile, target: int) -> Iterator[_Weighed]:
    """Spans that begin where a line begins."""
    starts = [0]
    with opened(place.name) as file:
        for least in range(target, place.size, target):
            if least > starts[-1]:
                file.seek(least - 1)
                file.readline()
                starts.append(file.tell())
    ends = sorted({*starts, place.size})
    for start, stop in pairwise(ends):
        yield _Weighed(span=LineSpan(place=place.name, start=start, stop=stop), size=stop - start)


def _cut_row_groups(place: InputFile, target: int) -> Iterator[_Weighed]:
    with opened(place.name) as stream:
        metadata = pyarrow.parquet.read_metadata(stream)
        sizes = [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)]
    scale = place.size / max(1, sum(sizes))  # `sizes` are without compression
    start, size = 0, 0.0
    for stop, group in enumerate(sizes, 1):
        size += group * scale
        if size >= target or stop == len(sizes):
            yield _Weighed(span=LineSpan(place=place.name, start=start, stop=stop), size=int(size))
            start, size = stop, 0.0


def _cut_saved(place: InputFile, target: int) -> Iterator[_Weighed]:
    # datasets takes a second to import: only inputs that need it pay for that.
    import datasets

    num_records = len(datasets.load_from_disk(place.name))
    num_spans = -(-place.size // target)
    for index in range(num_spans):
        start = num_records * index // num_spans
        stop = num_records * (index + 1) // num_spans
        if stop > start:
            size = place.size // num_spans
            yield _Weighed(span=LineSpan(place=place.name, start=start, stop=stop), size=size)


def _grouped(spans: Sequence[_Weighed], target: int) -> Iterator[InputPiece]:
    """Pieces of neighbouring spans that together reach `target` bytes."""
    piece: list[LineSpan] = []
    size = 0
    for each in spans:
        piece.append(each.span)
        size += each.size
        if size >= target:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


class PartRecords:
    """The records of a part that are still to do, and its position after any number of records."""

    def __init__(self, pieces: Sequence[InputPiece], options: ReadOptions, begun: Progress) -> None:
        self._pieces = pieces
        self._options = options
        self._begun = begun
        # Records of the part before each piece that was opened; those of the first piece that are
        # done count as read from it.
        self._before = [begun.source.read - begun.row]

    def __iter__(self) -> Iterator[RawRecord]:
        num_done = self._begun.row
        for piece in self._pieces[self._begun.piece :]:
            count = 0
            for record in _records_of(piece, self._options):
                count += 1
                if count > num_done:
                    yield record
            num_done = 0
            self._before.append(self._before[-1] + count)

    def position(self, num_read: int) -> tuple[int, int]:
        """The piece, and the record in it, that come next once `num_read` records of the part are
        read.
        """
        at = bisect_right(self._before, num_read) - 1
        return self._begun.piece + at, num_read - self._before[at]


def _records_of(piece: InputPiece, options: ReadOptions) -> Iterator[RawRecord]:
    return (record for span in piece for record in read_span(span, options))


def records_before(
    pieces: Sequence[Sequence[InputPiece]], options: ReadOptions, begun: Progress
) -> Iterator[RawRecord]:
    """All records of earlier parts, and those of this part that are done."""
    own = pieces[begun.part]
    for piece in (*(p for part in pieces[: begun.part] for p in part), *own[: begun.piece]):
        yield from _records_of(piece, options)
    if begun.row:
        yield from islice(_records_of(own[begun.piece], options), begun.row)
