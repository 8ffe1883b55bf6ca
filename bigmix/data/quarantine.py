"""Bad shards: from which step on their rows are replaced, and by which rows.

A substitute comes from the same window of shards, whose rows are read at that time anyway, so that
no other shard is opened for it; where the window has no healthy shard, from the nearest window that
has one. The rows of the bad shards of a window are numbered, and so are those of its healthy ones:
the j-th of B bad rows is replaced by one of the healthy rows [j H / B, (j + 1) H / B) of H. So each
healthy shard gives its part to within two rows, and none gives a row twice before all have given
theirs once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigmix.errors import BigmixError
from bigmix.seeding import keys_of
from bigmix.types import Flags, Ints


class BadShard(BigmixError):
    """A shard of a source that cannot be read, through a fault of its own and not of this machine;
    `shard` is its index.
    """

    def __init__(self, source: str, shard: int, file: str, reason: str) -> None:
        # All four are arguments of the exception, so that it can be pickled for another rank.
        super().__init__(source, shard, file, reason)
        self.source = source
        self.shard = shard
        self.file = file
        self.reason = reason

    def __str__(self) -> str:
        return f"the shard {self.file} of {self.source} cannot be used: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """For each source the files of its bad shards, each with the first step, counted from 1, in
    which its rows are replaced.

    Files and not indices: they stay the same where a source lists its shards in another order.
    """

    first_steps: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> "Quarantine":
        """The quarantine from what `to_json` gave."""
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
        """The steps at which shards were added, in order."""
        found = {step for files in self.first_steps.values() for step in files.values()}
        return sorted(found)

    def extended(
        self, found: Iterable[BadShard], step: int
    ) -> tuple["Quarantine", Sequence[BadShard]]:
        """The quarantine with more shards, whose rows are replaced from a step on, and those of
        them that are new: not replaced in that step before.

        The order in which shards are given, and how often, changes nothing. Where none is new, the
        step has failed although they are replaced, and will fail again.
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
    """The rows of an epoch that replace those of its bad shards.

    `bad_before` and `healthy_before` count the bad and the healthy rows before each shard in the
    order of the epoch, and at the end those of all shards. Windows have `window_shards` shards;
    `key` decides the choice.
    """

    bad_before: Ints
    healthy_before: Ints
    window_shards: int
    key: int

    def of(self, places_R: Ints, rows_R: Ints) -> tuple[Ints, Ints]:
        """The substitutes of these rows, all of bad shards: the place of the shard in the epoch's
        order, and the row in the shard.
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
        """How many rows come before each of these windows, and how many each has."""
        begins_R = windows_R * self.window_shards
        ends_R = np.minimum(begins_R + self.window_shards, len(before) - 1)
        return before[begins_R], before[ends_R] - before[begins_R]

    def _sources_of(self, windows_R: Ints) -> Ints:
        """The window that the substitutes of each window come from; of two that are equally near
        the earlier one, whose shards may still be open.
        """
        count = -(-(len(self.healthy_before) - 1) // self.window_shards)
        _, healthy_W = self._span(self.healthy_before, np.arange(count))
        able = np.flatnonzero(healthy_W)
        after_R = np.minimum(np.searchsorted(able, windows_R), len(able) - 1)
        before_R = np.maximum(after_R - 1, 0)
        is_after_R = np.abs(able[after_R] - windows_R) < np.abs(able[before_R] - windows_R)
        return np.where(is_after_R, able[after_R], able[before_R])


def substitution(rows_S: Ints, is_bad_S: Flags, *, window_shards: int, key: int) -> Substitution:
    """The substitutes of an epoch whose shards have these numbers of rows, in its order.

    At least one healthy shard must have rows.
    """
    assert rows_S[~is_bad_S].any(), "no healthy shard is left"
    return Substitution(
        bad_before=np.concatenate([[0], np.cumsum(np.where(is_bad_S, rows_S, 0))]),
        healthy_before=np.concatenate([[0], np.cumsum(np.where(is_bad_S, 0, rows_S))]),
        window_shards=window_shards,
        key=key,
    )
