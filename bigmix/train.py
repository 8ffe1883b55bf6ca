"""A recipe and its inputs go in, a trained model comes out: the whole run, from joining the cluster to the export."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigmix import checkpoint, step
from bigmix.checkpoint import Position
from bigmix.data.loader import Loader, Portion
from bigmix.data.order import key_of
from bigmix.dist import Cluster, leave
from bigmix.ds_config import fill
from bigmix.engine import AdamW, Engine, Frozen, device_of, join, sharded_construction
from bigmix.errors import Interrupted
from bigmix.evaluate import HeldOut, evaluate
from bigmix.export import export
from bigmix.flops import cost_of, count_parameters, peak_flops
from bigmix.guard import StopFlag
from bigmix.header import show_header, show_held_out
from bigmix.inputs import Inputs, accumulation
from bigmix.loss.backend import backend_of, choose_backend
from bigmix.loss.mixed import Computing
from bigmix.loss.terms import Statistic, Terms
from bigmix.metrics import RunLog
from bigmix.model import (
    FrozenModel,
    build,
    choose_attention,
    choose_dtype,
    load,
    read_config,
)
from bigmix.model_checks import check_config, check_reference
from bigmix.recipe import Recipe, to_yaml
from bigmix.records import Choice
from bigmix.reference import Anchor
from bigmix.report import Report, Timed
from bigmix.run_folder import CHECKPOINTS, EXPORT, LOG, Beginning, beginning, write_recipe
from bigmix.schedule import LearningRate, warmup_steps
from bigmix.soundness import check_model, check_reference_model
from bigmix.terminal import Terminal
from bigmix.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop moves values between."""

    recipe: Recipe
    inputs: Inputs
    cluster: Cluster
    engine: Engine
    anchor: Anchor | None
    report: Report
    log: RunLog | None
    terminal: Terminal
    flag: StopFlag


def run(recipe: Recipe, inputs: Inputs, world: World, terminal: Terminal) -> None:
    """Train to the end of the budget, from the newest whole checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a whole checkpoint when a signal asked to stop.
    """
    flag = StopFlag()
    cluster = join(world)
    # Every file of a checkpoint is read to verify it: once, not by each rank.
    (start, *_) = cluster.gather(beginning(recipe) if world.is_first else None)
    if start.checkpoint is not None:
        checkpoint.check_ranks(start.checkpoint, start.ranks, world.size)
    if start.position.step >= inputs.steps and (Path(recipe.output) / EXPORT).is_dir():
        terminal.note(f"{recipe.output} is finished: all {inputs.steps} steps are done")
        leave()
        return
    try:
        # Now, so that a tokenizer that cannot be fetched is not found out at the end.
        tokenizer_folder = inputs.tokenizer_folder if recipe.train.export else None
        parts = _set_up(recipe, inputs, cluster, terminal, flag, start)
        _train(parts, first=start.position.step + 1)
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


def _go_through(parts: Parts, loader: Loader, portion: Portion) -> None:
    recipe, inputs, report = parts.recipe, parts.inputs, parts.report
    last = inputs.steps
    learning_rate = _learning_rate(recipe, last)
    began = time.perf_counter()
    for batch in loader:
        fetched = time.perf_counter()
        result = step.run(
            parts.engine,
            parts.cluster,
            batch,
            shares=inputs.shares_of_step(batch.step),
            objective=recipe.objective,
            lr=learning_rate.at(batch.step),
            chance=key_of(recipe.seed, "dropout", batch.step, portion.rank) >> 1,
            stop_asked=parts.flag.is_set,
            anchor=parts.anchor,
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
            raise Interrupted(
                f"stopped on request after step {batch.step} of {last}; the same command goes on from there"
            )
        began = time.perf_counter()


def _set_up(
    recipe: Recipe,
    inputs: Inputs,
    cluster: Cluster,
    terminal: Terminal,
    flag: StopFlag,
    start: Beginning,
) -> Parts:
    world, device = cluster.world, device_of(cluster.world)
    _log_to_file(Path(recipe.output) / LOG, world)
    config = read_config(recipe.model.path, recipe.model.config)
    check_config(recipe, inputs.manifest, config)
    dtype = choose_dtype(recipe.model.dtype, device)
    attention = choose_attention(recipe.model.attention, config, device, dtype.value)
    backend = choose_backend(recipe.loss.backend, device)
    keys = fill(
        inputs.ds_keys,
        micro_batch_rows=recipe.train.micro_batch_rows,
        accumulation=accumulation(recipe, world.size),
        ranks=world.size,
        clip=recipe.train.clip,
        dtype=dtype.value,
    )
    model = build(
        config,
        recipe.model.path,
        dtype=dtype.value,
        attention=attention.value,
        activation_checkpointing=recipe.model.activation_checkpointing,
        terms=Terms(
            label_smoothing=recipe.loss.label_smoothing,
            z_loss=recipe.loss.z_loss,
            entropy=recipe.loss.entropy,
        ),
        computing=_computing(recipe, backend),
        seed=recipe.seed,
        construction=sharded_construction(keys),
    )
    train = recipe.train
    adamw = AdamW(betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)
    engine = Engine(model, keys, adamw)
    check_model(engine, config.vocab_size)
    anchor = _anchor(recipe, inputs, config, keys, device)
    peak = peak_flops(device, dtype.value)
    report = Report(
        tuple(recipe.sources),
        inputs.plan.epochs,
        cost=cost_of(model.lm),
        peak_flops=peak * world.size if peak else None,
        measured=_measured(recipe),
    )
    show_header(
        terminal, recipe, inputs, world,
        parameters=count_parameters(model.lm), keys=keys, dtype=dtype, attention=attention, loss=backend,
    )  # fmt: skip
    for note in inputs.notes:
        terminal.note(note)
    _resume(engine, report, terminal, start)
    log = _open_log(recipe, inputs, start) if world.is_first else None
    return Parts(
        recipe=recipe, inputs=inputs, cluster=cluster, engine=engine, anchor=anchor,
        report=report, log=log, terminal=terminal, flag=flag,
    )  # fmt: skip


def _anchor(
    recipe: Recipe, inputs: Inputs, config: Any, keys: Mapping[str, Any], device: torch.device
) -> Anchor | None:
    """The frozen model of the recipe, sharded like the trained one."""
    if recipe.reference is None:
        return None
    path = recipe.reference_path
    reference = read_config(path, None)
    check_reference(recipe, inputs.manifest, config, reference)
    dtype = choose_dtype(recipe.model.dtype, device).value
    model = FrozenModel(
        load(
            reference,
            path,
            dtype=dtype,
            attention=choose_attention(recipe.model.attention, reference, device, dtype).value,
            seed=recipe.seed,
            construction=sharded_construction(keys),
        )
    )
    anchor = Anchor(
        model=model, engine=Frozen(model, keys, device), weights=recipe.reference.sources
    )
    check_reference_model(anchor, config.vocab_size, device)
    return anchor


def _computing(recipe: Recipe, backend: Choice) -> Computing:
    mib = recipe.loss.chunk_mib
    return Computing(
        backend=backend_of(backend.value), chunk_bytes=None if mib is None else mib << 20
    )


def _resume(engine: Engine, report: Report, terminal: Terminal, start: Beginning) -> None:
    for fault in start.torn:
        terminal.warning(f"checkpoint passed over: {fault}")
    if start.checkpoint is None:
        return
    checkpoint.load(engine, start.checkpoint)
    report.resume(start.position.report)
    terminal.note(f"going on after step {start.position.step}, from {start.checkpoint}")


def _open_log(recipe: Recipe, inputs: Inputs, start: Beginning) -> RunLog:
    write_recipe(recipe)
    log = RunLog(
        Path(recipe.output),
        sources=tuple(recipe.sources),
        held_out=tuple(inputs.held_out),
        resume_step=start.position.step if start.checkpoint is not None else None,
    )
    shares = {f"share/{n}": str(s.share) for n, s in recipe.sources.items()}
    log.describe(
        to_yaml(recipe),
        {"lr": recipe.train.lr, "objective": recipe.objective, "steps": inputs.steps, **shares},
    )
    return log


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
    checkpoint.save(
        parts.engine,
        parts.cluster,
        Path(parts.recipe.output) / CHECKPOINTS,
        Position(step=at_step, report=parts.report.state()),
        keep=parts.recipe.train.keep_checkpoints,
    )


def _measured(recipe: Recipe) -> dict[str, dict[str, Statistic]]:
    """The statistics of each source that are logged, as means over its loss tokens."""
    everywhere = {"loss": Statistic.NLL, "accuracy": Statistic.HITS}
    if recipe.loss.z_loss:
        everywhere["z"] = Statistic.Z
    if recipe.loss.entropy:
        everywhere["entropy"] = Statistic.ENTROPY
    anchored = recipe.reference.sources if recipe.reference is not None else {}
    return {
        name: everywhere | ({"kl": Statistic.KL} if name in anchored else {})
        for name in recipe.sources
    }


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


def _log_to_file(folder: Path, world: World) -> None:
    """What libraries log and warn goes to a file of each rank, not over the progress bar."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=folder / f"rank-{world.rank}.log",
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    logging.captureWarnings(True)
