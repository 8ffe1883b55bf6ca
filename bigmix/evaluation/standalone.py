"""A recipe and models outside of a run go in, a folder with what an evaluation finds of them comes
out.

The base is evaluated first, then the model: what it has forgotten, and how far it has moved, is
measured from there. Neither has an optimizer, nor gradients.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigmix.cluster.collectives import Cluster, leave
from bigmix.cluster.heartbeat import Limits
from bigmix.cluster.signals import Activity, StopSignal
from bigmix.cluster.watchdog import Watchdog
from bigmix.cluster.world import World
from bigmix.errors import Interrupted
from bigmix.evaluation.evaluator import EvaluationResult, Evaluator, prepare_tasks, token_bytes_in
from bigmix.evaluation.forward import HeldOutSpec
from bigmix.evaluation.held_out import Baseline
from bigmix.evaluation.inputs import HeldOutInputs
from bigmix.evaluation.tables import show_evaluation
from bigmix.evaluation.tasks.prompts import PreparedTask
from bigmix.evaluation.tasks.runner import write_samples
from bigmix.files import replace_text
from bigmix.loss.backend import backend_options_of, choose_backend
from bigmix.model.causal_lm import choose_dtype
from bigmix.model.checks import Evaluated, read_evaluated
from bigmix.model.ds_config import complete_for_evaluation
from bigmix.model.engine import device_of, join
from bigmix.model.loading import DevicePlacement, ModelSource, open_evaluated, open_reference
from bigmix.recipe import Recipe, to_yaml
from bigmix.runs.layout import EVALUATION, LOG, RECIPE
from bigmix.runs.metrics_log import METRICS, MetricsRecord, finite, read_lines
from bigmix.runs.resume import log_to_file
from bigmix.terminal import Terminal

_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """What is evaluated: the model, the base that it is held against if there is one, and where the
    results go.
    """

    model: str
    base: str | None
    output: Path
    command: str


def evaluate_standalone(
    recipe: Recipe,
    inputs: HeldOutInputs,
    order: EvaluationRequest,
    world: World,
    terminal: Terminal,
    stop_signal: StopSignal,
) -> None:
    """Evaluate the models of an order on the held-out sources of a recipe; a collective.

    Raises BadInput where a model does not fit the sources, and Interrupted where the flag is set.
    """
    given = {"--base": order.base, "--model": order.model}
    models = read_evaluated(recipe, inputs.manifests[0], inputs.tokenizer_folder, given)
    asked = {
        named: prepare_tasks(
            inputs.tasks,
            inputs.tokenizer_folder,
            model.path,
            [*inputs.manifests, *inputs.trained],
            model.config,
        )
        for named, model in models.items()
    }
    cluster = join(world)
    log_to_file(order.output / LOG, world)
    limits = Limits(dead_s=recipe.health.dead_after_s, hang_s=60 * recipe.health.hang_minutes)
    watchdog = Watchdog(cluster, stop_signal, limits, order.output / LOG)
    room = _Services(
        recipe=recipe,
        inputs=inputs,
        asked=asked,
        cluster=cluster,
        activity=Activity(begin=watchdog.doing, stop_requested=stop_signal.is_set),
    )
    try:
        lines = []
        for model, found in _findings(room, models):
            lines.append(found.line)
            if world.is_first:
                write_samples(order.output, int(found.line["step"] or 0), found.tasks)
            show_evaluation(terminal, recipe, model.path, found)
        if world.is_first:
            _write(recipe, order, lines)
            terminal.note(f"written to {order.output / EVALUATION}")
    except BaseException as error:
        watchdog.fail(error)
        raise
    watchdog.close()
    leave()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Services:
    """What all models of an order are examined with; `asked` are the tasks as tokens, by the option
    of the model.
    """

    recipe: Recipe
    inputs: HeldOutInputs
    asked: Mapping[str, Mapping[str, PreparedTask]]
    cluster: Cluster
    activity: Activity


def _findings(
    room: _Services, models: Mapping[str, Evaluated]
) -> Iterator[tuple[Evaluated, EvaluationResult]]:
    """What is found of the base, if there is one, and of the model; divergences are of the model
    alone.
    """
    base, held_out_spec = None, _exam(room)
    model, held_against = models["--model"], models.get("--base")
    if held_against is not None:
        base = Baseline()
        yield held_against, _examined(room, held_against, held_out_spec, 0, base)
        held_out_spec = replace(
            held_out_spec, base=open_reference(_origin(held_against), room.recipe, _place(room))
        )
    yield model, _examined(room, model, held_out_spec, _step_of(Path(model.path)), base)


def _exam(room: _Services) -> HeldOutSpec:
    return HeldOutSpec(
        held_out=room.inputs.streams,
        micro_batch_rows=room.recipe.train.micro_batch_rows,
        max_rows=room.recipe.evaluate.rows,
        pieces=token_bytes_in(room.inputs.tokenizer_folder),
        base=None,
    )


def _origin(model: Evaluated) -> ModelSource:
    return ModelSource(path=model.path, config=model.config, named=model.named)


def _place(room: _Services) -> DevicePlacement:
    recipe, world = room.recipe, room.cluster.world
    device = device_of(world)
    dtype = choose_dtype(recipe.model.dtype, device).value
    keys = complete_for_evaluation(room.inputs.ds_keys, recipe, world.size, dtype)
    return DevicePlacement(keys=keys, dtype=dtype, device=device)


def _examined(
    room: _Services, model: Evaluated, held_out_spec: HeldOutSpec, step: int, base: Baseline | None
) -> EvaluationResult:
    recipe, place = room.recipe, _place(room)
    room.activity.begin(f"making {model.path}")
    backend = choose_backend(recipe.loss.backend, place.device).value
    options = backend_options_of(backend, recipe.loss.chunk_mib)
    evaluator = Evaluator(
        engine=open_evaluated(_origin(model), recipe, place, options),
        cluster=room.cluster,
        held_out=held_out_spec,
        tasks=room.asked[model.named],
        weights=recipe.evaluate.task_weights,
        seed=recipe.seed,
    )
    found = evaluator.evaluate(step, base, room.activity)
    if found is None:
        raise Interrupted("stopped on request; the same command begins the evaluation again")
    return found


def _step_of(model: Path) -> int:
    """The last step of the run that a model was exported by; 1 where that is not known."""
    metrics = model.parent / METRICS
    lines = read_lines(metrics) if metrics.is_file() else []
    return max((int(line["step"]) for line in lines), default=1)


def _write(recipe: Recipe, order: EvaluationRequest, lines: Sequence[MetricsRecord]) -> None:
    """The folder of the results; what says that it is whole goes last."""
    order.output.mkdir(parents=True, exist_ok=True)
    replace_text(order.output / RECIPE, to_yaml(recipe))
    found: dict[str, Any] = {
        "version": _VERSION,
        "model": order.model,
        "base": order.base,
        "command": order.command,
        "lines": [finite(line) for line in lines],
    }
    replace_text(order.output / EVALUATION, json.dumps(found, indent=1, allow_nan=False) + "\n")
