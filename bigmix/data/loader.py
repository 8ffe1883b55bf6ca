"""Mixture and streams go in, the batch of each step comes out for one rank, made ready ahead of need by a thread."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from bigmix.data.mixture import Mixture
from bigmix.data.order import key_of, permutation
from bigmix.data.stream import Stream
from bigmix.records import IGNORE, MicroBatch, Row, RowId, StepBatch


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
class Plan:
    """What decides the rows of every step: the same plan gives the same rows on any number of ranks."""

    mixture: Mixture
    streams: Mapping[str, Stream]
    rows_per_step: int
    seed: int

    def row_ids(self, step: int) -> list[RowId]:
        """The rows of a step, counted from 1, over all ranks and in the order in which ranks take their blocks.

        They are permuted, since blocks of the regular order would give each rank its own kind of row.
        """
        begin = (step - 1) * self.rows_per_step
        places = self.mixture.rows(begin, begin + self.rows_per_step)
        shuffled = permutation(self.rows_per_step, key_of(self.seed, "step", step))
        return [self.streams[places[i].source].locate(places[i].index) for i in shuffled.tolist()]


def step_batch(plan: Plan, portion: Portion, step: int) -> StepBatch:
    """The rows of one rank in one step, as micro-batches."""
    row_ids = plan.row_ids(step)
    own = row_ids[portion.rows]
    rows = [plan.streams[row_id.source].read(row_id) for row_id in own]
    group_of = {name: index for index, name in enumerate(plan.streams)}
    size = portion.micro_batch_rows
    tokens: Counter[str] = Counter()
    loss_tokens: Counter[str] = Counter()
    for row in rows:
        tokens[row.id.source] += row.tokens
        loss_tokens[row.id.source] += int((row.labels_T != IGNORE).sum())
    count_of = Counter(row_id.source for row_id in row_ids)
    return StepBatch(
        step=step,
        micro_batches=tuple(
            micro_batch(part, [group_of[row.id.source] for row in part])
            for part in (rows[at : at + size] for at in range(0, len(rows), size))
        ),
        row_ids=tuple(own),
        rows={name: count_of[name] for name in plan.streams},
        tokens={name: tokens[name] for name in plan.streams},
        loss_tokens={name: loss_tokens[name] for name in plan.streams},
        squares=sum(int((np.diff(row.starts_P, append=row.tokens) ** 2).sum()) for row in rows),
    )


def micro_batch(rows: Sequence[Row], groups: Sequence[int]) -> MicroBatch:
    """Rows laid on one another, with their loss tokens singled out; the sums of row r go to group `groups[r]`."""
    labels_BT = np.stack([row.labels_T for row in rows])
    kept = np.flatnonzero(labels_BT != IGNORE)
    return MicroBatch(
        ids_BT=np.stack([row.ids_T for row in rows]),
        positions_BT=np.stack([row.positions_T for row in rows]),
        kept_N=kept,
        labels_N=labels_BT.ravel()[kept],
        groups_N=np.repeat(np.array(groups, np.int64), labels_BT.shape[1])[kept],
    )


class Loader:
    """Iterates over the batches of the steps `first` .. `last`; a thread keeps `ahead` of them ready."""

    def __init__(self, plan: Plan, portion: Portion, *, first: int, last: int, ahead: int) -> None:
        self._make = partial(step_batch, plan, portion)
        self._steps = range(first, last + 1)
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[StepBatch]:
        steps = iter(self._steps)
        ready = deque(self._thread.submit(self._make, k) for k in islice(steps, self._ahead))
        while ready:
            batch = ready.popleft().result()
            ready.extend(self._thread.submit(self._make, k) for k in islice(steps, 1))
            yield batch

    def close(self) -> None:
        """Stop the thread; what it had ready is thrown away, since a position is all the state there is."""
        self._thread.shutdown(cancel_futures=True)
