"""What a contestant of the loader benchmark gives: its batches, and the state to resume from.

A contestant is a module of `peers` with
    NOTE          what it does and what it does not do, in a line of the table
    PACKAGES      the distributions it needs, as PyPI names them
    PART_TOKENS   how many tokens of the corpus are enough to measure it
    write(corpus, folder)                                   the corpus in its own format
    open_reader(corpus, folder, *, workers, state) -> Reader
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from corpus import Batch

WHOLE_CORPUS = 1 << 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Batches without end; `state` is None for a contestant that cannot resume."""

    batches: Iterator[Batch]
    state: Callable[[], Any] | None


class Forever:
    """An iterable that is repeated without end, one epoch after the other."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self._items


class Mapped:
    """An iterable with a function applied to each item; unlike a generator it can be sent to a
    worker process.
    """

    def __init__(self, function: Callable[[Any], Any], items: Iterable[Any]) -> None:
        self._function, self._items = function, items

    def __iter__(self) -> Iterator[Any]:
        return map(self._function, self._items)
