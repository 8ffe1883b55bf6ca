"""Opened inputs go in; what each source gives to the run comes out: rows, tokens, loss tokens,
gradient, epochs.

A plan goes in, how many tokens and loss tokens each row of a source has comes out, without a token
being read.

The lengths of documents give the tokens of a row; the bits of a chat's loss mask, one a token, its
loss tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.data.packing import DroppedTokens, RowTable
from bigmix.data.records import RowIds
from bigmix.data.run_plan import RunPlan
from bigmix.data.stream import Stream
from bigmix.loss.objective import weigh
from bigmix.recipe import Recipe
from bigmix.types import Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """Rows of a run [R]: tokens, loss tokens, and the sum over parts of their squared lengths."""

    tokens_R: Ints
    loss_tokens_R: Ints
    sum_sq_lengths_R: Ints


def row_counts(plan: RunPlan, name: str, num_rows: int) -> RowCounts:
    """The first `num_rows` rows of a source in the order in which they are trained, over all
    epochs.
    """
    parts = [row_counts_of(part.stream, part.row_ids()) for part in plan.drawn(name, num_rows)]

    def joined(columns: Iterable[Ints]) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *columns])

    return RowCounts(
        tokens_R=joined(part.tokens_R for part in parts),
        loss_tokens_R=joined(part.loss_tokens_R for part in parts),
        sum_sq_lengths_R=joined(part.sum_sq_lengths_R for part in parts),
    )


def row_counts_of(stream: Stream, places: RowIds) -> RowCounts:
    """Rows of a stream."""
    columns_3R = np.empty((3, len(places.rows_R)), np.int64)
    for shard in np.unique(places.shards_R).tolist():
        own = np.flatnonzero(places.shards_R == shard)
        columns_3R[:, own] = _columns(stream.table(shard))[:, places.rows_R[own]]
    tokens_R, loss_tokens_R, sum_sq_lengths_R = columns_3R
    return RowCounts(
        tokens_R=tokens_R, loss_tokens_R=loss_tokens_R, sum_sq_lengths_R=sum_sq_lengths_R
    )


def _columns(table: RowTable) -> Ints:
    """Tokens, loss tokens and squares of every row of a shard [3, R]."""
    _, _, low_R, high_R, tokens_R, sum_sq_lengths_R = table.rows_R6.T
    before_K = np.concatenate([[0], np.cumsum(table.runs_K2[:, 1], dtype=np.int64)])
    return np.stack([tokens_R, before_K[high_R] - before_K[low_R], sum_sq_lengths_R])


EXACT_ROWS = 2_000_000  # a longer run is estimated from the rows that come first
SAMPLE_ROWS = 50_000  # of each source and length of rows, for an estimate
SAMPLE_STEPS = 1_000
_UNITS = ("tokens", "loss_tokens", "sum_sq_lengths")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """One source over the whole run; `gradient` adds up its part of each step's objective.

    `room` is what its rows could hold in tokens, `due` how many rows a step has of it in the mean,
    `steps` in how many steps it is; `read`, `documents` and `dropped` are what its manifest says,
    `lost` what packing leaves out of each epoch.
    """

    role: str
    kind: str
    rows: int
    tokens: int
    loss_tokens: int
    gradient: float
    wanted: float
    epochs: float
    room: int
    due: float
    steps: int
    read: int
    documents: int
    dropped: Mapping[str, int]
    lost: DroppedTokens

    @property
    def filled(self) -> float:
        """The part of its rows that is not padding."""
        return self.tokens / max(self.room, 1)

    @property
    def left_out(self) -> dict[str, int]:
        """Documents that do not reach the model, by reason; holding some out was asked for."""
        found = {reason: n for reason, n in self.dropped.items() if reason != "held_out"}
        return found | {"longer than a row": self.lost.dropped}

    @property
    def dropped_fraction(self) -> float:
        """These, of all that were read and not held out."""
        kept = self.read - self.dropped.get("held_out", 0)
        return sum(self.left_out.values()) / max(kept, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The whole run.

    Rows and epochs are always exact; the rest is where `is_exact`, else estimated from a sample.
    """

    steps: int
    sum_sq_lengths: int
    is_exact: bool
    sources: Mapping[str, SourceCounts]

    def shares(self, unit: str) -> dict[str, float]:
        """Each source's part of all rows, tokens, loss_tokens or gradient."""
        values = {name: float(getattr(source, unit)) for name, source in self.sources.items()}
        total = sum(values.values())
        return {name: value / total if total else 0.0 for name, value in values.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Walk:
    """Sums over the steps, by source: gradient as it comes out and as the recipe asks for it, steps
    that have it.
    """

    gradient: Mapping[str, float]
    wanted: Mapping[str, float]
    steps: Mapping[str, float]


def count(recipe: Recipe, plan: RunPlan) -> Counts:
    """Walk through the rows of the run, or through the first rows of each source where the run is
    long.
    """
    streams, num_rows = plan.streams, plan.steps * recipe.rows_per_step
    rows = plan.counts(plan.steps)
    epochs = plan.epochs(plan.steps)
    is_exact = num_rows <= EXACT_ROWS
    row_counts_by_source = {name: row_counts(plan, name, n) for name, n in rows.items() if is_exact}
    sums = {
        name: _sums(row_counts_by_source[name]) if is_exact else _estimate(plan, name, n)
        for name, n in rows.items()
    }
    if is_exact:
        walk = _walk(recipe, plan, row_counts_by_source)
    else:
        walk = _sample(recipe, plan, {name: each["loss_tokens"] for name, each in sums.items()})
    return Counts(
        steps=plan.steps,
        sum_sq_lengths=sum(each["sum_sq_lengths"] for each in sums.values()),
        is_exact=is_exact,
        sources={
            name: SourceCounts(
                role=recipe.sources[name].role,
                kind=stream.manifest.kind,
                rows=rows[name],
                tokens=sums[name]["tokens"],
                loss_tokens=sums[name]["loss_tokens"],
                gradient=walk.gradient[name],
                wanted=walk.wanted[name],
                epochs=epochs[name],
                room=plan.capacity_tokens(name, rows[name]),
                due=rows[name] / plan.steps,
                steps=round(walk.steps[name]),
                read=stream.manifest.read,
                documents=stream.manifest.documents,
                dropped=stream.manifest.dropped,
                lost=plan.lost(name),
            )
            for name, stream in streams.items()
        },
    )


def _sums(row_counts: RowCounts) -> dict[str, int]:
    return {unit: int(getattr(row_counts, f"{unit}_R").sum()) for unit in _UNITS}


def _estimate(plan: RunPlan, name: str, num_rows: int) -> dict[str, int]:
    """The sums of a source from the first of its rows of each length."""
    sums = dict.fromkeys(_UNITS, 0)
    for part in plan.drawn(name, num_rows):
        count = part.end - part.begin
        row_counts = row_counts_of(part.stream, part.row_ids(SAMPLE_ROWS))
        for unit, total in _sums(row_counts).items():
            sums[unit] += round(total * count / min(count, SAMPLE_ROWS))
    return sums


def _walk(recipe: Recipe, plan: RunPlan, row_counts_by_source: Mapping[str, RowCounts]) -> _Walk:
    """Every step as the run will weigh it."""
    before = {
        name: np.concatenate([[0], np.cumsum(row_counts.loss_tokens_R)]).tolist()
        for name, row_counts in row_counts_by_source.items()
    }
    gradient, wanted, steps = (dict.fromkeys(row_counts_by_source, 0.0) for _ in range(3))
    seen = dict.fromkeys(row_counts_by_source, 0)
    for step in range(1, plan.steps + 1):
        drawn = plan.counts(step)
        rows = {name: drawn[name] - n for name, n in seen.items()}
        loss_tokens = {n: at[seen[n] + rows[n]] - at[seen[n]] for n, at in before.items()}
        shares = plan.shares_of_step(step)
        _add(gradient, weigh(recipe.objective, shares, rows, loss_tokens).gradient)
        _add(wanted, shares.loss)
        for name, n in rows.items():
            steps[name] += n > 0
            seen[name] += n
    return _Walk(gradient=gradient, wanted=wanted, steps=steps)


def _sample(recipe: Recipe, plan: RunPlan, loss_tokens: Mapping[str, int]) -> _Walk:
    """Steps spread evenly over the run; per_token takes the loss tokens of a mean step."""
    gradient, wanted, steps = (dict.fromkeys(loss_tokens, 0.0) for _ in range(3))
    sampled = _spread(plan.steps)
    for step in sampled:
        shares = plan.shares_of_step(step)
        due = {name: share * recipe.rows_per_step for name, share in shares.rows.items()}
        _add(wanted, shares.loss)
        if recipe.objective == "per_source":
            _add(gradient, shares.loss)
        else:
            _add(gradient, weigh("per_token", shares, {}, loss_tokens).gradient)
        _add(steps, {name: min(1.0, rows) for name, rows in due.items()})
    scale = plan.steps / len(sampled)
    return _Walk(
        gradient=gradient, wanted=wanted, steps={name: n * scale for name, n in steps.items()}
    )


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] += value


def _spread(steps: int) -> Sequence[int]:
    most = min(steps, SAMPLE_STEPS)
    return [1 + index * steps // most for index in range(most)]
