"""The pieces of a part and how far it is go in, the rows that are left come out."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

from bigmix.commands.prepare.parts import Piece
from bigmix.commands.prepare.progress import Progress
from bigmix.text.readers import RawLine, RawRow, ReadOptions, read_span


class PartRows:
    """The rows of a part from where it stands, and where it stands after so many rows."""

    def __init__(self, pieces: Sequence[Piece], options: ReadOptions, begun: Progress) -> None:
        self._pieces = pieces
        self._options = options
        self._begun = begun
        # Rows of the part before each piece that was opened; the first as if its rows had all been read now.
        self._before = [begun.source.read - begun.row]

    def __iter__(self) -> Iterator[RawRow | RawLine]:
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
        """The piece and the row in it before which the part stands when it has read so many rows."""
        at = bisect_right(self._before, read) - 1
        return self._begun.piece + at, read - self._before[at]


def _rows_of(piece: Piece, options: ReadOptions) -> Iterator[RawRow | RawLine]:
    return (row for span in piece for row in read_span(span, options))


def rows_before(
    pieces: Sequence[Sequence[Piece]], options: ReadOptions, begun: Progress
) -> Iterator[RawRow | RawLine]:
    """All rows of earlier parts, and those of this part that are done."""
    own = pieces[begun.part]
    for piece in (*(p for part in pieces[: begun.part] for p in part), *own[: begun.piece]):
        yield from _rows_of(piece, options)
    if begun.row:
        yield from islice(_rows_of(own[begun.piece], options), begun.row)
