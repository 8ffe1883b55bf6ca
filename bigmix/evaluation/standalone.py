"""Evaluates a model outside of a run, and its base, and writes a folder with the results.

The base is evaluated first, then the model, whose forgetting and divergence are measured from the
base. Neither has an optimizer or gradients.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigmix.cluster.collectives import Cluster, leave
from bigmix.cluster.heartbeat import Limits
from bigmix.cluster.signals import Activity, StopSignal
from bigmix.cluster.watchdog import Watchdog
from bigmix.cluster.world import World
from bigmix.errors import Interrupted
from bigmix.evaluation.behaviour.answers import (
    BehaviourProbe,
    probe_for_model,
)
from bigmix.evaluation.behaviour.measure import write_pairs
from bigmix.evaluation.evaluator import EvaluationResult, Evaluator, prepare_tasks, token_bytes_in
from bigmix.evaluation.forward import HeldOutSpec
from bigmix.evaluation.held_out import Baseline
from bigmix.evaluation.inputs import HeldOutInputs
from bigmix.evaluation.tables import show_evaluation
from bigmix.evaluation.tasks.prompts import PreparedTask
from bigmix.evaluation.tasks.runner import write_samples
from bigmix.files import replace_text
from bigmix.loss.backend import backend_options_of, choose_backend
from bigmix.model.causal_lm import choose_dtype, max_positions
from bigmix.model.checks import Evaluated, read_evaluated
from bigmix.model.ds_config import complete_for_evaluation
from bigmix.model.engine import device_of, join
from bigmix.model.loading import DevicePlacement, ModelSource, open_evaluated, open_reference
from bigmix.recipe import Recipe, to_yaml
from bigmix.runs.layout import EVALUATION, LOG, RECIPE, step_of_export
from bigmix.runs.metrics_log import MetricsRecord, finite
from bigmix.runs.resume import log_to_file
from bigmix.terminal import Terminal

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """What is evaluated: the model, the base that it is compared with if there is one, and the
    folder of the results.
    """

    model: str
    base: str | None
    output: Path
    command: str


def evaluate_standalone(
    recipe: Recipe,
    inputs: HeldOutInputs,
    request: EvaluationRequest,
    world: World,
    terminal: Terminal,
    stop_signal: StopSignal,
) -> None:
    """Evaluate the models of a request on the held-out sources and tasks of a recipe; a collective.

    Raises BadInput where a model does not fit the sources, and Interrupted where a stop was
    requested.
    """
    given = {"--base": request.base, "--model": request.model}
    models = read_evaluated(recipe, inputs.manifests[0], inputs.tokenizer_folder, given)
    tasks = {
        named: prepare_tasks(
            inputs.tasks,
            inputs.tokenizer_folder,
            model.path,
            [*inputs.manifests, *inputs.trained],
            model.config,
        )
        for named, model in models.items()
    }
    behaviour = _behaviour(inputs, models.values(), terminal)
    cluster = join(world)
    log_to_file(request.output / LOG, world)
    limits = Limits(dead_s=recipe.health.dead_after_s, hang_s=60 * recipe.health.hang_minutes)
    watchdog = Watchdog(cluster, stop_signal, limits, request.output / LOG)
    services = _Services(
        recipe=recipe,
        inputs=inputs,
        tasks=tasks,
        behaviour=behaviour,
        cluster=cluster,
        activity=Activity(begin=watchdog.doing, stop_requested=stop_signal.is_set),
        output=request.output,
    )
    try:
        lines = []
        for model, result in _results(services, models):
            lines.append(result.line)
            if world.is_first:
                _keep_answers(request.output, result)
            show_evaluation(terminal, recipe, model.path, result)
        if world.is_first:
            _write(recipe, request, lines)
            terminal.note(f"written to {request.output / EVALUATION}")
    except BaseException as error:
        watchdog.fail(error)
        raise
    watchdog.close()
    leave()


def _behaviour(
    inputs: HeldOutInputs, models: Iterable[Evaluated], terminal: Terminal
) -> BehaviourProbe | None:
    limits = [n for model in models if (n := max_positions(model.config)) is not None]
    return probe_for_model(inputs.behaviour, min(limits, default=None), terminal)


def _keep_answers(output: Path, result: EvaluationResult) -> None:
    """Write the answers of a model to tasks and to general prompts."""
    step = int(result.line["step"] or 0)
    write_samples(output, step, result.tasks)
    if result.behaviour is not None:
        write_pairs(output, step, result.behaviour)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Services:
    """What the evaluations of all models share; `tasks` are the tasks as tokens, by the option that
    names the model, and `behaviour` the prompts as tokens of the first model.
    """

    recipe: Recipe
    inputs: HeldOutInputs
    tasks: Mapping[str, Mapping[str, PreparedTask]]
    behaviour: BehaviourProbe | None
    cluster: Cluster
    activity: Activity
    output: Path


def _results(
    services: _Services, models: Mapping[str, Evaluated]
) -> Iterator[tuple[Evaluated, EvaluationResult]]:
    """The results of the base, if there is one, and of the model; divergences are of the model
    only.
    """
    baseline, held_out_spec = None, _held_out_spec(services)
    model, base = models["--model"], models.get("--base")
    if base is not None:
        baseline = Baseline()
        found = _evaluate(services, base, held_out_spec, 0, baseline)
        if services.cluster.world.is_first and baseline.answers is not None:
            baseline.answers.write(services.output)
        yield base, found
        reference = open_reference(_source_of(base), services.recipe, _placement(services))
        held_out_spec = replace(held_out_spec, base=reference)
    yield (
        model,
        _evaluate(services, model, held_out_spec, step_of_export(Path(model.path)), baseline),
    )


def _held_out_spec(services: _Services) -> HeldOutSpec:
    train = services.recipe.train
    return HeldOutSpec(
        held_out=services.inputs.streams,
        micro_batch_rows=train.micro_batch_rows,
        max_rows=services.recipe.evaluate.rows,
        pieces=token_bytes_in(services.inputs.tokenizer_folder),
        base=None,
    )


def _source_of(model: Evaluated) -> ModelSource:
    return ModelSource(path=model.path, config=model.config, named=model.named)


def _placement(services: _Services) -> DevicePlacement:
    recipe, world = services.recipe, services.cluster.world
    device = device_of(world)
    dtype = choose_dtype(recipe.model.dtype, device).value
    keys = complete_for_evaluation(services.inputs.ds_keys, recipe, world.size, dtype)
    return DevicePlacement(keys=keys, dtype=dtype, device=device)


def _evaluate(
    services: _Services,
    model: Evaluated,
    held_out_spec: HeldOutSpec,
    step: int,
    baseline: Baseline | None,
) -> EvaluationResult:
    recipe, placement = services.recipe, _placement(services)
    services.activity.begin(f"making {model.path}")
    backend = choose_backend(recipe.loss.backend, placement.device).value
    options = backend_options_of(backend, recipe.loss.chunk_mib)
    evaluator = Evaluator(
        engine=open_evaluated(_source_of(model), recipe, placement, options),
        cluster=services.cluster,
        held_out=held_out_spec,
        tasks=services.tasks[model.named],
        behaviour=services.behaviour,
        weights=recipe.evaluate.task_weights,
        seed=recipe.seed,
    )
    result = evaluator.evaluate(step, baseline, services.activity)
    if result is None:
        raise Interrupted("stopped on request; run the same command to evaluate again")
    return result


def _write(recipe: Recipe, request: EvaluationRequest, lines: Sequence[MetricsRecord]) -> None:
    """Write the folder of the results; evaluation.json is last and marks the folder as complete."""
    request.output.mkdir(parents=True, exist_ok=True)
    replace_text(request.output / RECIPE, to_yaml(recipe))
    evaluation: dict[str, Any] = {
        "version": _VERSION,
        "model": request.model,
        "base": request.base,
        "command": request.command,
        "lines": [finite(line) for line in lines],
    }
    replace_text(
        request.output / EVALUATION, json.dumps(evaluation, indent=1, allow_nan=False) + "\n"
    )
