"""The mixture: which source each row of the run is drawn from, for any row and without a random
draw.

The n-th row of a source s is due in the window in which the target of s, the sum of its shares over
the rows so far, lies between n and n + 1. Giving each row to the open window that closes first
keeps every prefix within one row of every share (proportionate fairness: Baruah, Cohen, Plaxton,
Varvel, "Proportionate progress", Algorithmica 1996). The proof needs only targets that grow and sum
to the number of rows, so it holds while shares change.

A far row is found without giving away all rows before it: at any earlier row, the windows that
close first may be assumed to be done. Two orders that assume so differ at most in windows that were
open there. The windows that close later wait in both orders for the same rows, so that the orders
are the same from the row on at which the last window that was open there has closed.
"""

from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np

from bigmix.data.shares import Shares, ShareValue, ShareWeights, shares_of
from bigmix.types import Ints

BLOCK_ROWS = 1024
NEVER = 1 << 62
_FIRST_LOOK_BACK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureRows:
    """Where consecutive rows are drawn from: `sources_R` are indices into the names of the mixture,
    `indices_R` count the rows of that source over all its epochs.
    """

    sources_R: Ints
    indices_R: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Where a block of rows is drawn from, and how many rows each source has before it."""

    sources_R: Ints
    indices_R: Ints
    before: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cycle:
    """From row `begin` on the order of sources repeats every `num_rows` rows, in which each source
    has `counts` rows.
    """

    begin: int
    num_rows: int
    counts: tuple[int, ...]


class Mixture:
    """Which source each row of the run is drawn from: a function of the shares and the row alone.

    Shares are constant within a step of `rows_per_step` rows. To find a far row takes as long as to
    give away the rows of the longest window that is open before it, 1 / (smallest share); while a
    source rests at share 0, those for which it has rested, at most a few million.
    """

    def __init__(
        self,
        shares: Shares | Mapping[str, ShareValue],
        rows_per_step: int,
        whole_rows: Mapping[str, int] | None = None,
    ) -> None:
        """`whole_rows` are numbers of rows by source, in whose ratio rows are drawn instead of in
        that of the shares, where they are given.
        """
        self.shares = shares if isinstance(shares, Shares) else shares_of(shares)
        self.names = self.shares.names
        self.rows_per_step = rows_per_step
        weights = self.shares.weights() if whole_rows is None else _constant(whole_rows, self.names)
        self._unit = weights.unit
        self._first_rows: Sequence[int] = array(
            "q", [step * rows_per_step for step in weights.first_steps]
        )
        self._weights: list[list[int]] = [
            list(column) for column in zip(*weights.weights, strict=True)
        ]
        self._reached = [self._sums(column) for column in self._weights]
        self._cycle = self._find_cycle()
        self._block = lru_cache(maxsize=256)(self._make_block)

    def rows(self, start: int, stop: int) -> MixtureRows:
        """Where the rows [start, stop) of the run are drawn from."""
        sources, indices = [], []
        while start < stop:
            turns, row = self._in_first_cycle(start)
            block, offset = divmod(row, BLOCK_ROWS)
            end = min(offset + stop - start, BLOCK_ROWS)
            if self._cycle is not None:
                cycle_ends = self._cycle.begin + self._cycle.num_rows - block * BLOCK_ROWS
                end = min(end, cycle_ends) if row >= self._cycle.begin else end
            found = self._block(block)
            sources.append(found.sources_R[offset:end])
            indices.append(found.indices_R[offset:end])
            if turns:
                assert self._cycle is not None
                indices[-1] = indices[-1] + turns * np.array(self._cycle.counts)[sources[-1]]
            start += end - offset
        return MixtureRows(sources_R=_joined(sources), indices_R=_joined(indices))

    def counts(self, row: int) -> dict[str, int]:
        """How many of the rows before `row` each source has."""
        turns, within = self._in_first_cycle(row)
        block, offset = divmod(within, BLOCK_ROWS)
        found = self._block(block)
        inside = np.bincount(found.sources_R[:offset], minlength=len(self.names)).tolist()
        counts = [before + more for before, more in zip(found.before, inside, strict=True)]
        if turns:
            assert self._cycle is not None
            counts = [c + turns * n for c, n in zip(counts, self._cycle.counts, strict=True)]
        return dict(zip(self.names, counts, strict=True))

    def _sums(self, weights: list[int]) -> list[int]:
        """The target of a source at the beginning of each piece, in units."""
        sums = [0]
        for piece in range(1, len(self._first_rows)):
            rows = self._first_rows[piece] - self._first_rows[piece - 1]
            sums.append(sums[-1] + rows * weights[piece - 1])
        return sums

    def _find_cycle(self) -> _Cycle | None:
        """The cycle of the last piece: its order repeats once all targets have grown by whole
        rows.
        """
        weights = [column[-1] for column in self._weights]
        if sum(weights) == 0:
            return None
        num_rows = self._unit // gcd(*weights)
        resting = sum(weight == 0 for weight in weights)
        # A source that rests for ever has at most one window open, whose row comes in one of these
        # turns or never.
        turns = 0 if len(self._first_rows) == 1 else 2 * resting + 2
        begin = self._first_rows[-1] + turns * num_rows
        num_rows *= -(-4 * BLOCK_ROWS // num_rows)
        counts = tuple(weight * num_rows // self._unit for weight in weights)
        return _Cycle(begin=begin, num_rows=num_rows, counts=counts)

    def _in_first_cycle(self, row: int) -> tuple[int, int]:
        if self._cycle is None or row < self._cycle.begin:
            return 0, row
        turns, within = divmod(row - self._cycle.begin, self._cycle.num_rows)
        return turns, self._cycle.begin + within

    def _target(self, source: int, row: int) -> int:
        """The sum of a source's shares over the rows before `row`, in units."""
        piece = bisect_right(self._first_rows, row) - 1
        inside = row - self._first_rows[piece]
        return self._reached[source][piece] + inside * self._weights[source][piece]

    def _when(self, source: int, units: int) -> int:
        """The first row before which a source's target is at least `units` (above 0)."""
        reached, weights = self._reached[source], self._weights[source]
        piece = bisect_right(reached, units - 1) - 1
        weight = weights[piece]
        if not weight:
            return NEVER
        return self._first_rows[piece] - (reached[piece] - units) // weight

    def _counts_at(self, row: int) -> list[int]:
        """How many of the rows before `row` each source has, found from the nearest earlier row
        from which they are certain.
        """
        back = _FIRST_LOOK_BACK
        while back < row:
            counts, last_closes = self._guess(row - back)
            if last_closes < row:
                return self._run(counts, row - back, row)[0]
            back *= 4
        return self._run([0] * len(self.names), 0, row)[0]

    def _guess(self, row: int) -> tuple[list[int], int]:
        """The counts before `row` where the open windows that close first are assumed to be done,
        and the row at which the last open window closes.
        """
        targets = [self._target(source, row) for source in range(len(self.names))]
        counts = [target // self._unit for target in targets]
        windows = sorted(
            (self._closes(source, counts[source]), source)
            for source, target in enumerate(targets)
            if target % self._unit
        )
        for _, source in windows[: row - sum(counts)]:
            counts[source] += 1
        return counts, windows[-1][0] if windows else -1

    def _opens(self, source: int, index: int) -> int:
        """The first row of the run that the source's `index`-th row may be."""
        return self._when(source, index * self._unit + 1) - 1

    def _closes(self, source: int, index: int) -> int:
        """The last row of the run that the source's `index`-th row may be."""
        return self._when(source, (index + 1) * self._unit) - 1

    def _run(self, counts: list[int], start: int, stop: int) -> tuple[list[int], list[int]]:
        """Give the rows [start, stop) to sources one by one; returns the counts after them and the
        source of each.
        """
        counts = list(counts)
        sources = range(len(counts))
        opens = [self._opens(source, counts[source]) for source in sources]
        closes = [self._closes(source, counts[source]) for source in sources]
        given = []
        for row in range(start, stop):
            chosen, first = -1, NEVER + 1
            for source in sources:
                if opens[source] <= row and closes[source] < first:
                    chosen, first = source, closes[source]
            assert chosen >= 0, f"no source has a share of row {row}"
            given.append(chosen)
            counts[chosen] += 1
            opens[chosen] = self._opens(chosen, counts[chosen])
            closes[chosen] = self._closes(chosen, counts[chosen])
        return counts, given

    def _make_block(self, block: int) -> _Block:
        begin = block * BLOCK_ROWS
        before = self._counts_at(begin)
        _, given = self._run(before, begin, begin + BLOCK_ROWS)
        sources = np.array(given, np.int64)
        indices = np.empty_like(sources)
        for source, count in enumerate(before):
            own = np.flatnonzero(sources == source)
            indices[own] = count + np.arange(len(own))
        return _Block(sources_R=sources, indices_R=indices, before=before)


def _constant(whole_rows: Mapping[str, int], names: Sequence[str]) -> ShareWeights:
    weights = [whole_rows[name] for name in names]
    return ShareWeights(first_steps=[0], weights=[weights], unit=sum(weights))


def _joined(parts: list[Ints]) -> Ints:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, np.int64), *parts])
