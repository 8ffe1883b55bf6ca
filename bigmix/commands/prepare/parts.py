"""Inputs and a number of parts go in, the stretches of input that each part reads come out, the
same on every machine.

Nothing but the listing of the inputs decides. Each row belongs to exactly one part.

The pieces of a part and how far it is go in, the rows that are left come out.
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
PIECES_PER_PART = 8  # at least, where inputs can be cut: how evenly the bytes are shared out

InputPiece = Sequence[LineSpan]


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """One input with its size; a dataset of the hub has none."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weighed:
    span: LineSpan
    size: int


def listing(inputs: Sequence[str]) -> Sequence[InputFile]:
    """The places behind the inputs; BadInput where one is not there."""
    return [
        InputFile(name=name, size=sum(size for _, size, _ in files_of(name)))
        for name in places_of(inputs)
    ]


def files_of(place: str) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and time of change (in ns) of each file of a place."""
    path = Path(place)
    if place.startswith(HUB):
        return
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        found = file.stat()
        yield str(file), found.st_size, found.st_mtime_ns


def share_out(places: Sequence[InputFile], parts: int) -> Sequence[Sequence[InputPiece]]:
    """The pieces of each part, in the order of the inputs; a piece is about as much as is read
    between two restarts.

    Whole files and stretches of long ones go to the parts in order, so that each part has the same
    number of bytes. An input that cannot be cut and is longer than the share of a part is read by
    all parts: each takes its blocks of rows.
    """
    total = sum(place.size for place in places)
    target = PIECE_BYTES
    if parts > 1:
        target = max(1, min(PIECE_BYTES, total // (PIECES_PER_PART * parts)))
    spans: list[list[_Weighed]] = [[] for _ in range(parts)]
    cut = [list(_cut(place, target, parts, total)) for place in places]
    shared = sum(each.size for found in cut for each in found if each.span.stripe is None)
    before = 0
    for each in (each for found in cut for each in found):
        if each.span.stripe is not None:
            spans[each.span.stripe[0]].append(each)
            continue
        middle = 2 * before + each.size
        spans[min(parts - 1, middle * parts // max(1, 2 * shared))].append(each)
        before += each.size
    return [list(_grouped(each, target)) for each in spans]


def _cut(place: InputFile, target: int, parts: int, total: int) -> Iterator[_Weighed]:
    suffix = format_of(place.name)
    is_line = suffix in LINE_SUFFIXES and place.name.endswith(suffix or "")
    if is_line and place.size > target:
        yield from _cut_lines(place, target)
    elif suffix in PARQUET_SUFFIXES and place.size > target:
        yield from _cut_row_groups(place, target)
    elif (Path(place.name) / SAVED_DATASET).is_file() and place.size > target:
        yield from _cut_saved(place, target)
    elif parts > 1 and (place.name.startswith(HUB) or place.size > total // parts):
        for part in range(parts):
            span = LineSpan(place=place.name, stripe=(part, parts))
            yield _Weighed(span=span, size=place.size // parts)
    else:
        yield _Weighed(span=LineSpan(place=place.name), size=place.size)


def _cut_lines(place: InputFile, target: int) -> Iterator[_Weighed]:
    """Stretches that begin where a line begins."""
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
    scale = place.size / max(1, sum(sizes))  # sizes are those before compression
    start, size = 0, 0.0
    for stop, group in enumerate(sizes, 1):
        size += group * scale
        if size >= target or stop == len(sizes):
            yield _Weighed(span=LineSpan(place=place.name, start=start, stop=stop), size=int(size))
            start, size = stop, 0.0


def _cut_saved(place: InputFile, target: int) -> Iterator[_Weighed]:
    # datasets takes a second to import, which only those pay who read with it.
    import datasets

    rows = len(datasets.load_from_disk(place.name))
    count = -(-place.size // target)
    for index in range(count):
        start, stop = rows * index // count, rows * (index + 1) // count
        if stop > start:
            size = place.size // count
            yield _Weighed(span=LineSpan(place=place.name, start=start, stop=stop), size=size)


def _grouped(spans: Sequence[_Weighed], target: int) -> Iterator[InputPiece]:
    """Neighbours together until they reach the size of a piece."""
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


class PartRows:
    """The rows of a part from where it stands, and where it stands after so many rows."""

    def __init__(self, pieces: Sequence[InputPiece], options: ReadOptions, begun: Progress) -> None:
        self._pieces = pieces
        self._options = options
        self._begun = begun
        # Rows of the part before each piece that was opened; the first as if its rows had all been
        # read now.
        self._before = [begun.source.read - begun.row]

    def __iter__(self) -> Iterator[RawRecord]:
        skipped = self._begun.row
        for piece in self._pieces[self._begun.piece :]:
            count = 0
            for row in _rows_of(piece, self._options):
                count += 1
                if count > skipped:
                    yield row
            skipped = 0
            self._before.append(self._before[-1] + count)

    def position(self, read: int) -> tuple[int, int]:
        """The piece and the row in it before which the part stands when it has read so many
        rows.
        """
        at = bisect_right(self._before, read) - 1
        return self._begun.piece + at, read - self._before[at]


def _rows_of(piece: InputPiece, options: ReadOptions) -> Iterator[RawRecord]:
    return (row for span in piece for row in read_span(span, options))


def rows_before(
    pieces: Sequence[Sequence[InputPiece]], options: ReadOptions, begun: Progress
) -> Iterator[RawRecord]:
    """All rows of earlier parts, and those of this part that are done."""
    own = pieces[begun.part]
    for piece in (*(p for part in pieces[: begun.part] for p in part), *own[: begun.piece]):
        yield from _rows_of(piece, options)
    if begun.row:
        yield from islice(_rows_of(own[begun.piece], options), begun.row)
