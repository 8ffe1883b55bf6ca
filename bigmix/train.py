"""A recipe and its inputs go in, a trained model comes out: the whole run, from joining the cluster to the export."""

import time
from collections.abc import Mapping
from pathlib import Path

from bigmix import step
from bigmix.checkpoint.listing import Position
from bigmix.data.loader import Loader, Portion
from bigmix.data.order import key_of
from bigmix.dist import leave
from bigmix.engine import join
from bigmix.errors import Interrupted
from bigmix.evaluate import HeldOut, evaluate
from bigmix.export import export
from bigmix.guard import StopFlag
from bigmix.header import show_held_out
from bigmix.inputs import Inputs
from bigmix.recipe import Recipe, plain
from bigmix.report import Timed
from bigmix.run_folder import EXPORT, beginning
from bigmix.schedule import LearningRate, warmup_steps
from bigmix.set_up import Parts, set_up
from bigmix.terminal import Terminal
from bigmix.world import World


def run(recipe: Recipe, inputs: Inputs, world: World, terminal: Terminal) -> None:
    """Train to the end of the budget, from the newest whole checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a whole checkpoint when a signal asked to stop.
    """
    flag = StopFlag(recipe.train.max_minutes)
    cluster = join(world)
    start = beginning(recipe, inputs.content, cluster)
    if start.checkpoint is not None:
        position = start.checkpoint.position
        inputs = inputs.going_on(recipe, position, changed=bool(start.changes))
    if start.step >= inputs.steps and (Path(recipe.output) / EXPORT).is_dir():
        terminal.note(f"{recipe.output} is finished: all {inputs.steps} steps are done")
        leave()
        return
    try:
        # Now, so that a tokenizer that cannot be fetched is not found out at the end.
        tokenizer_folder = inputs.tokenizer_folder if recipe.train.export else None
        parts = set_up(recipe, inputs, cluster, terminal, flag, start)
        _train(parts, first=start.step + 1)
        if tokenizer_folder is not None:
            folder = Path(recipe.output) / EXPORT
            export(parts.engine, cluster, tokenizer_folder, folder)
            terminal.note(f"model written to {folder}")
    finally:
        terminal.close()
    leave()


def _train(parts: Parts, *, first: int) -> None:
    recipe, inputs = parts.recipe, parts.inputs
    portion = Portion(
        rank=parts.cluster.world.rank,
        ranks=parts.cluster.world.size,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=recipe.train.micro_batch_rows,
    )
    if first == 1:
        _evaluate(parts, 0)
    loader = inputs.loader(portion, first=first, ahead=recipe.train.prefetch_steps)
    try:
        _go_through(parts, loader, portion)
    finally:
        # First the depot: the loader's thread may wait for a shard that never comes.
        inputs.depot.close()
        loader.close()
    parts.saver.close()


def _go_through(parts: Parts, loader: Loader, portion: Portion) -> None:
    recipe, inputs, report = parts.recipe, parts.inputs, parts.report
    last = inputs.steps
    learning_rate = _learning_rate(recipe, last)
    began = time.perf_counter()
    for batch in loader:
        fetched = time.perf_counter()
        parts.saver.settle()
        result = step.run(
            parts.engine,
            parts.cluster,
            batch,
            shares=inputs.shares_of_step(batch.step),
            aim=parts.aim,
            lr=learning_rate.at(batch.step),
            chance=key_of(recipe.seed, "dropout", batch.step, portion.rank) >> 1,
            stop_asked=parts.flag.is_set,
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
        is_last = batch.step == last
        if is_last or result.stop_asked or _is_due(batch.step, recipe.train.log_every):
            _tell(parts)
        if is_last or _is_due(batch.step, recipe.train.evaluate_every):
            _evaluate(parts, batch.step)
        if is_last or result.stop_asked or _is_due(batch.step, recipe.train.save_every):
            _save(parts, batch.step)
        if result.stop_asked and not is_last:
            parts.saver.finish()
            raise Interrupted(
                f"stopped on request after step {batch.step} of {last}; the same command goes on from there"
            )
        began = time.perf_counter()


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


def _evaluate(parts: Parts, at_step: int) -> None:
    if not parts.inputs.held_out:
        return
    _tell(parts)
    train = parts.recipe.train
    results: Mapping[str, HeldOut] = evaluate(
        parts.engine,
        parts.cluster,
        parts.inputs.held_out,
        micro_batch_rows=train.micro_batch_rows,
        max_rows=train.evaluate_rows,
    )
    line = parts.report.evaluation(at_step, results)
    if parts.log is not None:
        parts.log.write(line)
    show_held_out(parts.terminal, parts.recipe, at_step, results, line)


def _save(parts: Parts, at_step: int) -> None:
    _tell(parts)
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


def _is_due(at_step: int, every: int) -> bool:
    return every > 0 and at_step % every == 0
