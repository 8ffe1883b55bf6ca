"""Builds the services of a run and restores its newest checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import StopSignal
from bigmix.cluster.watchdog import Watchdog
from bigmix.cluster.world import World
from bigmix.data.records import Decision, RankRows
from bigmix.data.run_plan import RunPlan
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.answers import (
    BehaviourProbe,
    probe_for_model,
)
from bigmix.evaluation.behaviour.baseline import BASE_ANSWERS, read_base_answers
from bigmix.evaluation.behaviour.measure import notes_on_base
from bigmix.evaluation.evaluator import BaselineEvaluation, Evaluator, prepare_tasks, token_bytes_in
from bigmix.evaluation.forward import HeldOutSpec
from bigmix.evaluation.held_out import read_baseline
from bigmix.evaluation.tasks.prompts import PreparedTask
from bigmix.loss.backend import backend_options_of, check_backend, choose_backend
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LossTerms, Statistic, logged_statistics, terms_of
from bigmix.model.causal_lm import (
    DTYPES,
    build,
    choose_attention,
    choose_dtype,
    logit_rule,
    max_positions,
)
from bigmix.model.checks import Configs, check_packing_isolation, read_configs
from bigmix.model.ds_config import complete_for_training
from bigmix.model.engine import AdamW, Engine, device_of, sharded_construction
from bigmix.model.flops import Cost, cost_of, count_parameters, peak_flops
from bigmix.model.inputs import ReferenceModel
from bigmix.model.loading import DevicePlacement, ModelSource, open_reference
from bigmix.recipe import Recipe, to_yaml
from bigmix.recipe.shares import BEHAVIOUR
from bigmix.runs.checkpoints import put_aside
from bigmix.runs.layout import CHECKPOINTS, LOG
from bigmix.runs.metrics_log import RunLog
from bigmix.runs.resume import (
    ResumePoint,
    keep_changes,
    log_to_file,
    read_skipped_steps,
    write_recipe,
)
from bigmix.runs.saver import RetentionPolicy, Saver
from bigmix.terminal import Terminal
from bigmix.train.header import show_header
from bigmix.train.inputs import RunInputs
from bigmix.train.state import Run, TrainState, restore
from bigmix.train.step import TrainingObjective
from bigmix.train.step_metrics import Health, MetricsAccumulator, RunMetrics, StepClock, ends_of
from bigmix.types import Choice


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """What a run is given by the process that it runs in.

    `baselines` are the evaluations before the first step of the runs before it in this process.
    """

    cluster: Cluster
    terminal: Terminal
    stop_signal: StopSignal
    watchdog: Watchdog
    baselines: dict[str, BaselineEvaluation]


@dataclass(frozen=True, kw_only=True, slots=True)
class _BuiltModel:
    """The model in its engine, and what was chosen for it."""

    engine: Engine
    keys: Mapping[str, Any]
    dtype: Choice
    attention: Choice
    backend: Choice
    cost: Cost | None
    num_parameters: int


def set_up(
    recipe: Recipe, inputs: RunInputs, plan: RunPlan, start: ResumePoint, context: RunContext
) -> tuple[Run, TrainState]:
    """Build everything that the loop needs, and restore a checkpoint if there is one; a collective.

    Raises BadInput where models, data and recipe do not fit together.
    """
    cluster, terminal, watchdog = context.cluster, context.terminal, context.watchdog
    world, device = cluster.world, device_of(cluster.world)
    log_to_file(Path(recipe.output) / LOG, world)
    configs = read_configs(recipe, inputs.manifest)
    tasks = _tasks(recipe, inputs, configs.model, terminal)
    behaviour = _behaviour(recipe, inputs, configs.model, terminal)
    built = _build(recipe, inputs, configs, world, watchdog)
    watchdog.doing("making the reference model")
    place = DevicePlacement(keys=built.keys, dtype=built.dtype.value, device=device)
    reference, base = _frozen(recipe, configs, place)
    show_header(
        terminal,
        recipe,
        plan,
        world,
        num_parameters=built.num_parameters,
        keys=built.keys,
        dtype=built.dtype,
        attention=built.attention,
        loss=built.backend,
    )
    for note in [*inputs.notes, *(note for note in plan.notes if note not in inputs.notes)]:
        terminal.note(note)
    log = _open_log(recipe, inputs, plan, start) if world.is_first else None
    health, saver = _health(recipe), _saver(recipe, cluster, terminal)
    run = Run(
        recipe=recipe,
        inputs=inputs,
        cluster=cluster,
        rank_rows=_portion(recipe, world),
        engine=built.engine,
        objective=_objective(recipe, plan, reference),
        evaluator=_evaluator(
            recipe, inputs, built.engine, cluster, tasks=tasks, behaviour=behaviour, base=base
        ),
        metrics=RunMetrics(_report(recipe, plan, built, world, device), log, terminal, health),
        saver=saver,
        health=health,
        clock=StepClock(context.stop_signal, watchdog, saver, ends_of(recipe)),
        terminal=terminal,
        stop_signal=context.stop_signal,
        watchdog=watchdog,
        baselines=context.baselines,
    )
    skipped_steps = _skipped_steps(recipe, cluster)
    _resume(run, start)
    return run, TrainState(
        step=start.step, plan=plan, skipped_steps=skipped_steps, decisions=_decisions(start)
    )


def _build(
    recipe: Recipe, inputs: RunInputs, configs: Configs, world: World, watchdog: Watchdog
) -> _BuiltModel:
    """The model in its engine; a collective."""
    config, device = configs.model, device_of(world)
    dtype = choose_dtype(recipe.model.dtype, device)
    attention = choose_attention(recipe.model.attention, config, device, dtype.value)
    backend = choose_backend(recipe.loss.backend, device)
    terms, options = _terms(recipe), _backend_options(recipe, backend)
    check_backend(
        options, rule=logit_rule(config), terms=terms, dtype=DTYPES[dtype.value], device=device
    )
    keys = complete_for_training(inputs.ds_keys, recipe, world.size, dtype.value)
    watchdog.doing("making the model")
    model = build(
        config,
        recipe.model.path,
        dtype=dtype.value,
        attention=attention.value,
        activation_checkpointing=recipe.model.activation_checkpointing,
        terms=terms,
        options=options,
        seed=recipe.seed,
        construction=sharded_construction(keys),
    )
    watchdog.doing("making the engine")
    engine = Engine(model, keys, _adamw(recipe), recipe.train.ema)
    check_packing_isolation(engine, config.vocab_size)
    return _BuiltModel(
        engine=engine,
        keys=keys,
        dtype=dtype,
        attention=attention,
        backend=backend,
        cost=cost_of(model.lm),
        num_parameters=count_parameters(model.lm),
    )


def _evaluator(
    recipe: Recipe,
    inputs: RunInputs,
    engine: Engine,
    cluster: Cluster,
    *,
    tasks: Mapping[str, PreparedTask],
    behaviour: BehaviourProbe | None,
    base: ReferenceModel | None,
) -> Evaluator:
    return Evaluator(
        engine=engine,
        cluster=cluster,
        held_out=_exam(recipe, inputs, base),
        tasks=tasks,
        behaviour=behaviour,
        weights=recipe.evaluate.task_weights,
        seed=recipe.seed,
    )


def _objective(
    recipe: Recipe, plan: RunPlan, reference: ReferenceModel | None
) -> TrainingObjective:
    document_weights = {name: recipe.sources[name].weigh for name in plan.mixture.names}
    return TrainingObjective(
        objective=recipe.objective, document_weights=document_weights, reference=reference
    )


def _tasks(
    recipe: Recipe, inputs: RunInputs, config: Any, terminal: Terminal
) -> dict[str, PreparedTask]:
    """The tasks as tokens; before the model is made, since a prompt may be too long for it."""
    for name, task in recipe.tasks.items():
        if task.execute:
            terminal.warning(
                f"task {name} runs code that the model writes, as this user on this machine"
            )
    return prepare_tasks(
        inputs.tasks,
        inputs.tokenizer_folder,
        recipe.model.tokenizer or recipe.model.path,
        inputs.manifests,
        config,
    )


def _behaviour(
    recipe: Recipe, inputs: RunInputs, config: Any, terminal: Terminal
) -> BehaviourProbe | None:
    """The behaviour probe as tokens; None where behaviour is not measured."""
    is_needed = bool(recipe.behaviour_watchers)
    return probe_for_model(inputs.behaviour, max_positions(config), terminal, is_needed=is_needed)


def _adamw(recipe: Recipe) -> AdamW:
    train = recipe.train
    return AdamW(betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)


def _report(
    recipe: Recipe, plan: RunPlan, built: _BuiltModel, world: World, device: torch.device
) -> MetricsAccumulator:
    peak = peak_flops(device, built.dtype.value)
    return MetricsAccumulator(
        tuple(recipe.sources),
        plan.epochs,
        cost=built.cost,
        peak_flops=peak * world.size if peak else None,
        measured=_logged_statistics(recipe),
    )


def _frozen(
    recipe: Recipe, configs: Configs, place: DevicePlacement
) -> tuple[ReferenceModel | None, ReferenceModel | None]:
    """The reference model, and the base that evaluations measure divergences to; often the same."""

    def opened(
        path: str | None, config: Any, named: str, weights: Mapping[str, float] | None = None
    ) -> ReferenceModel:
        origin = ModelSource(path=path, config=config, named=named)
        return open_reference(origin, recipe, place, weights)

    anchor = None
    if recipe.reference is not None:
        anchor = opened(
            recipe.reference_path, configs.reference, "reference.model", recipe.reference.sources
        )
    if recipe.has_own_base:
        return anchor, opened(recipe.model.path, configs.model, "model.path")
    return anchor, anchor if recipe.evaluate.kl else None


def _exam(recipe: Recipe, inputs: RunInputs, base: ReferenceModel | None) -> HeldOutSpec:
    return HeldOutSpec(
        held_out=inputs.held_out,
        micro_batch_rows=recipe.train.micro_batch_rows,
        max_rows=recipe.evaluate.rows,
        pieces=token_bytes_in(inputs.tokenizer_folder) if inputs.held_out else None,
        base=base,
    )


def _terms(recipe: Recipe) -> LossTerms:
    return terms_of(recipe.loss.model_dump())


def _backend_options(recipe: Recipe, backend: Choice) -> LossBackendOptions:
    return backend_options_of(backend.value, recipe.loss.chunk_mib, recipe.loss.head_gradient)


def _resume(run: Run, start: ResumePoint) -> None:
    terminal, world, folder = run.terminal, run.cluster.world, Path(run.recipe.output)
    for fault in start.damaged:
        terminal.warning(f"checkpoint skipped: {fault}")
    if world.is_first:
        for path in put_aside(folder / CHECKPOINTS, after_step=start.step):
            terminal.note(f"it is kept as {path}")
    if start.checkpoint is None:
        return
    restore(run, start.checkpoint)
    kept, *_ = run.cluster.gather(read_baseline(folder) if world.is_first else None)
    run.metrics.report.base.put_back(kept)
    _resume_answers(run)
    ranks, now = start.checkpoint.ranks, world.size
    for change in start.changes:
        terminal.warning(f"from step {start.step + 1} on: {change}")
    other = "" if ranks == now else f", written by {ranks} ranks and read by {now}"
    terminal.note(f"going on after step {start.step}, from {start.checkpoint.path}{other}")


def _resume_answers(run: Run) -> None:
    """Read the answers of the base again, where behaviour is measured from them; a collective."""
    probe, base, folder = run.evaluator.behaviour, run.metrics.report.base, Path(run.recipe.output)
    if probe is None:
        return
    kept, *_ = run.cluster.gather(read_base_answers(folder) if run.cluster.world.is_first else None)
    base.put_back_answers(kept)
    if base.answers is not None:
        for note in notes_on_base(probe, base.answers):
            run.terminal.warning(note)
        return
    missing = (
        "the run began without the behaviour probe"
        if base.fingerprint is None
        else f"{folder / BASE_ANSWERS} is missing"
    )
    if run.recipe.behaviour_watchers:
        raise BadInput(
            f"{missing}, and a controller looks at {BEHAVIOUR}; restore the file from a copy, or"
            f" leave {BEHAVIOUR} out of its held_out"
        )
    run.terminal.warning(
        f"{missing}: from here on answers are measured, but not compared with those of the base"
    )


def _decisions(start: ResumePoint) -> tuple[Decision, ...]:
    return tuple(start.checkpoint.position.decisions) if start.checkpoint is not None else ()


def _portion(recipe: Recipe, world: World) -> RankRows:
    return RankRows(
        rank=world.rank,
        ranks=world.size,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=recipe.train.micro_batch_rows,
    )


def _health(recipe: Recipe) -> Health:
    return Health(
        skips=recipe.health.roll_back_after,
        deviations=recipe.health.spike_deviations,
        spikes_roll_back=recipe.health.spikes_roll_back,
    )


def _skipped_steps(recipe: Recipe, cluster: Cluster) -> frozenset[int]:
    """The steps that are not trained, by the recipe or since the run has gone back before them."""
    folder = Path(recipe.output)
    own = read_skipped_steps(folder).steps if cluster.world.is_first else frozenset[int]()
    return frozenset({*recipe.train.pass_over, *cluster.gather(own)[0]})


def _saver(recipe: Recipe, cluster: Cluster, terminal: Terminal) -> Saver:
    checkpoint = recipe.checkpoint
    return Saver(
        Path(recipe.output) / CHECKPOINTS,
        cluster,
        RetentionPolicy(newest=checkpoint.keep, every=checkpoint.keep_every),
        in_background=checkpoint.background,
        report=terminal.warning,
    )


def _open_log(recipe: Recipe, inputs: RunInputs, plan: RunPlan, start: ResumePoint) -> RunLog:
    write_recipe(recipe)
    keep_changes(Path(recipe.output), start.step, start.changes)
    log = RunLog(
        Path(recipe.output),
        sources=tuple(recipe.sources),
        held_out=tuple(inputs.held_out),
        resume_step=start.step if start.checkpoint is not None else None,
        has_behaviour=inputs.behaviour is not None,
    )
    shares = {f"share/{n}": str(s.share) for n, s in recipe.sources.items()}
    log.describe(
        to_yaml(recipe),
        {"lr": recipe.train.lr, "objective": recipe.objective, "steps": plan.steps, **shares},
    )
    return log


def _logged_statistics(recipe: Recipe) -> dict[str, dict[str, Statistic]]:
    """The statistics that are logged of each source, by their keys in metrics.jsonl."""
    terms = _terms(recipe)
    with_reference = recipe.reference.sources if recipe.reference is not None else {}
    return {
        name: logged_statistics(terms, has_reference=name in with_reference)
        for name in recipe.sources
    }
