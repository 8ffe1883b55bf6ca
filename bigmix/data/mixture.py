"""Shares go in, the source of every row of the run comes out, without a random draw.

The n-th row of a source s is due in the window in which s's target, the sum of its shares over the rows so far, lies
between n and n + 1. Giving each row to the open window that closes first keeps every prefix within one row of every
share (proportionate fairness: Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", Algorithmica 1996); the
proof needs only targets that grow and sum to the number of rows, so it holds while shares change.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm

Points = Sequence[tuple[int, float]]
UNITS = (
    1_000_000  # shares on a schedule are kept to one part in a million; constant shares are exact
)
SNAPSHOT_ROWS = 4096


def whole_weights(shares: Sequence[float]) -> list[int]:
    """Shares as the smallest whole numbers in the same ratio: 0.57 and 0.43 become 57 and 43."""
    exact = [Fraction(str(share)) for share in shares]
    scale = lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    common = gcd(*whole)
    return [weight // common for weight in whole]


def share_at(share: float | Points, step: int) -> float:
    """The share at a step: points are joined by straight lines and hold their last value after the end."""
    if isinstance(share, int | float):
        return float(share)
    steps = [at for at, _ in share]
    index = bisect_right(steps, step) - 1
    at, value = share[index]
    if index + 1 == len(share):
        return value
    next_at, next_value = share[index + 1]
    return value + (next_value - value) * (step - at) / (next_at - at)


def shares_at(shares: Mapping[str, float | Points], step: int) -> dict[str, float]:
    """All shares at a step, normalised to sum to 1; all 0 where the schedules leave nothing."""
    raw = {name: share_at(share, step) for name, share in shares.items()}
    total = sum(raw.values())
    return {name: value / total if total else 0.0 for name, value in raw.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a row of the run comes from: the `index`-th row of a source, counted over all its epochs."""

    source: str
    index: int


@dataclass(frozen=True, slots=True)
class _Standing:
    """The state before a row: how many rows each source has had, and its target in whole units."""

    counts: tuple[int, ...]
    targets: tuple[int, ...]


class Mixture:
    """Which source each row of the run is drawn from. `at(row)` depends on the shares and the row alone.

    A share is a number or points [step, share]; it is constant within a step of `rows_per_step` rows. Constant
    shares repeat after the sum of their whole weights, so that any row is found at once; on a schedule the state is
    kept every few thousand rows.
    """

    def __init__(self, shares: Mapping[str, float | Points], rows_per_step: int) -> None:
        self.names = tuple(shares)
        self._shares = dict(shares)
        self._rows_per_step = rows_per_step
        self._constant = self._constant_weights()
        self._period = sum(self._constant) if self._constant else 0
        self._unit = self._period or UNITS
        self._scheduled = lru_cache(maxsize=64)(self._weights_on_schedule)
        nothing = (0,) * len(self.names)
        self._snapshots = [_Standing(nothing, nothing)]
        self._reached = (
            0,
            self._snapshots[0],
        )  # where `rows` ended last: the next step begins there

    def at(self, row: int) -> Place:
        """The origin of a row of the run, counted from 0."""
        return self.rows(row, row + 1)[0]

    def rows(self, start: int, stop: int) -> list[Place]:
        """The origins of rows [start, stop)."""
        reached, standing = self._reached
        if reached != start:
            standing = self._standing(start)
        counts, targets = list(standing.counts), list(standing.targets)
        places = []
        for row in range(start, stop):
            chosen = self._advance(row, counts, targets)
            places.append(Place(source=self.names[chosen], index=counts[chosen] - 1))
        self._reached = (stop, _Standing(tuple(counts), tuple(targets)))
        return places

    def counts(self, row: int) -> dict[str, int]:
        """How many of the rows before `row` each source has."""
        return dict(zip(self.names, self._standing(row).counts, strict=True))

    def _constant_weights(self) -> list[int]:
        numbers = [share for share in self._shares.values() if isinstance(share, int | float)]
        return whole_weights(numbers) if len(numbers) == len(self.names) else []

    def _weights(self, row: int) -> tuple[int, ...]:
        """What each source's target gains by this row, in units that sum to `self._unit`."""
        if self._constant:
            return tuple(self._constant)
        return self._scheduled(row // self._rows_per_step)

    def _weights_on_schedule(self, step: int) -> tuple[int, ...]:
        shares = shares_at(self._shares, step)
        raw = [share * UNITS for share in shares.values()]
        units = [int(value) for value in raw]
        largest_rests = sorted(range(len(raw)), key=lambda i: units[i] - raw[i])
        for index in largest_rests[: UNITS - sum(units)]:
            units[index] += 1
        return tuple(units)

    def _advance(self, row: int, counts: list[int], targets: list[int]) -> int:
        """Give one row to a source and return which; `counts` and `targets` move on."""
        weights = self._weights(row)
        chosen, chosen_key = -1, (0, 0)
        for index, weight in enumerate(weights):
            targets[index] += weight
            is_open = targets[index] > counts[index] * self._unit
            if not is_open:
                continue
            key = (self._closes(index, counts[index], targets[index], row, weight), index)
            if chosen < 0 or key < chosen_key:
                chosen, chosen_key = index, key
        counts[chosen] += 1
        return chosen

    def _closes(self, index: int, count: int, target: int, row: int, weight: int) -> int:
        """The row by which the source must have had its next one: its target reaches count + 1 there."""
        missing = (count + 1) * self._unit - target
        if missing <= 0:
            return row
        if self._constant:
            return row + -(-missing // weight)
        return self._closes_on_schedule(index, missing, row, weight)

    def _closes_on_schedule(self, index: int, missing: int, row: int, weight: int) -> int:
        end_of_step = (row // self._rows_per_step + 1) * self._rows_per_step - 1
        while True:
            room = (end_of_step - row) * weight
            if weight and missing <= room:
                return row + -(-missing // weight)
            missing -= room
            row = end_of_step
            end_of_step += self._rows_per_step
            weight = self._scheduled(row // self._rows_per_step + 1)[index]
            if weight == 0 and self._is_over(index, row // self._rows_per_step + 1):
                return 1 << 62

    def _is_over(self, index: int, step: int) -> bool:
        """Whether a source's schedule has come to its end at share 0: its next row is never due."""
        share = self._shares[self.names[index]]
        return not isinstance(share, int | float) and step >= share[-1][0]

    def _standing(self, row: int) -> _Standing:
        """The state before `row`. After each period the targets are whole rows, and the counts equal them."""
        if not self._period:
            return self._from_snapshot(row)
        periods, rest = divmod(row, self._period)
        inside = self._from_snapshot(rest)
        return _Standing(
            tuple(c + periods * w for c, w in zip(inside.counts, self._constant, strict=True)),
            tuple(
                t + periods * w * self._unit
                for t, w in zip(inside.targets, self._constant, strict=True)
            ),
        )

    def _from_snapshot(self, row: int) -> _Standing:
        whole = row // SNAPSHOT_ROWS
        while len(self._snapshots) <= whole:
            begin = (len(self._snapshots) - 1) * SNAPSHOT_ROWS
            self._snapshots.append(self._run(self._snapshots[-1], begin, begin + SNAPSHOT_ROWS))
        return self._run(self._snapshots[whole], whole * SNAPSHOT_ROWS, row)

    def _run(self, standing: _Standing, start: int, stop: int) -> _Standing:
        counts, targets = list(standing.counts), list(standing.targets)
        for row in range(start, stop):
            self._advance(row, counts, targets)
        return _Standing(tuple(counts), tuple(targets))
