"""A recipe and its inputs go in, everything that the training loop moves values between comes out."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigmix.checkpoint.listing import Listed, put_aside
from bigmix.checkpoint.restore import restore
from bigmix.checkpoint.saver import Keeping, Saver
from bigmix.data.loader import Portion
from bigmix.dist import Cluster
from bigmix.ds_config import fill
from bigmix.engine import AdamW, Engine, Frozen, device_of, sharded_construction
from bigmix.errors import BadInput
from bigmix.flops import Cost, cost_of, count_parameters, peak_flops
from bigmix.guard import StopFlag
from bigmix.header import show_header
from bigmix.health import Health
from bigmix.inputs import Inputs, accumulation
from bigmix.loss.backend import backend_of, choose_backend
from bigmix.loss.check import check_computing
from bigmix.loss.terms import Statistic, Terms
from bigmix.loss.work import Computing
from bigmix.metrics import RunLog
from bigmix.model import (
    DTYPES,
    FrozenModel,
    build,
    choose_attention,
    choose_dtype,
    load,
    logit_rule,
    max_positions,
)
from bigmix.model_checks import read_configs
from bigmix.recipe import Recipe, to_yaml
from bigmix.records import Choice
from bigmix.reference import Anchor
from bigmix.report import Report
from bigmix.run_folder import (
    CHECKPOINTS,
    LOG,
    Beginning,
    keep_changes,
    read_passed_over,
    write_recipe,
)
from bigmix.soundness import check_model, check_reference_model
from bigmix.step import Aim
from bigmix.tasks.asking import Asked, ask, language_of
from bigmix.terminal import Terminal
from bigmix.watchdog import Watchdog
from bigmix.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the loop moves values between; `passed_over` are the steps that are not trained."""

    recipe: Recipe
    inputs: Inputs
    cluster: Cluster
    portion: Portion
    engine: Engine
    aim: Aim
    tasks: Mapping[str, Asked]
    report: Report
    saver: Saver
    health: Health
    passed_over: set[int]
    log: RunLog | None
    terminal: Terminal
    flag: StopFlag
    watchdog: Watchdog


def set_up(
    recipe: Recipe,
    inputs: Inputs,
    cluster: Cluster,
    terminal: Terminal,
    flag: StopFlag,
    watchdog: Watchdog,
    start: Beginning,
) -> Parts:
    """Build everything that the loop needs, and go on from a checkpoint if there is one; a collective.

    Raises BadInput where models, data and recipe do not fit together.
    """
    world, device = cluster.world, device_of(cluster.world)
    _log_to_file(Path(recipe.output) / LOG, world)
    configs = read_configs(recipe, inputs.manifest)
    config = configs.model
    tasks = _tasks(recipe, inputs, config, terminal)
    dtype = choose_dtype(recipe.model.dtype, device)
    attention = choose_attention(recipe.model.attention, config, device, dtype.value)
    backend = choose_backend(recipe.loss.backend, device)
    terms, computing = _terms(recipe), _computing(recipe, backend)
    check_computing(
        computing, rule=logit_rule(config), terms=terms, dtype=DTYPES[dtype.value], device=device
    )
    keys = _keys(recipe, inputs, world, dtype.value)
    watchdog.doing("making the model")
    model = build(
        config,
        recipe.model.path,
        dtype=dtype.value,
        attention=attention.value,
        activation_checkpointing=recipe.model.activation_checkpointing,
        terms=terms,
        computing=computing,
        seed=recipe.seed,
        construction=sharded_construction(keys),
    )
    watchdog.doing("making the engine")
    engine = Engine(model, keys, _adamw(recipe))
    check_model(engine, config.vocab_size)
    watchdog.doing("making the reference model")
    aim = _aim(recipe, _anchor(recipe, configs.reference, keys, dtype.value, device))
    peak = peak_flops(device, dtype.value)
    report = _report(recipe, inputs, cost_of(model.lm), peak * world.size if peak else None)
    show_header(
        terminal, recipe, inputs, world,
        parameters=count_parameters(model.lm), keys=keys, dtype=dtype, attention=attention, loss=backend,
    )  # fmt: skip
    for note in inputs.notes:
        terminal.note(note)
    log = _open_log(recipe, inputs, start) if world.is_first else None
    parts = Parts(
        recipe=recipe, inputs=inputs, cluster=cluster, portion=_portion(recipe, world), engine=engine, aim=aim,
        tasks=tasks, report=report, saver=_saver(recipe, cluster, terminal), health=_health(recipe),
        passed_over=_passed_over(recipe, cluster), log=log, terminal=terminal, flag=flag, watchdog=watchdog,
    )  # fmt: skip
    _resume(parts, start)
    return parts


def _keys(recipe: Recipe, inputs: Inputs, world: World, dtype: str) -> dict[str, Any]:
    return fill(
        inputs.ds_keys,
        micro_batch_rows=recipe.train.micro_batch_rows,
        accumulation=accumulation(recipe, world.size),
        ranks=world.size,
        clip=recipe.train.clip,
        dtype=dtype,
    )


def _aim(recipe: Recipe, anchor: Anchor | None) -> Aim:
    weighing = {name: source.weigh for name, source in recipe.sources.items()}
    return Aim(objective=recipe.objective, weighing=weighing, anchor=anchor)


def _tasks(recipe: Recipe, inputs: Inputs, config: Any, terminal: Terminal) -> dict[str, Asked]:
    """The tasks as tokens; looked at before the model is made, since a prompt may be too long for it."""
    if not inputs.tasks:
        return {}
    own = inputs.tokenizer_folder
    place = str(own) if own.is_dir() else recipe.model.tokenizer or recipe.model.path
    if place is None:
        raise BadInput(
            "tasks need a tokenizer, and neither the sources nor the model have one; prepare the sources again, or set "
            "model.tokenizer"
        )
    for name, task in recipe.tasks.items():
        if task.execute:
            terminal.warning(
                f"task {name} runs code that the model writes, as this user on this machine"
            )
    manifests = [source.manifest for source in inputs.sources.values()]
    return ask(inputs.tasks, language_of(place, manifests), max_positions(config))


def _adamw(recipe: Recipe) -> AdamW:
    train = recipe.train
    return AdamW(betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)


def _report(recipe: Recipe, inputs: Inputs, cost: Cost | None, peak: float | None) -> Report:
    return Report(
        tuple(recipe.sources),
        inputs.plan.epochs,
        cost=cost,
        peak_flops=peak,
        measured=_measured(recipe),
    )


def _anchor(
    recipe: Recipe, reference: Any, keys: Mapping[str, Any], dtype: str, device: torch.device
) -> Anchor | None:
    """The frozen model of the recipe, in the precision of the trained one and sharded like it."""
    if recipe.reference is None:
        return None
    model = FrozenModel(
        load(
            reference,
            recipe.reference_path,
            dtype=dtype,
            attention=choose_attention(recipe.model.attention, reference, device, dtype).value,
            seed=recipe.seed,
            construction=sharded_construction(keys),
        )
    )
    anchor = Anchor(
        model=model, engine=Frozen(model, keys, device), weights=recipe.reference.sources
    )
    check_reference_model(anchor, reference.vocab_size, device)
    return anchor


def _terms(recipe: Recipe) -> Terms:
    loss = recipe.loss
    return Terms(label_smoothing=loss.label_smoothing, z_loss=loss.z_loss, entropy=loss.entropy)


def _computing(recipe: Recipe, backend: Choice) -> Computing:
    mib = recipe.loss.chunk_mib
    return Computing(
        backend=backend_of(backend.value),
        chunk_bytes=None if mib is None else mib << 20,
        head_gradient=recipe.loss.head_gradient,
    )


def _resume(parts: Parts, start: Beginning) -> None:
    terminal, world = parts.terminal, parts.cluster.world
    for fault in start.torn:
        terminal.warning(f"checkpoint passed over: {fault}")
    if world.is_first:
        for path in put_aside(Path(parts.recipe.output) / CHECKPOINTS, after_step=start.step):
            terminal.note(f"what is left of it is kept as {path}")
    if start.checkpoint is None:
        return
    go_to(parts, start.checkpoint)
    ranks, now = start.checkpoint.ranks, world.size
    for change in start.changes:
        terminal.warning(f"from step {start.step + 1} on: {change}")
    other = "" if ranks == now else f", written by {ranks} ranks and read by {now}"
    terminal.note(f"going on after step {start.step}, from {start.checkpoint.path}{other}")


def go_to(parts: Parts, checkpoint: Listed) -> None:
    """Put everything that a step changes back to where it was at a checkpoint; a collective."""
    parts.watchdog.doing(f"reading {checkpoint.path}")
    restore(parts.engine, checkpoint)
    parts.report.resume(checkpoint.position.report)
    parts.health.resume(checkpoint.position.losses)
    parts.saver.resume(checkpoint.position.step)


def _portion(recipe: Recipe, world: World) -> Portion:
    return Portion(
        rank=world.rank,
        ranks=world.size,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=recipe.train.micro_batch_rows,
    )


def _health(recipe: Recipe) -> Health:
    return Health(
        skips=recipe.train.roll_back_after,
        deviations=recipe.train.spike_deviations,
        spikes_roll_back=recipe.train.spikes_roll_back,
    )


def _passed_over(recipe: Recipe, cluster: Cluster) -> set[int]:
    """The steps that are not trained, by the recipe or since the run has gone back before them."""
    folder = Path(recipe.output)
    own = read_passed_over(folder).steps if cluster.world.is_first else frozenset[int]()
    return {*recipe.train.pass_over, *cluster.gather(own)[0]}


def _saver(recipe: Recipe, cluster: Cluster, terminal: Terminal) -> Saver:
    train = recipe.train
    return Saver(
        Path(recipe.output) / CHECKPOINTS,
        cluster,
        Keeping(newest=train.keep_checkpoints, every=train.keep_every),
        in_background=train.save == "background",
        tell=terminal.warning,
    )


def _open_log(recipe: Recipe, inputs: Inputs, start: Beginning) -> RunLog:
    write_recipe(recipe)
    keep_changes(Path(recipe.output), start.step, start.changes)
    log = RunLog(
        Path(recipe.output),
        sources=tuple(recipe.sources),
        held_out=tuple(inputs.held_out),
        resume_step=start.step if start.checkpoint is not None else None,
    )
    shares = {f"share/{n}": str(s.share) for n, s in recipe.sources.items()}
    log.describe(
        to_yaml(recipe),
        {"lr": recipe.train.lr, "objective": recipe.objective, "steps": inputs.steps, **shares},
    )
    return log


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


def _log_to_file(folder: Path, world: World) -> None:
    """What libraries log and warn goes to a file of each rank, not over the progress bar."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=folder / f"rank-{world.rank}.log",
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    logging.captureWarnings(True)
