"""Shards that were found bad go in, the list of those whose rows are replaced comes out, with the
step that each is replaced from.

The shards of an epoch and which of them are bad go in; for each row of a bad shard, the row to
train in its place comes out.

The substitute is of the same window of shards, whose rows are read at that time, so that no other
shard is opened for it; of the nearest window with a healthy shard where there is none. The rows of
the bad shards of a window and those of its healthy ones are both counted through: the j-th of B bad
ones gets one of the healthy ones [j H / B, (j + 1) H / B) of H. So each healthy shard gives its
part to within two rows, and none gives a row twice before all have given theirs once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigmix.errors import BigmixError
from bigmix.seeding import keys_of
from bigmix.types import Flags, Ints


class BadShard(BigmixError):
    """A shard of a source that cannot be read, by a fault of its own and not of this machine;
    `shard` is its index.
    """

    def __init__(self, source: str, shard: int, file: str, reason: str) -> None:
        # All four are the arguments, so that another rank can be sent it.
        super().__init__(source, shard, file, reason)
        self.source = source
        self.shard = shard
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"the shard {self.file} of {self.source} cannot be used: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """For each source the files of its bad shards, and the first step, counted from 1, whose rows
    are replaced.

    Files and not places: a source that is listed in another order has the same ones.
    """

    first_steps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> "Quarantine":
        """What `to_json` gave."""
        return cls(
            first_steps={
                str(source): {str(file): int(step) for file, step in files.items()}
                for source, files in value.items()
            }
        )

    def to_json(self) -> dict[str, dict[str, int]]:
        """Plain values, the same for the same quarantine."""
        return {
            source: dict(sorted(files.items()))
            for source, files in sorted(self.first_steps.items())
        }

    @property
    def steps(self) -> Sequence[int]:
        """The steps at which shards join, in order."""
        found = {step for files in self.first_steps.values() for step in files.values()}
        return sorted(found)

    def extended(
        self, found: Iterable[BadShard], step: int
    ) -> tuple["Quarantine", Sequence[BadShard]]:
        """With more shards whose rows are replaced from a step on; and those that were not replaced
        in that step before.

        The order in which they are given, and how often, changes nothing. Where none is new the
        step fails by what is replaced already: it will fail again.
        """
        files = {source: dict(known) for source, known in self.first_steps.items()}
        new = []
        for bad in sorted(found, key=lambda bad: (bad.source, bad.file)):
            known = files.setdefault(bad.source, {})
            if known.get(bad.file, step + 1) > step:
                known[bad.file] = step
                new.append(bad)
        return Quarantine(first_steps=files), new


EMPTY = Quarantine()


@dataclass(frozen=True, kw_only=True, slots=True)
class Substitution:
    """The shards of an epoch in its order: `bad_before` and `healthy_before` count the rows before
    each, and in all.

    Windows are `window_shards` shards each; `key` decides the choice.
    """

    bad_before: Ints
    healthy_before: Ints
    window_shards: int
    key: int

    def of(self, places_R: Ints, rows_R: Ints) -> tuple[Ints, Ints]:
        """The place in the epoch's order and the row of what is trained instead of these rows, all
        of bad shards.
        """
        windows_R = places_R // self.window_shards
        bad_firsts_R, bad_R = self._span(self.bad_before, windows_R)
        healthy_firsts_R, healthy_R = self._span(self.healthy_before, self._sources_of(windows_R))
        counted_R = self.bad_before[places_R] + rows_R
        inside_R = counted_R - bad_firsts_R
        low_R = inside_R * healthy_R // bad_R
        choices_R = np.maximum((inside_R + 1) * healthy_R // bad_R - low_R, 1)
        chance_R = keys_of(self.key, counted_R) % choices_R.astype(np.uint64)
        chosen_R = healthy_firsts_R + low_R + chance_R.astype(np.int64)
        found_R = np.searchsorted(self.healthy_before, chosen_R, side="right") - 1
        return found_R, chosen_R - self.healthy_before[found_R]

    def _span(self, before: Ints, windows_R: Ints) -> tuple[Ints, Ints]:
        """How many rows come before each of these windows, and how many it has."""
        begins_R = windows_R * self.window_shards
        ends_R = np.minimum(begins_R + self.window_shards, len(before) - 1)
        return before[begins_R], before[ends_R] - before[begins_R]

    def _sources_of(self, windows_R: Ints) -> Ints:
        """The window that gives to each; of two that are equally near the earlier one, whose shards
        may still be open.
        """
        count = -(-(len(self.healthy_before) - 1) // self.window_shards)
        _, healthy_W = self._span(self.healthy_before, np.arange(count))
        able = np.flatnonzero(healthy_W)
        after_R = np.minimum(np.searchsorted(able, windows_R), len(able) - 1)
        before_R = np.maximum(after_R - 1, 0)
        is_after_R = np.abs(able[after_R] - windows_R) < np.abs(able[before_R] - windows_R)
        return np.where(is_after_R, able[after_R], able[before_R])


def substitution(rows_S: Ints, is_bad_S: Flags, *, window_shards: int, key: int) -> Substitution:
    """For an epoch whose shards, in its order, have so many rows; some of the healthy ones must
    have any.
    """
    assert rows_S[~is_bad_S].any(), "no healthy shard is left"
    return Substitution(
        bad_before=np.concatenate([[0], np.cumsum(np.where(is_bad_S, rows_S, 0))]),
        healthy_before=np.concatenate([[0], np.cumsum(np.where(is_bad_S, 0, rows_S))]),
        window_shards=window_shards,
        key=key,
    )
