"""The shards of an epoch and which of them are bad go in; for each row of a bad shard, the row to train in its place comes out.

The substitute is of the same window of shards, whose rows are read at that time, so that no other shard is opened for it;
of the nearest window with a healthy shard where there is none. The rows of the bad shards of a window and those of its
healthy ones are both counted through: the j-th of B bad ones gets one of the healthy ones [j H / B, (j + 1) H / B) of H.
So each healthy shard gives its part to within two rows, and none gives a row twice before all have given theirs once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigmix.seeding import Indices, keys_of

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Substitution:
    """The shards of an epoch in its order: `bad_before` and `healthy_before` count the rows before each, and in all.

    Windows are `window_shards` shards each; `key` decides the choice.
    """

    bad_before: Indices
    healthy_before: Indices
    window_shards: int
    key: int

    def of(self, places_R: Indices, rows_R: Indices) -> tuple[Indices, Indices]:
        """The place in the epoch's order and the row of what is trained instead of these rows, all of bad shards."""
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

    def _span(self, before: Indices, windows_R: Indices) -> tuple[Indices, Indices]:
        """How many rows come before each of these windows, and how many it has."""
        begins_R = windows_R * self.window_shards
        ends_R = np.minimum(begins_R + self.window_shards, len(before) - 1)
        return before[begins_R], before[ends_R] - before[begins_R]

    def _sources_of(self, windows_R: Indices) -> Indices:
        """The window that gives to each; of two that are equally near the earlier one, whose shards may still be open."""
        count = -(-(len(self.healthy_before) - 1) // self.window_shards)
        _, healthy_W = self._span(self.healthy_before, np.arange(count))
        able = np.flatnonzero(healthy_W)
        after_R = np.minimum(np.searchsorted(able, windows_R), len(able) - 1)
        before_R = np.maximum(after_R - 1, 0)
        is_after_R = np.abs(able[after_R] - windows_R) < np.abs(able[before_R] - windows_R)
        return np.where(is_after_R, able[after_R], able[before_R])


def substitution(rows_S: Indices, is_bad_S: Flags, *, window_shards: int, key: int) -> Substitution:
    """For an epoch whose shards, in its order, have so many rows; some of the healthy ones must have any."""
    assert rows_S[~is_bad_S].any(), "no healthy shard is left"
    return Substitution(
        bad_before=np.concatenate([[0], np.cumsum(np.where(is_bad_S, rows_S, 0))]),
        healthy_before=np.concatenate([[0], np.cumsum(np.where(is_bad_S, 0, rows_S))]),
        window_shards=window_shards,
        key=key,
    )
