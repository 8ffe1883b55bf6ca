"""Makes the batch of each step for one rank, in a thread that works ahead of need."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np

from bigmix.cluster.signals import is_done
from bigmix.data.quarantine import BadShard
from bigmix.data.records import RankRows, StepBatch
from bigmix.data.run_plan import RunPlan
from bigmix.data.shards.retry import Stopped
from bigmix.data.source import PreparedSource, ShardStore, needed_in_order
from bigmix.types import Ints


def step_batch(plan: RunPlan, rank_rows: RankRows, step: int) -> StepBatch:
    """The rows of one rank in one step, as micro-batches."""
    rows, first = plan.assembled(rank_rows, step)
    count, size = rank_rows.rows.stop - rank_rows.rows.start, rank_rows.micro_batch_rows
    own = slice(first, first + count)
    names, sources_R = plan.mixture.names, rows.sources_R[own]
    drawn, before = plan.counts(step), plan.counts(step - 1)

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
        substituted=plan.substituted(step),
        tokens=by_source(rows.tokens_R[own]),
        loss_tokens=by_source(rows.loss_tokens_R[own]),
        sum_sq_lengths=int(rows.sum_sq_lengths_R[own].sum()),
    )


class Loader:
    """Iterates over the batches of the steps from `first` to `last`; a thread keeps `ahead` of them
    ready.
    """

    def __init__(
        self, plan: RunPlan, rank_rows: RankRows, *, first: int, last: int, ahead: int
    ) -> None:
        self._batch = partial(step_batch, plan, rank_rows)
        self._steps = range(first, last + 1)
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._has_failed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return (batch for batch in self.unless(lambda: False) if batch is not None)

    def unless(self, gives_up: Callable[[], bool]) -> Iterator[StepBatch | None]:
        """The batches, or None where `gives_up` becomes true while the next batch is not ready; it
        is then still the next.
        """
        steps = iter(self._steps)
        ready = deque(self._thread.submit(self._make, k) for k in islice(steps, self._ahead))
        while ready:
            if not is_done(ready[0], gives_up):
                yield None
                continue
            batch = ready.popleft().result()
            ready.extend(self._thread.submit(self._make, k) for k in islice(steps, 1))
            yield batch

    def _make(self, step: int) -> StepBatch:
        # What failed once would be tried for as long again for each step that is ahead.
        if self._has_failed:
            raise Stopped(f"no batch is made for step {step}, since one before it has failed")
        try:
            return self._batch(step)
        except BaseException:
            self._has_failed = True
            raise

    def close(self) -> None:
        """Stop the thread; the batches that it had ready are dropped, since the position of the run
        is the only state.
        """
        self._thread.shutdown(cancel_futures=True)


class Batches:
    """The batches of one rank from step `first` on, with remote shards fetched ahead of need.

    A shard that cannot be read is returned as a value in place of its batch, and None where
    `gives_up` became true while the next batch was not ready. Close it before the plan or the store
    are used for something else; as a context manager it closes itself.
    """

    def __init__(
        self,
        plan: RunPlan,
        sources: Mapping[str, PreparedSource],
        store: ShardStore,
        rank_rows: RankRows,
        *,
        first: int,
        ahead: int,
        gives_up: Callable[[], bool],
    ) -> None:
        self._store = store
        self._loader = open_loader(plan, sources, store, rank_rows, first=first, ahead=ahead)
        self._batches = self._loader.unless(gives_up)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __next__(self) -> StepBatch | BadShard | None:
        try:
            return next(self._batches)
        except BadShard as bad:
            return bad

    def close(self) -> None:
        """Stop reading and fetching."""
        # The store first: the loader's thread may wait for a shard that never comes.
        self._store.close()
        self._loader.close()


def open_loader(
    plan: RunPlan,
    sources: Mapping[str, PreparedSource],
    store: ShardStore,
    rank_rows: RankRows,
    *,
    first: int,
    ahead: int,
) -> Loader:
    """The batches of one rank from step `first` to the last; remote shards are fetched ahead of
    need.

    An earlier loader must be closed, and before it the store.
    """
    # The order in which shards will be needed supposes that none is open.
    plan.release()
    store.reopen()
    fetched = {name: source for name, source in sources.items() if store.is_fetched(source)}
    if fetched:
        stages = plan.gathered(rank_rows, first=first, last=plan.steps)
        num_shards = {name: plan.num_shards(name) for name in fetched}
        store.fetch_ahead(needed_in_order(stages, fetched, num_shards))
    return Loader(plan, rank_rows, first=first, last=plan.steps, ahead=ahead)
