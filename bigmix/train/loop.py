"""Everything that a run is made of goes in; the steps that are left are trained, logged, evaluated
and saved.

The loop goes in turns. A turn reads its batches from one loader; it ends where the rest must be
read anew, since rows of a bad shard are to be replaced, or since the run goes back to its last
checkpoint.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from bigmix.data.quarantine import BadShard
from bigmix.data.records import StepBatch
from bigmix.errors import BigmixError, Interrupted
from bigmix.evaluation.evaluator import Findings, FirstEvaluation, Interview, examine
from bigmix.evaluation.held_out import Base
from bigmix.evaluation.tables import show_findings
from bigmix.evaluation.tasks.prompts import Asked
from bigmix.evaluation.tasks.runner import write_samples
from bigmix.recipe import Recipe
from bigmix.recipe.schedule import LearningRate, warmup_steps
from bigmix.runs.metrics_log import METRICS, Line, evaluation_at
from bigmix.runs.resume import RollBack
from bigmix.seeding import key_of
from bigmix.train import step
from bigmix.train.inputs import accumulation, what_it_follows_from
from bigmix.train.recovery import name_suspects, roll_back, without_bad_shards
from bigmix.train.setup import Parts, position_of
from bigmix.train.share_control import RuleFailed, progress, shares_from, steer
from bigmix.train.step_metrics import Timed

_RECENT_STEPS = 10  # the longest of them must fit before the end of the time


@dataclass(frozen=True, kw_only=True, slots=True)
class _BadShards:
    """Shards that some ranks could not read for a step, which none of them has trained."""

    step: int
    found: Sequence[BadShard]


@dataclass(kw_only=True, slots=True)
class _Pace:
    """What steps took, in seconds: whole steps of late, and the waits for saves that are in no line
    yet.
    """

    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    saves_told_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steered:
    """After a step the run goes on with other shares, and these parts."""

    step: int
    parts: Parts


def train(parts: Parts, *, first: int) -> Parts:
    """Train from step `first` to the last one; a collective.

    Returns the parts that the run has ended with.

    Raises Interrupted after a whole checkpoint where the flag is set.
    """
    pace = _Pace()
    parts = _catch_up(parts, at_step=first - 1)
    while first <= parts.inputs.steps:
        parts, first = _turn(parts, first, pace)
    parts.saver.close()
    return parts


def _turn(parts: Parts, first: int, pace: _Pace) -> tuple[Parts, int]:
    """Train from a step on with one loader; returns what the next turn is made of, and its first
    step.
    """
    inputs, train = parts.inputs, parts.recipe.train
    loader = inputs.loader(parts.portion, first=first, ahead=train.prefetch_steps)
    try:
        end = _go_through(parts, loader.unless(parts.flag.is_set), first, pace)
    finally:
        # First the depot: the loader's thread may wait for a shard that never comes.
        inputs.depot.close()
        loader.close()
    if isinstance(end, RollBack):
        parts, at_step = roll_back(parts, end)
        return _catch_up(parts, at_step=at_step), at_step + 1
    if isinstance(end, _Steered):
        return end.parts, end.step + 1
    if isinstance(end, _BadShards) and not inputs.replaces_bad_shards:
        _save_finished(parts, end.step - 1)
        raise end.found[0]
    if isinstance(end, _BadShards):
        return without_bad_shards(parts, end.step, end.found), end.step
    return parts, inputs.steps + 1


def _go_through(
    parts: Parts, batches: Iterator[StepBatch | None], first: int, pace: _Pace
) -> RollBack | _BadShards | _Steered | None:
    """Take the steps until one of them ends the turn."""
    outline = step.Outline(
        names=parts.inputs.plan.mixture.names,
        micro_batches=accumulation(parts.recipe, parts.portion.ranks),
    )
    learning_rate = _learning_rate(parts)
    for at_step in range(first, parts.inputs.steps + 1):
        parts.watchdog.doing(f"waiting for the rows of step {at_step}")
        began = time.perf_counter()
        batch = _next_batch(batches)
        fetched = time.perf_counter()
        parts.watchdog.doing(f"agreement on step {at_step}")
        parts.saver.settle()
        ready = _agree(parts, outline, at_step, batch, pace)
        if isinstance(ready, _BadShards):
            return ready
        if at_step in parts.passed_over:
            _pass_over(parts, at_step)
        else:
            result = _train_step(parts, at_step, ready, learning_rate(at_step))
            _add(parts, result, pace, began=began, fetched=fetched)
        end = _after_step(parts, at_step)
        if end is not None:
            return end
    return None


def _next_batch(batches: Iterator[StepBatch | None]) -> StepBatch | BadShard | None:
    """The batch of the next step; None where a request to stop came before it, or what made it
    impossible.
    """
    try:
        return next(batches)
    except BadShard as bad:
        return bad


def _agree(
    parts: Parts,
    outline: step.Outline,
    at_step: int,
    batch: StepBatch | BadShard | None,
    pace: _Pace,
) -> step.Ready | _BadShards:
    """The step as every rank has it, or the shards that any of them could not read for it; a
    collective.

    Does not return where any rank was asked to stop.
    """
    own = None if isinstance(batch, BadShard) else batch
    asked = parts.flag.is_set(needed_s=max(pace.recent_s, default=0.0))
    agreed = step.agree(parts.cluster, own, outline, parts.aim, stop_asked=asked)
    if not agreed.stop_asked and agreed.ready is None:
        everybody = parts.cluster.gather(batch if isinstance(batch, BadShard) else None)
        found = [bad for bad in everybody if bad is not None]
        if found:
            return _BadShards(step=at_step, found=found)
    if agreed.stop_asked or agreed.ready is None:
        _stop(parts, at_step=at_step - 1)
    return agreed.ready


def _train_step(parts: Parts, at_step: int, ready: step.Ready, lr: float) -> step.StepResult:
    parts.watchdog.must_save(True)
    result = step.run(
        parts.engine,
        parts.cluster,
        ready,
        shares=parts.inputs.shares_of_step(at_step),
        aim=parts.aim,
        lr=lr,
        chance=key_of(parts.recipe.seed, "dropout", at_step, parts.portion.rank) >> 1,
        doing=parts.watchdog.doing,
    )
    parts.health.after(at_step, skipped=result.skipped)
    if result.skipped:
        name_suspects(parts, at_step, result.finite_M.tolist())
    return result


def _pass_over(parts: Parts, at_step: int) -> None:
    _tell(parts)
    line = parts.report.passed_over(at_step)
    if parts.log is not None:
        parts.log.write(line)
    parts.terminal.note(f"step {at_step} is passed over: its rows are not trained")


def _add(
    parts: Parts, result: step.StepResult, pace: _Pace, *, began: float, fetched: float
) -> None:
    ended = time.perf_counter()
    parts.report.add(
        Timed(
            result=result,
            data_wait_s=fetched - began,
            save_wait_s=parts.saver.wait_s - pace.saves_told_s,
            step_s=ended - began,
            peak_gib=parts.engine.peak_gib(),
        )
    )
    pace.saves_told_s = parts.saver.wait_s
    if not pace.recent_s:
        # From now on: however little time there is, each start of a run comes a step further.
        parts.flag.set_end(parts.recipe.train.max_minutes, _end_of_job(parts.recipe))
    pace.recent_s.append(ended - began)


def _after_step(parts: Parts, at_step: int) -> RollBack | _Steered | None:
    """What is due after a step. A checkpoint comes before an evaluation, which may be done
    again.
    """
    train, is_last = parts.recipe.train, at_step == parts.inputs.steps
    # While steps are skipped the weights may be what is wrong.
    is_saved = is_last or (parts.saver.is_due(at_step, train.save_every) and parts.health.is_well)
    if is_saved or at_step % train.log_every == 0:
        _tell(parts)
    back = parts.health.asked()
    if back is not None:
        return back
    if is_saved:
        _save(parts, at_step)
    if is_last:
        parts.saver.finish()
        parts.watchdog.must_save(parts.saver.last_step != at_step)
    steered = _evaluate(parts, at_step) if _evaluates(parts, at_step) else parts
    return None if steered is parts else _Steered(step=at_step, parts=steered)


def _stop(parts: Parts, at_step: int) -> NoReturn:
    """Save what was trained since the last checkpoint and end; a collective."""
    saver = parts.saver
    _save_finished(parts, at_step)
    done = f"stopped on request after step {at_step} of {parts.inputs.steps}"
    if not at_step or saver.last_step == at_step:
        raise Interrupted(f"{done}; the same command goes on from there")
    if not parts.health.is_well:
        raise Interrupted(
            f"{done}; it had no finite gradient, so the same command goes on after step"
            f" {saver.last_step}"
        )
    raise BigmixError(
        f"{done}, whose checkpoint could not be written; the same command goes on after step"
        f" {saver.last_step or 0}"
    )


def _save_finished(parts: Parts, at_step: int) -> None:
    """See to it that what was trained until a step is in a whole checkpoint; a collective."""
    saver = parts.saver
    saver.finish()
    if at_step and saver.last_step != at_step and (parts.health.is_well or not saver.last_step):
        _save(parts, at_step)
        saver.finish()


def _tell(parts: Parts) -> None:
    """Write down the steps that are not told yet; all ranks learn of the same spikes."""
    lines = parts.report.read()
    for line in lines:
        if parts.log is not None:
            parts.log.write(line)
        spike = parts.health.loss(int(line["step"] or 0), float(line["loss"] or 0.0))
        if spike is not None:
            parts.terminal.warning(
                f"the loss of step {spike.step} is {spike.loss:.4g}, {spike.deviations:.1f}"
                " standard deviations above those before it"
            )
    if lines:
        parts.terminal.progress(int(lines[-1]["step"] or 0), parts.inputs.steps, lines[-1])


def _catch_up(parts: Parts, *, at_step: int) -> Parts:
    """Do the evaluation after the last trained step, or before the first one, that a run was
    stopped in; or what follows it.
    """
    if not _evaluates(parts, at_step):
        return parts
    path = Path(parts.recipe.output) / METRICS
    own = evaluation_at(path, at_step) if parts.cluster.world.is_first else None
    line, *_ = parts.cluster.gather(own)
    return _evaluate(parts, at_step) if line is None else _steer(parts, at_step, line)


def _evaluates(parts: Parts, at_step: int) -> bool:
    """Whether an evaluation follows a step; there is one before the first and one after the
    last.
    """
    every = parts.recipe.train.evaluate_every
    is_due = at_step in (0, parts.inputs.steps) or (every > 0 and at_step % every == 0)
    return is_due and bool(parts.inputs.held_out or _tasks_at(parts, at_step))


def _tasks_at(parts: Parts, at_step: int) -> dict[str, Asked]:
    """The tasks that are part of the evaluation after a step."""
    last = parts.inputs.steps
    steps = {"ends": (0, last), "last": (last,), "every": (at_step,)}
    return {n: asked for n, asked in parts.tasks.items() if at_step in steps[asked.task.when]}


def _evaluate(parts: Parts, at_step: int) -> Parts:
    """Evaluate after a step; returns the parts that the run goes on with."""
    _tell(parts)
    base = parts.report.base
    known = set(base.losses)
    found = _found(parts, at_step, base) if at_step else _first_found(parts, base)
    show_findings(parts.terminal, parts.recipe, f"step {at_step:,}", found)
    steered = _steer(parts, at_step, found.line)
    if _tasks_at(steered, at_step).keys() != _tasks_at(parts, at_step).keys():
        # The decision has made this step the last one, after which more is asked.
        found = _found(steered, at_step, base)
        show_findings(parts.terminal, parts.recipe, f"step {at_step:,}", found)
    if parts.log is not None:
        folder = Path(parts.recipe.output)
        if set(base.losses) != known:
            base.write(folder)
        write_samples(folder, at_step, found.tasks)
        parts.log.write(found.line | shares_from(steered.inputs, parts.recipe, at_step))
    return steered


def _first_found(parts: Parts, base: Base) -> Findings:
    """What is found before the first step, by an equal run before this one where there was one; a
    collective.
    """
    known, folder = parts.first_evaluations, Path(parts.recipe.output)
    key = what_it_follows_from(parts.recipe, parts.inputs, parts.cluster.world.size)
    first = known.get(key)
    if first is None:
        found = _found(parts, 0, base)
        known[key] = FirstEvaluation(found=found, base=base.copy(), folder=folder)
        return found
    if first.folder != folder:
        parts.terminal.note(
            f"the evaluation before the first step is that of {first.folder}: same model, same data"
        )
    base.take_over(first.base)
    return first.found


def _found(parts: Parts, at_step: int, base: Base) -> Findings:
    """What is found after a step; a collective that does not return where a rank is asked to
    stop.
    """
    recipe = parts.recipe
    tasks = _tasks_at(parts, at_step)
    found = examine(
        parts.engine,
        parts.cluster,
        parts.exam,
        Interview(tasks=tasks, weights=recipe.train.task_weights, seed=recipe.seed),
        step=at_step,
        base=base,
        stop_asked=parts.flag.is_set,
        doing=lambda what: parts.watchdog.doing(f"{what}, after step {at_step}"),
    )
    if found is None:
        _stop(parts, at_step)
    return found


def _steer(parts: Parts, at_step: int, line: Line) -> Parts:
    """Take the decision that is due after an evaluation; where its shares have reached the budget
    the run is whole.
    """
    try:
        steered = steer(parts, at_step, line)
    except RuleFailed:
        _save_finished(parts, at_step)
        raise
    if steered is not parts and steered.inputs.steps == at_step:
        _save(steered, at_step)
        parts.saver.finish()
        parts.watchdog.must_save(parts.saver.last_step != at_step)
    return steered


def _save(parts: Parts, at_step: int) -> None:
    parts.watchdog.doing(f"saving step {at_step}")
    _tell(parts)
    if parts.log is not None:
        parts.log.flush()
    parts.saver.save(parts.engine.states(), position_of(parts, at_step))


def _learning_rate(parts: Parts) -> Callable[[int], float]:
    """The learning rate of each step; where decisions change the number of steps, by the part of
    the run that is done.
    """
    train, inputs, decisions = parts.recipe.train, parts.inputs, parts.decisions
    steps = inputs.planned_steps if decisions else inputs.steps
    rate = LearningRate(
        peak=train.lr,
        steps=steps,
        warmup_steps=warmup_steps(train.warmup, steps),
        shape=train.schedule,
        decay=train.decay,
        final=train.final_lr,
    )
    if not decisions:
        return rate.at
    return lambda step: rate.at(steps * progress(step, inputs.steps, decisions))


def _end_of_job(recipe: Recipe) -> float | None:
    """When the run must stop for its Slurm job to end well, in seconds since 1970."""
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(told) - 60 * recipe.train.stop_before_end_minutes if told.isdigit() else None
