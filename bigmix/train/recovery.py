"""Recovers a run from steps without a finite gradient, from spikes of the loss and from bad
shards.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bigmix.data.packing import PADDING
from bigmix.data.quarantine import BadShard
from bigmix.data.records import RankRows
from bigmix.data.run_plan import RunPlan
from bigmix.errors import BigmixError
from bigmix.recipe import differences, from_plain
from bigmix.runs.checkpoints import Position, put_aside
from bigmix.runs.layout import CHECKPOINTS, LOG
from bigmix.runs.resume import (
    RecipeChange,
    RollBack,
    SkippedSteps,
    newest_complete,
    read_skipped_steps,
    write_skipped_steps,
)
from bigmix.train.saving import save_finished
from bigmix.train.state import Run, TrainState, restore
from bigmix.train.step import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class NonfiniteRow:
    """A row of a micro-batch on a rank: documents `first_document` ..

    `last_document` of a shard are in it.
    """

    step: int
    rank: int
    micro_batch: int
    source: str
    epoch: int
    shard: str
    row: int
    first_document: int
    last_document: int


def nonfinite_rows(
    plan: RunPlan, rank_rows: RankRows, step: int, micro_batches: Sequence[int]
) -> list[NonfiniteRow]:
    """The rows of some micro-batches of a rank in a step; their shards are read again."""
    row_ids = plan.row_ids_of_rank(rank_rows, step).ids()
    streams = plan.streams_at(step)
    found = []
    for micro_batch in micro_batches:
        begin = micro_batch * rank_rows.micro_batch_rows
        for row_id in row_ids[begin : begin + rank_rows.micro_batch_rows]:
            stream = streams[row_id.source]
            documents = stream.rows(row_id.shard, np.array([row_id.row])).documents_P
            documents = documents[documents != PADDING]
            found.append(
                NonfiniteRow(
                    step=step,
                    rank=rank_rows.rank,
                    micro_batch=micro_batch,
                    source=row_id.source,
                    epoch=row_id.epoch,
                    shard=stream.manifest.shards[row_id.shard].file,
                    row=row_id.row,
                    first_document=int(documents.min()),
                    last_document=int(documents.max()),
                )
            )
    return found


NOT_FINITE = "not-finite.jsonl"


def observe(run: Run, state: TrainState, result: StepResult) -> None:
    """Take note of a step; where its gradient was not finite, report the rows that may be the
    cause, which is a collective.
    """
    run.health.observe(result.step, skipped=result.skipped)
    if result.skipped:
        report_nonfinite_rows(run, state, result.step, result.finite_M.tolist())


def report_nonfinite_rows(run: Run, state: TrainState, step: int, finite_M: Sequence[bool]) -> None:
    """Report and write down the rows of a step that was skipped; a collective.

    Those of the micro-batches whose loss is not finite, and all of them where only the gradient is
    not.
    """
    own = [number for number, is_finite in enumerate(finite_M) if not is_finite]
    is_by_loss = any(run.cluster.gather(bool(own)))
    blamed = own if is_by_loss else range(len(finite_M))
    rows = nonfinite_rows(state.plan, run.rank_rows, step, blamed)
    everywhere = [row for part in run.cluster.gather(rows) for row in part]
    if not run.cluster.world.is_first:
        return
    path = Path(run.recipe.output) / LOG / NOT_FINITE
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in everywhere)
    what = (
        "the loss is not finite" if is_by_loss else "the gradient is not finite, though the loss is"
    )
    more = f" and {len(everywhere) - 1} rows more" if len(everywhere) > 1 else ""
    run.terminal.warning(
        f"step {step} was skipped on all ranks: {what} for {_format_row(everywhere[0])}{more};"
        f" all are listed in {path}"
    )


def _format_row(row: NonfiniteRow) -> str:
    documents = f"{row.first_document} to {row.last_document}"
    if row.first_document == row.last_document:
        documents = str(row.first_document)
    return f"row {row.row} of {row.shard} of {row.source} (documents {documents}; rank {row.rank})"


def roll_back(run: Run, state: TrainState, back: RollBack) -> TrainState:
    """Go back to the last checkpoint before some steps, which are skipped from now on.

    A collective, while no loader is open. Raises BigmixError where there is none, or where the run
    has gone back too often.
    """
    run.watchdog.doing("going back to a checkpoint")
    run.saver.finish()
    recipe, folder = run.recipe, Path(run.recipe.output)
    skipped_steps = _record_skipped(run, folder, back)
    found = newest_complete(folder / CHECKPOINTS, run.cluster, before=min(back.steps)).listed
    if found is None or _is_of_other_rows(run, state, found.position):
        raise BigmixError(
            f"{back.reason}, and there is no checkpoint from before that to go back to; the same"
            " command starts from scratch and skips step"
            f" {', '.join(map(str, sorted(skipped_steps.steps)))}; a smaller checkpoint.every loses"
            " less"
        )
    if len(skipped_steps.times) > recipe.health.most_roll_backs:
        raise BigmixError(
            f"{back.reason}, and the run has gone back {recipe.health.most_roll_backs} times"
            f" already; look at the rows in {folder / LOG / NOT_FINITE} and at the learning rate;"
            " health.most_roll_backs allows more"
        )
    step = found.position.step
    run.terminal.warning(
        f"{back.reason}: the run goes back to step {step} and skips step"
        f" {', '.join(map(str, back.steps))}"
    )
    if run.cluster.world.is_first:
        put_aside(folder / CHECKPOINTS, after_step=step)
    run.metrics.go_back(step)
    restore(run, found)
    skipped = state.skipped_steps | frozenset(back.steps)
    return _at_decisions_of(run, replace(state, step=step, skipped_steps=skipped), found.position)


def _is_of_other_rows(run: Run, state: TrainState, position: Position) -> bool:
    """Whether a position is from before the recipe was changed, where its rows have no meaning."""
    if position.step >= state.plan.segment.after:
        return False
    # Under the same recipe only decisions begin a new segment.
    old = from_plain(position.recipe, "a checkpoint")
    return not run.recipe.controllers or any(
        RecipeChange(key=key, old=before, new=after).moves_rows
        for key, before, after in differences(old, run.recipe)
    )


def _at_decisions_of(run: Run, state: TrainState, position: Position) -> TrainState:
    """The state with the shares of a position; what was decided after it is decided again."""
    if not run.recipe.controllers:
        return state
    now = replace(position, data=replace(position.data, quarantine=state.plan.quarantine))
    plan = run.inputs.resumed_plan(run.recipe, now, new_segment=False)
    run.metrics.report.follow(plan.epochs)
    return replace(state, plan=plan, decisions=tuple(position.decisions))


def _record_skipped(run: Run, folder: Path, back: RollBack) -> SkippedSteps:
    """The steps that the run skips, these included; written first, so that a run that dies now
    knows of them.
    """
    own = None
    if run.cluster.world.is_first:
        own = SkippedSteps(times=(*read_skipped_steps(folder).times, back))
        write_skipped_steps(folder, own)
    recorded, *_ = run.cluster.gather(own)
    assert isinstance(recorded, SkippedSteps)
    return recorded


def replace_shards(run: Run, state: TrainState, found: Sequence[BadShard]) -> TrainState:
    """The state with rows of these shards replaced from the next step on; a collective, while no
    loader is open.

    Raises BadShard, once everything trained so far is saved, where the recipe has such a run fail,
    and where the shards were replaced already; BigmixError where a source has no shard left.
    """
    if not run.inputs.replaces_bad_shards:
        save_finished(run, state)
        raise found[0]
    quarantine, new = state.plan.quarantine.extended(found, state.step + 1)
    if not new:
        raise found[0]
    for bad in new:
        run.terminal.warning(
            f"from step {state.step + 1} on rows of other shards are trained in place of those of"
            f" {bad.file} of {bad.source}: {bad.reason}"
        )
    return replace(state, plan=state.plan.with_quarantine(quarantine))
