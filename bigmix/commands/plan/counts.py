"""Counts what each source contributes to a run: rows, tokens, loss tokens, gradient and epochs.

No token is read: the tokens of a row follow from the lengths of its documents, and the loss tokens
of a chat's row from the bits of its loss mask.

Letters: R rows of a source, K runs of tokens in the loss.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bigmix.data.packing import DroppedTokens, RowTable
from bigmix.data.records import RowIds
from bigmix.data.run_plan import RunPlan
from bigmix.data.stream import Stream
from bigmix.loss.objective import weigh
from bigmix.recipe import Recipe
from bigmix.seeding import evenly_spaced
from bigmix.types import Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """Rows of a run [R]: tokens, loss tokens, and the sum of the squared lengths of their parts."""

    tokens_R: Ints
    loss_tokens_R: Ints
    sum_sq_lengths_R: Ints


def row_counts(plan: RunPlan, name: str, num_rows: int) -> RowCounts:
    """The counts of the first `num_rows` rows of a source, over all epochs, in the order in which
    they are trained.
    """
    parts = [row_counts_of(part.stream, part.row_ids()) for part in plan.drawn(name, num_rows)]

    def joined(columns: Iterable[Ints]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *columns])

    return RowCounts(
        tokens_R=joined(part.tokens_R for part in parts),
        loss_tokens_R=joined(part.loss_tokens_R for part in parts),
        sum_sq_lengths_R=joined(part.sum_sq_lengths_R for part in parts),
    )


def row_counts_of(stream: Stream, row_ids: RowIds) -> RowCounts:
    """The counts of rows of a stream."""
    columns_3R = np.empty((3, len(row_ids.rows_R)), np.int64)
    for shard in np.unique(row_ids.shards_R).tolist():
        own = np.flatnonzero(row_ids.shards_R == shard)
        columns_3R[:, own] = _columns(stream.table(shard))[:, row_ids.rows_R[own]]
    tokens_R, loss_tokens_R, sum_sq_lengths_R = columns_3R
    return RowCounts(
        tokens_R=tokens_R, loss_tokens_R=loss_tokens_R, sum_sq_lengths_R=sum_sq_lengths_R
    )


def _columns(table: RowTable) -> Ints:
    """Tokens, loss tokens and squared lengths of every row of a shard [3, R]."""
    _, _, low_R, high_R, tokens_R, sum_sq_lengths_R = table.rows_R6.T
    before_K = np.concatenate([[0], np.cumsum(table.runs_K2[:, 1], dtype=np.int64)])
    return np.stack([tokens_R, before_K[high_R] - before_K[low_R], sum_sq_lengths_R])


EXACT_ROWS = 2_000_000  # a longer run is estimated from its first rows
SAMPLE_ROWS = 50_000  # of each source and length of rows, for an estimate
SAMPLE_STEPS = 1_000
_SUMS = ("tokens", "loss_tokens", "sum_sq_lengths")
_AMOUNTS = {
    "rows": "num_rows",
    "tokens": "num_tokens",
    "loss_tokens": "num_loss_tokens",
    "gradient": "gradient",
    "wanted": "wanted",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """One source over the whole run.

    `gradient` adds up its part of the objective over the steps, as the run will weigh it, and
    `wanted` the same as the recipe asks for it. `capacity_tokens` is what its rows could hold,
    `mean_rows_per_step` the mean number of its rows in a step, `num_steps` the number of steps that
    have a row of it. `num_read`, `num_documents` and `dropped` are from its manifest; `lost` is
    what packing leaves out of each epoch.
    """

    role: str
    kind: str
    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    gradient: float
    wanted: float
    epochs: float
    capacity_tokens: int
    mean_rows_per_step: float
    num_steps: int
    num_read: int
    num_documents: int
    dropped: Mapping[str, int]
    lost: DroppedTokens

    @property
    def fill_ratio(self) -> float:
        """The part of its rows that is not padding."""
        return self.num_tokens / max(self.capacity_tokens, 1)

    @property
    def left_out(self) -> dict[str, int]:
        """The number of documents that do not reach the model, by reason; held-out documents are
        left out on purpose and do not count.
        """
        found = {reason: n for reason, n in self.dropped.items() if reason != "held_out"}
        return found | {"longer than a row": self.lost.dropped}

    @property
    def dropped_fraction(self) -> float:
        """The fraction of documents that are left out, of those that were read and not held out."""
        num_kept = self.num_read - self.dropped.get("held_out", 0)
        return sum(self.left_out.values()) / max(num_kept, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The whole run.

    Rows and epochs are always exact; all else is exact where `is_exact`, and otherwise estimated
    from a sample.
    """

    num_steps: int
    sum_sq_lengths: int
    is_exact: bool
    sources: Mapping[str, SourceCounts]

    def shares(self, unit: str) -> dict[str, float]:
        """Each source's part of all rows, tokens, loss_tokens, gradient or wanted gradient."""
        amount = _AMOUNTS[unit]
        values = {name: float(getattr(source, amount)) for name, source in self.sources.items()}
        total = sum(values.values())
        return {name: value / total if total else 0.0 for name, value in values.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walk:
    """Sums over the steps, by source: its gradient as the run weighs it and as the recipe asks for
    it, and the number of steps that have a row of it.
    """

    gradient: Mapping[str, float]
    wanted: Mapping[str, float]
    num_steps: Mapping[str, float]


def count(recipe: Recipe, plan: RunPlan) -> Counts:
    """Count the rows of the run, or only the first rows of each source where the run is long."""
    num_rows, epochs = plan.counts(plan.steps), plan.epochs(plan.steps)
    is_exact = plan.steps * recipe.rows_per_step <= EXACT_ROWS
    by_source = {name: row_counts(plan, name, n) for name, n in num_rows.items() if is_exact}
    sums = {
        name: _sums(by_source[name]) if is_exact else _estimate(plan, name, n)
        for name, n in num_rows.items()
    }
    if is_exact:
        walk = _walk(recipe, plan, by_source)
    else:
        walk = _sample(recipe, plan, {name: each["loss_tokens"] for name, each in sums.items()})
    return Counts(
        num_steps=plan.steps,
        sum_sq_lengths=sum(each["sum_sq_lengths"] for each in sums.values()),
        is_exact=is_exact,
        sources={
            name: SourceCounts(
                role=recipe.sources[name].role,
                kind=stream.manifest.kind,
                num_rows=num_rows[name],
                num_tokens=sums[name]["tokens"],
                num_loss_tokens=sums[name]["loss_tokens"],
                gradient=walk.gradient[name],
                wanted=walk.wanted[name],
                epochs=epochs[name],
                capacity_tokens=plan.capacity_tokens(name, num_rows[name]),
                mean_rows_per_step=num_rows[name] / plan.steps,
                num_steps=round(walk.num_steps[name]),
                num_read=stream.manifest.read,
                num_documents=stream.manifest.documents,
                dropped=stream.manifest.dropped,
                lost=plan.lost(name),
            )
            for name, stream in plan.streams.items()
        },
    )


def _sums(counts: RowCounts) -> dict[str, int]:
    return {name: int(getattr(counts, f"{name}_R").sum()) for name in _SUMS}


def _estimate(plan: RunPlan, name: str, num_rows: int) -> dict[str, int]:
    """The sums of a source, from its first rows of each length."""
    sums = dict.fromkeys(_SUMS, 0)
    for part in plan.drawn(name, num_rows):
        num_drawn = part.end - part.begin
        sample = _sums(row_counts_of(part.stream, part.row_ids(SAMPLE_ROWS)))
        for key, total in sample.items():
            sums[key] += round(total * num_drawn / min(num_drawn, SAMPLE_ROWS))
    return sums


def _walk(recipe: Recipe, plan: RunPlan, by_source: Mapping[str, RowCounts]) -> _Walk:
    """Go through every step, weighed as in the run."""
    before = {
        name: np.concatenate([[0], np.cumsum(counts.loss_tokens_R)]).tolist()
        for name, counts in by_source.items()
    }
    gradient, wanted, num_steps = (dict.fromkeys(by_source, 0.0) for _ in range(3))
    num_drawn = dict.fromkeys(by_source, 0)
    for step in range(1, plan.steps + 1):
        after = plan.counts(step)
        num_rows = {name: after[name] - n for name, n in num_drawn.items()}
        loss_tokens = {name: at[after[name]] - at[num_drawn[name]] for name, at in before.items()}
        shares = plan.shares_of_step(step)
        _add(gradient, weigh(recipe.objective, shares, num_rows, loss_tokens).gradient)
        _add(wanted, shares.loss)
        for name, n in num_rows.items():
            num_steps[name] += n > 0
            num_drawn[name] += n
    return _Walk(gradient=gradient, wanted=wanted, num_steps=num_steps)


def _sample(recipe: Recipe, plan: RunPlan, loss_tokens: Mapping[str, int]) -> _Walk:
    """Go through steps that are spread evenly over the run; under the objective per_token each is
    weighed by the mean loss tokens of a step.
    """
    gradient, wanted, num_steps = (dict.fromkeys(loss_tokens, 0.0) for _ in range(3))
    sampled = evenly_spaced(range(1, plan.steps + 1), SAMPLE_STEPS)
    for step in sampled:
        shares = plan.shares_of_step(step)
        _add(wanted, shares.loss)
        if recipe.objective == "per_source":
            _add(gradient, shares.loss)
        else:
            _add(gradient, weigh("per_token", shares, {}, loss_tokens).gradient)
        num_rows = {name: share * recipe.rows_per_step for name, share in shares.rows.items()}
        _add(num_steps, {name: min(1.0, n) for name, n in num_rows.items()})
    scale = plan.steps / len(sampled)
    return _Walk(
        gradient=gradient,
        wanted=wanted,
        num_steps={name: n * scale for name, n in num_steps.items()},
    )


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] += value
