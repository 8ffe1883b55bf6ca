"""A recipe and its inputs go in, a trained model comes out: the whole run, from joining the cluster to the export."""

import os
import time
from collections import deque
from pathlib import Path
from typing import NoReturn

from bigmix import step
from bigmix.beats import Limits
from bigmix.checkpoint.listing import Position
from bigmix.data.loader import Loader, Portion
from bigmix.data.order import key_of
from bigmix.dist import Cluster, leave
from bigmix.engine import join
from bigmix.errors import BigmixError, Interrupted
from bigmix.evaluate import evaluate
from bigmix.export import export
from bigmix.guard import StopFlag
from bigmix.header import show_held_out
from bigmix.inputs import Inputs, accumulation
from bigmix.metrics import METRICS, has_evaluation
from bigmix.recipe import Recipe, plain
from bigmix.report import Timed
from bigmix.run_folder import EXPORT, LOG, Beginning, beginning
from bigmix.schedule import LearningRate, warmup_steps
from bigmix.set_up import Parts, set_up
from bigmix.terminal import Terminal
from bigmix.watchdog import Watchdog
from bigmix.world import World

_RECENT_STEPS = 10  # the longest of them must fit before the end of the time


def run(recipe: Recipe, inputs: Inputs, world: World, terminal: Terminal, flag: StopFlag) -> None:
    """Train to the end of the budget, from the newest whole checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a whole checkpoint when the flag is set.
    """
    cluster = join(world)
    train = recipe.train
    limits = Limits(dead_s=train.dead_after_s, hang_s=60 * train.hang_minutes)
    watchdog = Watchdog(cluster, flag, limits, Path(recipe.output) / LOG)
    try:
        _go_on(recipe, inputs, cluster, terminal, flag, watchdog)
    except BaseException as error:
        watchdog.fail(error)
        raise
    finally:
        terminal.close()
    watchdog.close()
    leave()


def _go_on(
    recipe: Recipe,
    inputs: Inputs,
    cluster: Cluster,
    terminal: Terminal,
    flag: StopFlag,
    watchdog: Watchdog,
) -> None:
    """Do what a run has still to do; what is done already is left as it is."""
    start = beginning(recipe, inputs.content, cluster)
    if start.checkpoint is not None:
        position = start.checkpoint.position
        inputs = inputs.going_on(recipe, position, changed=bool(start.changes))
    if _is_finished(recipe, inputs, cluster, start):
        terminal.note(f"{recipe.output} is finished: all {inputs.steps} steps are done")
        return
    # Now, so that a tokenizer that cannot be fetched is not found out at the end.
    tokenizer_folder = inputs.tokenizer_folder if recipe.train.export else None
    parts = set_up(recipe, inputs, cluster, terminal, flag, watchdog, start)
    try:
        _train(parts, first=start.step + 1)
        if tokenizer_folder is not None:
            folder = Path(recipe.output) / EXPORT
            watchdog.doing(f"writing {folder}")
            export(parts.engine, cluster, tokenizer_folder, folder)
            terminal.note(f"model written to {folder}")
    finally:
        if parts.log is not None:
            parts.log.close()


def _is_finished(recipe: Recipe, inputs: Inputs, cluster: Cluster, start: Beginning) -> bool:
    """Whether nothing is left to do, as the first rank sees it: folders may look older from other machines."""
    has_all = start.step >= inputs.steps
    if cluster.world.is_first and has_all:
        folder = Path(recipe.output)
        has_all = (folder / EXPORT).is_dir() or not recipe.train.export
        has_all &= not inputs.held_out or has_evaluation(folder / METRICS, start.step)
    return bool(cluster.gather(has_all)[0])


def _train(parts: Parts, *, first: int) -> None:
    recipe, inputs, world = parts.recipe, parts.inputs, parts.cluster.world
    portion = Portion(
        rank=world.rank,
        ranks=world.size,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=recipe.train.micro_batch_rows,
    )
    _catch_up(parts, at_step=first - 1)
    loader = inputs.loader(portion, first=first, ahead=recipe.train.prefetch_steps)
    try:
        _go_through(parts, loader, first)
    finally:
        # First the depot: the loader's thread may wait for a shard that never comes.
        inputs.depot.close()
        loader.close()
    parts.saver.close()


def _catch_up(parts: Parts, *, at_step: int) -> None:
    """Do the evaluation after the last trained step, or before the first one, that a run was stopped in."""
    if not _evaluates(parts, at_step):
        return
    path = Path(parts.recipe.output) / METRICS
    is_first = parts.cluster.world.is_first
    (is_done, *_) = parts.cluster.gather(is_first and has_evaluation(path, at_step))
    if not is_done:
        _evaluate(parts, at_step)


def _go_through(parts: Parts, loader: Loader, first: int) -> None:
    recipe, inputs, report = parts.recipe, parts.inputs, parts.report
    outline = step.Outline(
        names=inputs.plan.mixture.names,
        micro_batches=accumulation(recipe, parts.cluster.world.size),
    )
    learning_rate = _learning_rate(recipe, inputs.steps)
    recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
    next_step = first
    began = time.perf_counter()
    for batch in loader.unless(parts.flag.is_set):
        fetched = time.perf_counter()
        parts.watchdog.doing(f"agreement on step {next_step}")
        parts.saver.settle()
        asked = parts.flag.is_set(needed_s=max(recent_s, default=0.0))
        agreed = step.agree(parts.cluster, batch, outline, parts.aim, stop_asked=asked)
        if agreed.stop_asked or agreed.ready is None:
            _stop(parts, at_step=next_step - 1)
        parts.watchdog.must_save(True)
        result = step.run(
            parts.engine,
            parts.cluster,
            agreed.ready,
            shares=inputs.shares_of_step(next_step),
            aim=parts.aim,
            lr=learning_rate.at(next_step),
            chance=key_of(recipe.seed, "dropout", next_step, parts.cluster.world.rank) >> 1,
            doing=parts.watchdog.doing,
        )
        ended = time.perf_counter()
        report.add(
            Timed(
                result=result,
                data_wait_s=fetched - began,
                step_s=ended - began,
                peak_gib=parts.engine.peak_gib(),
            )
        )
        if not recent_s:
            # From now on: however little time there is, each start of a run comes a step further.
            parts.flag.set_end(recipe.train.max_minutes, _end_of_job(recipe))
        recent_s.append(ended - began)
        _after_step(parts, next_step)
        next_step += 1
        parts.watchdog.doing(f"waiting for the rows of step {next_step}")
        began = time.perf_counter()


def _after_step(parts: Parts, at_step: int) -> None:
    """What is due after a step. A checkpoint comes before an evaluation, which may be done again."""
    train, is_last = parts.recipe.train, at_step == parts.inputs.steps
    if is_last or _is_due(at_step, train.log_every):
        _tell(parts)
    if is_last or _is_due(at_step, train.save_every):
        _save(parts, at_step)
    if is_last:
        parts.saver.finish()
        parts.watchdog.must_save(parts.saver.last_step != at_step)
    if _evaluates(parts, at_step):
        _evaluate(parts, at_step)


def _stop(parts: Parts, at_step: int) -> NoReturn:
    """Save what was trained since the last checkpoint and end; a collective."""
    saver = parts.saver
    saver.finish()
    if at_step and saver.last_step != at_step:
        _save(parts, at_step)
        saver.finish()
    if at_step and saver.last_step != at_step:
        raise BigmixError(
            f"stopped on request after step {at_step}, whose checkpoint could not be written; the same command goes on "
            f"after step {saver.last_step or 0}"
        )
    raise Interrupted(
        f"stopped on request after step {at_step} of {parts.inputs.steps}; the same command goes on from there"
    )


def _tell(parts: Parts) -> None:
    lines = parts.report.read()
    if parts.log is None:
        return
    for line in lines:
        parts.log.write(line)
        if line["grad_norm"] is None or line["grad_norm"] != line["grad_norm"]:
            parts.terminal.warning(f"the gradient of step {line['step']} is not finite")
    if lines:
        parts.terminal.progress(int(lines[-1]["step"] or 0), parts.inputs.steps, lines[-1])


def _evaluates(parts: Parts, at_step: int) -> bool:
    """Whether an evaluation follows a step; there is one before the first and one after the last."""
    ends = (0, parts.inputs.steps)
    is_due = at_step in ends or _is_due(at_step, parts.recipe.train.evaluate_every)
    return is_due and bool(parts.inputs.held_out)


def _evaluate(parts: Parts, at_step: int) -> None:
    _tell(parts)
    train = parts.recipe.train
    results = evaluate(
        parts.engine,
        parts.cluster,
        parts.inputs.held_out,
        micro_batch_rows=train.micro_batch_rows,
        max_rows=train.evaluate_rows,
        stop_asked=parts.flag.is_set,
        doing=lambda what: parts.watchdog.doing(f"{what}, after step {at_step}"),
    )
    if results is None:
        _stop(parts, at_step)
    line = parts.report.evaluation(at_step, results)
    if parts.log is not None:
        parts.log.write(line)
    show_held_out(parts.terminal, parts.recipe, at_step, results, line)


def _save(parts: Parts, at_step: int) -> None:
    parts.watchdog.doing(f"saving step {at_step}")
    _tell(parts)
    if parts.log is not None:
        parts.log.flush()
    plan = parts.inputs.plan
    position = Position(
        step=at_step,
        report=parts.report.state(),
        recipe=plain(parts.recipe),
        chapter=plan.chapter,
        standing=plan.standing(at_step),
        content=parts.inputs.content,
        quarantine=plan.quarantine,
    )
    parts.saver.save(parts.engine.states(), position)


def _learning_rate(recipe: Recipe, steps: int) -> LearningRate:
    train = recipe.train
    return LearningRate(
        peak=train.lr,
        steps=steps,
        warmup_steps=warmup_steps(train.warmup, steps),
        shape=train.schedule,
        decay=train.decay,
        final=train.final_lr,
    )


def _end_of_job(recipe: Recipe) -> float | None:
    """When the run must stop for its Slurm job to end well, in seconds since 1970."""
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(told) - 60 * recipe.train.stop_before_end_minutes if told.isdigit() else None


def _is_due(at_step: int, every: int) -> bool:
    return every > 0 and at_step % every == 0
