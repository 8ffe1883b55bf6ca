"""Mixture and streams go in, the batch of each step comes out for one rank, made ready ahead of need by a thread."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice, pairwise

import numpy as np

from bigmix.data.assemble import Assembled, assemble
from bigmix.data.mixture import Mixture, Places
from bigmix.data.order import key_of
from bigmix.data.packing import Lost
from bigmix.data.stream import Stream
from bigmix.records import Ints, RowId, RowPlaces, StepBatch
from bigmix.waiting import is_done

# Rows of a rank that are gathered together: a step at a time costs twice as much.
ASSEMBLED_ROWS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """Which rows of a step a rank takes: a contiguous block, cut into micro-batches."""

    rank: int
    ranks: int
    rows_per_step: int
    micro_batch_rows: int

    @property
    def rows(self) -> slice:
        """This rank's block of the step's rows."""
        each = self.rows_per_step // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Steps from `first_step` on, whose rows have the length that the packers of these streams say."""

    first_step: int
    streams: Mapping[str, Stream]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """Where a stage begins in a source: after `drawn` rows of the run, with row `index` of its stream."""

    drawn: int
    index: int


class Plan:
    """What decides the rows of every step: the same plan gives the same rows on any number of ranks.

    Where rows change their length, each source goes on at the same fraction of its epoch.
    """

    def __init__(self, *, mixture: Mixture, stages: Sequence[Stage], seed: int) -> None:
        self.mixture = mixture
        self.rows_per_step = mixture.rows_per_step
        self._seed = seed
        self.stages = stages
        self._first_steps = [stage.first_step for stage in stages]
        self._starts = list(accumulate(stages[1:], self._next_starts, initial=self._zero()))
        self._assembled = lru_cache(maxsize=2)(self._assemble)

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The sources, with the rows of the last stage."""
        return self.stages[-1].streams

    def streams_at(self, step: int) -> Mapping[str, Stream]:
        """The sources, with the rows of a step, counted from 1."""
        return self.stages[bisect_right(self._first_steps, step) - 1].streams

    def row_ids(self, step: int) -> list[RowId]:
        """The rows of a step, counted from 1, over all ranks and in the order in which ranks take their blocks."""
        return self._locate(step, 1, 0, self.rows_per_step).ids()

    def places(self, portion: Portion, step: int) -> RowPlaces:
        """The rows of one rank in a step, counted from 1."""
        return self._locate(step, 1, portion.rows.start, portion.rows.stop)

    def assembled(self, portion: Portion, step: int) -> tuple[Assembled, int]:
        """The rows of one rank in some steps, this one among them, and the first of the step's rows in them."""
        start, stop = portion.rows.start, portion.rows.stop
        steps = self._together(portion, step)
        rows = self._assembled(steps.start, len(steps), start, stop)
        return rows, (step - steps.start) * (stop - start)

    def gathered(self, portion: Portion, *, first: int, last: int) -> Iterator[Iterator[RowPlaces]]:
        """What `assembled` reads for the steps `first` .. `last`, in its order: of each stage, the rows of one reading."""
        bounds = [begin for begin in self._first_steps if first < begin <= last]
        for begin, end in pairwise([first, *bounds, last + 1]):
            yield self._gathered(portion, begin, end)

    def _gathered(self, portion: Portion, step: int, end: int) -> Iterator[RowPlaces]:
        while step < end:
            steps = self._together(portion, step)
            yield self._locate(steps.start, len(steps), portion.rows.start, portion.rows.stop)
            step = steps.stop

    def _together(self, portion: Portion, step: int) -> range:
        """The steps that are read together with this one: about ASSEMBLED_ROWS rows of the rank, of one stage."""
        steps = max(1, ASSEMBLED_ROWS // (portion.rows.stop - portion.rows.start))
        first = (step - 1) // steps * steps + 1
        later = [begin for begin in self._first_steps if first < begin <= step]
        until = [begin for begin in self._first_steps if step < begin < first + steps]
        return range(max([first, *later]), min([first + steps, *until]))

    def _assemble(self, first: int, steps: int, start: int, stop: int) -> Assembled:
        at = bisect_right(self._first_steps, first) - 1
        if at and first == self._first_steps[at]:
            for stream in self.stages[at - 1].streams.values():
                stream.release()
        streams = self.stages[at].streams
        places = self._locate(first, steps, start, stop)
        return assemble([streams[name] for name in places.names], places)

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each source has been gone through after a step."""
        at = bisect_right(self._first_steps, step) - 1
        starts, streams = self._starts[at], self.stages[at].streams
        drawn = self.mixture.counts(step * self.rows_per_step)
        return {
            name: (drawn[name] - start.drawn + start.index) / streams[name].rows_per_epoch
            for name, start in starts.items()
        }

    def drawn(self, name: str, rows: int) -> Iterator[tuple[Stream, int, int]]:
        """What the first `rows` rows of a source in the run are: of each stage its stream, and from which row to which."""
        ends = [*(starts[name].drawn for starts in self._starts[1:]), rows]
        for stage, starts, end in zip(self.stages, self._starts, ends, strict=True):
            start = starts[name]
            count = min(end, rows) - start.drawn
            if count > 0:
                yield stage.streams[name], start.index, start.index + count

    def filled(self, name: str, rows: int) -> float:
        """The part of the first `rows` rows of a source in the run that is not padding, in the mean of its epochs."""
        tokens = places = 0.0
        for stream, begin, end in self.drawn(name, max(rows, 1)):
            tokens += (end - begin) * stream.tokens_per_epoch / stream.rows_per_epoch
            places += (end - begin) * stream.packer.width
        return tokens / places

    def lost(self, name: str) -> Lost:
        """What packing leaves out of an epoch of a source, where rows are shortest."""
        return max((s.streams[name].lost for s in self.stages), key=lambda lost: lost.tokens)

    def _zero(self) -> dict[str, _Start]:
        return {name: _Start(drawn=0, index=0) for name in self.mixture.names}

    def _next_starts(self, starts: Mapping[str, _Start], stage: Stage) -> dict[str, _Start]:
        """Where the sources stand when a stage begins; `starts` is the same of the stage before."""
        drawn = self.mixture.counts((stage.first_step - 1) * self.rows_per_step)
        before = self.streams_at(stage.first_step - 1)
        found = {}
        for name, start in starts.items():
            old, new = before[name].rows_per_epoch, stage.streams[name].rows_per_epoch
            epochs, rest = divmod(drawn[name] - start.drawn + start.index, old)
            found[name] = _Start(drawn=drawn[name], index=epochs * new - (-rest * new // old))
        return found

    def _locate(self, first: int, steps: int, start: int, stop: int) -> RowPlaces:
        """The rows at places [start, stop) of each of the steps, which are of one stage."""
        drawn = [self._drawn(step, start, stop) for step in range(first, first + steps)]
        sources_R = np.concatenate([part.sources_R for parts in drawn for part in parts])
        indices_R = np.concatenate([part.indices_R for parts in drawn for part in parts])
        epochs_R, shards_R, rows_R = columns_3R = np.empty((3, len(indices_R)), np.int64)
        at = bisect_right(self._first_steps, first) - 1
        for source, name in enumerate(self.mixture.names):
            own = np.flatnonzero(sources_R == source)
            if len(own):
                begin = self._starts[at][name]
                indices = indices_R[own] - begin.drawn + begin.index
                places = self.stages[at].streams[name].places(indices)
                columns_3R[:, own] = places.epochs_R, places.shards_R, places.rows_R
        return RowPlaces(
            names=self.mixture.names,
            sources_R=sources_R,
            epochs_R=epochs_R,
            shards_R=shards_R,
            rows_R=rows_R,
        )

    def _drawn(self, step: int, start: int, stop: int) -> list[Places]:
        """The mixture's rows at places [start, stop) of a step.

        The mixture's order is kept, so that a rank's block holds every source in its share, and begins at a place
        that changes from step to step, so that no rank is given one kind of row for ever.
        """
        begin, count = (step - 1) * self.rows_per_step, self.rows_per_step
        shift = key_of(self._seed, "step", step) % count
        low, high = start + shift, stop + shift
        ranges = [(low, min(high, count)), (max(low - count, 0), high - count)]
        return [self.mixture.rows(begin + a, begin + b) for a, b in ranges if a < b]


def one_stage(streams: Mapping[str, Stream]) -> Sequence[Stage]:
    """Rows of one length for the whole run."""
    return (Stage(first_step=1, streams=streams),)


def step_batch(plan: Plan, portion: Portion, step: int) -> StepBatch:
    """The rows of one rank in one step, as micro-batches."""
    rows, first = plan.assembled(portion, step)
    count, size = portion.rows.stop - portion.rows.start, portion.micro_batch_rows
    own = slice(first, first + count)
    names, sources_R = plan.mixture.names, rows.sources_R[own]
    drawn = plan.mixture.counts(step * plan.rows_per_step)
    before = plan.mixture.counts((step - 1) * plan.rows_per_step)

    def by_source(values_R: Ints) -> dict[str, int]:
        sums = np.bincount(sources_R, values_R, minlength=len(names))
        return {name: int(total) for name, total in zip(names, sums.tolist(), strict=True)}

    return StepBatch(
        step=step,
        micro_batches=tuple(
            rows.micro_batch(at, min(at + size, first + count))
            for at in range(first, first + count, size)
        ),
        rows={name: drawn[name] - before[name] for name in names},
        tokens=by_source(rows.tokens_R[own]),
        loss_tokens=by_source(rows.loss_tokens_R[own]),
        squares=int(rows.squares_R[own].sum()),
    )


class Loader:
    """Iterates over the batches of the steps `first` .. `last`; a thread keeps `ahead` of them ready."""

    def __init__(self, plan: Plan, portion: Portion, *, first: int, last: int, ahead: int) -> None:
        self._make = partial(step_batch, plan, portion)
        self._steps = range(first, last + 1)
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[StepBatch]:
        return (batch for batch in self.unless(lambda: False) if batch is not None)

    def unless(self, gives_up: Callable[[], bool]) -> Iterator[StepBatch | None]:
        """The batches; None in place of one that is not ready when `gives_up` says so, which is then the next again."""
        steps = iter(self._steps)
        ready = deque(self._thread.submit(self._make, k) for k in islice(steps, self._ahead))
        while ready:
            if not is_done(ready[0], gives_up):
                yield None
                continue
            batch = ready.popleft().result()
            ready.extend(self._thread.submit(self._make, k) for k in islice(steps, 1))
            yield batch

    def close(self) -> None:
        """Stop the thread; what it had ready is thrown away, since a position is all the state there is."""
        self._thread.shutdown(cancel_futures=True)
