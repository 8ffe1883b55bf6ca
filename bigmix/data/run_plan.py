"""The plan of a run: which rows each step has, and how many steps there are."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from bigmix.data.batch import AssembledRows, assemble
from bigmix.data.mixture import Mixture, MixtureRows
from bigmix.data.packing import DroppedTokens
from bigmix.data.quarantine import EMPTY, Quarantine
from bigmix.data.records import (
    DataPosition,
    RankRows,
    RecipeSegment,
    RowId,
    RowIds,
    SourcePosition,
)
from bigmix.data.shares import Shares
from bigmix.data.stream import Stream
from bigmix.errors import BigmixError
from bigmix.loss.objective import StepShares
from bigmix.seeding import key_of

# Rows of a rank that are assembled together: a step at a time costs twice as much.
ASSEMBLED_ROWS = 1024

FIRST_SEGMENT = RecipeSegment()


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLengthStage:
    """The steps from `first_step` on, whose rows have the length of the rows of these streams."""

    first_step: int
    streams: Mapping[str, Stream]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows [begin, end) of a stream in the order in which they are drawn; rows of `bad` shards are
    replaced.
    """

    stream: Stream
    begin: int
    end: int
    bad: frozenset[int]

    def row_ids(self, most: int | None = None) -> RowIds:
        """Which rows are read, all of them or the first `most`."""
        end = self.end if most is None else min(self.end, self.begin + most)
        return self.stream.row_ids(np.arange(self.begin, end), self.bad)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """Where a stage begins in a source: after `num_drawn` rows of the run, with row `index` of its
    stream.
    """

    num_drawn: int
    index: int


class RunPlan:
    """Decides the rows of every step, the number of steps and the shares: the same plan gives the
    same rows on any number of ranks.

    Where rows change their length, each source goes on at the same fraction of its epoch. Rows of
    shards in quarantine are drawn and counted as before; a row of another shard of their source is
    read instead.
    """

    def __init__(
        self,
        *,
        mixture: Mixture,
        stages: Sequence[SequenceLengthStage],
        seed: int,
        steps: int,
        loss_shares: Shares,
        quarantine: Quarantine = EMPTY,
        segment: RecipeSegment = FIRST_SEGMENT,
        notes: Sequence[str] = (),
    ) -> None:
        """`mixture` and `loss_shares` count from the first row of `segment`, where the first of the
        stages begins; `steps` counts from the first step of the run.

        `notes` report where a limit of epochs changed the run. Raises BigmixError where the
        quarantine leaves a source no row.
        """
        self.mixture = mixture
        self.steps = steps
        self.loss_shares = loss_shares
        self.notes = notes
        self.rows_per_step = mixture.rows_per_step
        self.quarantine = quarantine
        self.segment = segment
        self._seed = seed
        self.stages = stages
        self._first_steps = [stage.first_step for stage in stages]
        self._bad = {
            name: _shards_of(stages, name, files)
            for name, files in quarantine.first_steps.items()
            if name in mixture.names
        }
        # Rows are read together only between these steps: those before a shard is replaced are
        # still read from it.
        begin, *later = self._first_steps
        self._borders = sorted({begin, *later, *(q for q in quarantine.steps if q > begin)})
        self._starts = list(accumulate(stages[1:], self._next_starts, initial=self._zero()))
        self._assembled = lru_cache(maxsize=2)(self._assemble)

    def with_quarantine(self, quarantine: Quarantine) -> "RunPlan":
        """The same plan with rows of these shards replaced, and of no others.

        No other thread may read from the plan. Raises BigmixError where a source has no row left.
        """
        return self._changed(quarantine=quarantine)

    def ending(self, steps: int, notes: Sequence[str]) -> "RunPlan":
        """The same plan with another number of steps."""
        return self._changed(steps=steps, notes=notes)

    def _changed(self, **changes: Any) -> "RunPlan":
        same: dict[str, Any] = {
            "mixture": self.mixture,
            "stages": self.stages,
            "seed": self._seed,
            "steps": self.steps,
            "loss_shares": self.loss_shares,
            "quarantine": self.quarantine,
            "segment": self.segment,
            "notes": self.notes,
        }
        return RunPlan(**(same | changes))

    def release(self) -> None:
        """Close all shards that are held open, and forget the rows that were assembled."""
        self._assembled.cache_clear()
        for stage in self.stages:
            for stream in stage.streams.values():
                stream.release()

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The sources, with the rows of the last stage."""
        return self.stages[-1].streams

    def streams_at(self, step: int) -> Mapping[str, Stream]:
        """The sources, with the rows of a step, counted from 1."""
        return self.stages[bisect_right(self._first_steps, step) - 1].streams

    def shares_of_step(self, step: int) -> StepShares:
        """The shares of a step, counted from 1; a schedule's points count the steps that are
        done.
        """
        before = step - 1 - self.segment.after
        return StepShares(rows=self.mixture.shares.at(before), loss=self.loss_shares.at(before))

    def counts(self, step: int) -> dict[str, int]:
        """How many rows of each source have been drawn in the segment after a step."""
        return self.mixture.counts((step - self.segment.after) * self.rows_per_step)

    def owed(self, step: int) -> dict[str, float]:
        """By how many rows less than its shares since the run began each source has drawn after a
        step.
        """
        shares, drawn = self.mixture.shares, self.counts(step)
        steps = step - self.segment.after
        changing = shares.table(np.arange(min(steps, shares.last_change)))
        last, resting = shares.at(shares.last_change), max(steps - shares.last_change, 0)
        due = {n: self.rows_per_step * (changing[n].sum() + resting * last[n]) for n in drawn}
        before = self.segment.owed
        return {n: round(float(due[n]) - drawn[n] + before.get(n, 0.0), 9) for n in drawn}

    def source_positions(self, step: int) -> dict[str, SourcePosition]:
        """The next row of each source after a step."""
        at = max(0, bisect_right(self._first_steps, step) - 1)
        starts, streams, drawn = self._starts[at], self.stages[at].streams, self.counts(step)
        return {
            name: SourcePosition(
                row=drawn[name] - start.num_drawn + start.index, of=streams[name].rows_per_epoch
            )
            for name, start in starts.items()
        }

    def position(self, step: int) -> DataPosition:
        """From where the run goes on after a step."""
        return DataPosition(
            segment=self.segment,
            sources=self.source_positions(step),
            quarantine=self.quarantine,
        )

    def row_ids(self, step: int) -> list[RowId]:
        """The rows of a step, counted from 1, over all ranks and in the order in which ranks take
        their blocks.
        """
        return self._locate(step, 1, 0, self.rows_per_step).ids()

    def row_ids_of_rank(self, rank_rows: RankRows, step: int) -> RowIds:
        """The rows of one rank in a step, counted from 1."""
        return self._locate(step, 1, rank_rows.rows.start, rank_rows.rows.stop)

    def substituted(self, step: int) -> dict[str, int]:
        """How many rows of a step are substitutes for rows of bad shards, by source and over all
        ranks.
        """
        counts = dict.fromkeys(self.mixture.names, 0)
        bad = {name: shards for name in self._bad if (shards := self._bad_at(name, step))}
        if bad:
            rows, streams = self._rows(step, 1, 0, self.rows_per_step), self.streams_at(step)
            for name, shards in bad.items():
                own = rows.sources_R == self.mixture.names.index(name)
                as_drawn = streams[name].row_ids(rows.indices_R[own])
                counts[name] = int(np.isin(as_drawn.shards_R, list(shards)).sum())
        return counts

    def assembled(self, rank_rows: RankRows, step: int) -> tuple[AssembledRows, int]:
        """The rows of one rank in this step and its neighbours, and where the rows of this step
        begin in them.
        """
        start, stop = rank_rows.rows.start, rank_rows.rows.stop
        steps = self._together(rank_rows, step)
        rows = self._assembled(steps.start, len(steps), start, stop)
        return rows, (step - steps.start) * (stop - start)

    def gathered(self, rank_rows: RankRows, *, first: int, last: int) -> Iterator[Iterator[RowIds]]:
        """What `assembled` reads for the steps from `first` to `last`, in its order: for each stage
        the rows that are read together.
        """
        bounds = [begin for begin in self._first_steps if first < begin <= last]
        for begin, end in pairwise([first, *bounds, last + 1]):
            yield self._gathered(rank_rows, begin, end)

    def _gathered(self, rank_rows: RankRows, step: int, end: int) -> Iterator[RowIds]:
        while step < end:
            steps = self._together(rank_rows, step)
            yield self._locate(steps.start, len(steps), rank_rows.rows.start, rank_rows.rows.stop)
            step = steps.stop

    def _together(self, rank_rows: RankRows, step: int) -> range:
        """The steps that are read together with this one: those of about ASSEMBLED_ROWS rows of the
        rank, in one stage.
        """
        steps = max(1, ASSEMBLED_ROWS // (rank_rows.rows.stop - rank_rows.rows.start))
        first = (step - 1) // steps * steps + 1
        later = [begin for begin in self._borders if first < begin <= step]
        until = [begin for begin in self._borders if step < begin < first + steps]
        return range(max([first, *later]), min([first + steps, *until]))

    def _assemble(self, first: int, steps: int, start: int, stop: int) -> AssembledRows:
        at = bisect_right(self._first_steps, first) - 1
        if at and first == self._first_steps[at]:
            for stream in self.stages[at - 1].streams.values():
                stream.release()
        streams = self.stages[at].streams
        row_ids = self._locate(first, steps, start, stop)
        return assemble([streams[name] for name in row_ids.names], row_ids)

    def epochs(self, step: int) -> dict[str, float]:
        """How many epochs of each source have been trained after a step."""
        return {name: found.row / found.of for name, found in self.source_positions(step).items()}

    def drawn(self, name: str, num_rows: int) -> Iterator[RowRange]:
        """The first `num_rows` rows of a source in the run, in ranges between which a stage or a
        replacement begins.
        """
        drawn = [self.counts(step - 1)[name] for step in self._borders]
        for step, begin, end in zip(self._borders, drawn, [*drawn[1:], num_rows], strict=True):
            at = bisect_right(self._first_steps, step) - 1
            start = self._starts[at][name]
            if begin < min(end, num_rows):
                yield RowRange(
                    stream=self.stages[at].streams[name],
                    begin=begin - start.num_drawn + start.index,
                    end=min(end, num_rows) - start.num_drawn + start.index,
                    bad=self._bad_at(name, step),
                )

    def fill_ratio(self, name: str, num_rows: int) -> float:
        """The part of the first `num_rows` rows of a source in the run that is not padding, from
        the mean of its epochs.
        """
        num_tokens = 0.0
        for part in self.drawn(name, max(num_rows, 1)):
            stream, count = part.stream, part.end - part.begin
            num_tokens += count * stream.tokens_per_epoch / stream.rows_per_epoch
        return num_tokens / self.capacity_tokens(name, max(num_rows, 1))

    def capacity_tokens(self, name: str, num_rows: int) -> int:
        """The tokens that the first `num_rows` rows of a source in the run could hold."""
        return sum(
            (part.end - part.begin) * part.stream.packing.width
            for part in self.drawn(name, num_rows)
        )

    def num_shards(self, name: str) -> int:
        """From how many shards of a source rows are read in the stage where they are fewest: those
        that have rows and are not bad.
        """
        bad = self._bad.get(name, {})
        return min(stage.streams[name].num_shards_but(bad) for stage in self.stages)

    def lost(self, name: str) -> DroppedTokens:
        """What packing leaves out of an epoch of a source, in the stage where rows are shortest."""
        return max((s.streams[name].lost for s in self.stages), key=lambda lost: lost.num_tokens)

    def _zero(self) -> dict[str, _Start]:
        rows = self.segment.rows
        return {name: _Start(num_drawn=0, index=rows.get(name, 0)) for name in self.mixture.names}

    def _next_starts(
        self, starts: Mapping[str, _Start], stage: SequenceLengthStage
    ) -> dict[str, _Start]:
        """Where a stage begins in each source; `starts` is the same of the stage before."""
        drawn = self.counts(stage.first_step - 1)
        before = self.streams_at(stage.first_step - 1)
        found = {}
        for name, start in starts.items():
            old, new = before[name].rows_per_epoch, stage.streams[name].rows_per_epoch
            index = same_fraction(drawn[name] - start.num_drawn + start.index, old, new)
            found[name] = _Start(num_drawn=drawn[name], index=index)
        return found

    def _bad_at(self, name: str, step: int) -> frozenset[int]:
        """The shards of a source whose rows are replaced in a step."""
        return frozenset(shard for shard, first in self._bad.get(name, {}).items() if first <= step)

    def _locate(self, first: int, steps: int, start: int, stop: int) -> RowIds:
        """The rows [start, stop) of each of the steps; between these steps no stage and no
        replacement begins.
        """
        rows, streams = self._rows(first, steps, start, stop), self.streams_at(first)
        epochs_R, shards_R, rows_R = columns_3R = np.empty((3, len(rows.indices_R)), np.int64)
        for source, name in enumerate(self.mixture.names):
            own = np.flatnonzero(rows.sources_R == source)
            if len(own):
                bad = self._bad_at(name, first)
                row_ids = streams[name].row_ids(rows.indices_R[own], bad)
                columns_3R[:, own] = row_ids.epochs_R, row_ids.shards_R, row_ids.rows_R
        return RowIds(
            names=self.mixture.names,
            sources_R=rows.sources_R,
            epochs_R=epochs_R,
            shards_R=shards_R,
            rows_R=rows_R,
        )

    def _rows(self, first: int, steps: int, start: int, stop: int) -> MixtureRows:
        """The same rows as they are drawn: the source of each, and its index in the stream of the
        stage.
        """
        drawn = [self._drawn(step, start, stop) for step in range(first, first + steps)]
        sources_R = np.concatenate([part.sources_R for parts in drawn for part in parts])
        indices_R = np.concatenate([part.indices_R for parts in drawn for part in parts])
        starts = self._starts[bisect_right(self._first_steps, first) - 1].values()
        shifts_S = np.array([start.index - start.num_drawn for start in starts])
        return MixtureRows(sources_R=sources_R, indices_R=indices_R + shifts_S[sources_R])

    def _drawn(self, step: int, start: int, stop: int) -> list[MixtureRows]:
        """The mixture's rows [start, stop) of a step.

        The order of the mixture is kept, so that the block of a rank holds every source in its
        share. It begins at another row in each step, so that no rank is always given the same kind
        of row.
        """
        begin, count = (step - 1 - self.segment.after) * self.rows_per_step, self.rows_per_step
        shift = key_of(self._seed, "step", step) % count
        low, high = start + shift, stop + shift
        ranges = [(low, min(high, count)), (max(low - count, 0), high - count)]
        return [self.mixture.rows(begin + a, begin + b) for a, b in ranges if a < b]


def same_fraction(row: int, old: int, new: int) -> int:
    """The row at the same fraction of its epoch where an epoch has `new` rows instead of `old`,
    rounded up.
    """
    epochs, rest = divmod(row, old)
    return epochs * new - (-rest * new // old)


def _shards_of(
    stages: Sequence[SequenceLengthStage], name: str, files: Mapping[str, int]
) -> dict[int, int]:
    """The indices of the shards of a source with these files, each with the value of its file."""
    stream = stages[-1].streams[name]
    names = stream.manifest.shards.files
    shards = stream.manifest.shards.indices_of(files)
    if any(s.streams[name].num_rows_in(shards) == s.streams[name].rows_per_epoch for s in stages):
        raise BigmixError(
            f"no shard of {name} is left to train on: {len(shards)} of {len(names)} are bad, the"
            f" first is {names[shards[0]]}; restore them or prepare the source again, then run the"
            " command again"
        )
    return {shard: files[names[shard]] for shard in shards}


def stages_from(stages: Sequence[SequenceLengthStage], after: int) -> Sequence[SequenceLengthStage]:
    """The stages of the steps after the first `after` ones; the first of them begins there."""
    current = [stage for stage in stages if stage.first_step <= after + 1][-1]
    later = [stage for stage in stages if stage.first_step > after + 1]
    return [replace(current, first_step=after + 1), *later]
