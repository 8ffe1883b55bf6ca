"""A recipe and models outside of a run go in, a folder with what an evaluation finds of them comes out.

The base is evaluated first, then the model: what it has forgotten, and how far it has moved, is measured from there.
Neither has an optimizer, nor gradients.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigmix.beats import Limits
from bigmix.dist import Cluster, leave
from bigmix.ds_config import fill
from bigmix.engine import device_of, join
from bigmix.errors import Interrupted
from bigmix.evaluate import Exam
from bigmix.examine import Findings, examine, pieces_in
from bigmix.files import replace_text
from bigmix.frozen import Origin, open_frozen
from bigmix.guard import StopFlag
from bigmix.header import show_held_out
from bigmix.held_out import Base
from bigmix.inputs import HeldOutInputs
from bigmix.loss.backend import choose_backend, computing_of
from bigmix.metrics import METRICS, finite, read_lines
from bigmix.model import choose_dtype
from bigmix.model_checks import Evaluated, read_evaluated
from bigmix.recipe import Recipe, to_yaml
from bigmix.reference import Anchor
from bigmix.report import Line
from bigmix.run_folder import LOG, RECIPE
from bigmix.soundness import check_subject
from bigmix.subject import Subject, frozen_subject
from bigmix.terminal import Terminal
from bigmix.watchdog import Watchdog
from bigmix.world import World

EVALUATION = "evaluation.json"
_VERSION = 1
# A file that fixes them must not stand in the way of another number of ranks.
_OF_STEPS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is evaluated: the model, the base that it is held against if there is one, and where the results go."""

    model: str
    base: str | None
    output: Path
    command: str


def run(
    recipe: Recipe,
    inputs: HeldOutInputs,
    order: Order,
    world: World,
    terminal: Terminal,
    flag: StopFlag,
) -> None:
    """Evaluate the models of an order on the held-out sources of a recipe; a collective.

    Raises BadInput where a model does not fit the sources, and Interrupted where the flag is set.
    """
    given = {"--base": order.base, "--model": order.model}
    models = read_evaluated(recipe, inputs.manifest, inputs.tokenizer_folder, given)
    cluster = join(world)
    limits = Limits(dead_s=recipe.train.dead_after_s, hang_s=60 * recipe.train.hang_minutes)
    watchdog = Watchdog(cluster, flag, limits, order.output / LOG)
    room = _Room(recipe=recipe, inputs=inputs, cluster=cluster, flag=flag, doing=watchdog.doing)
    try:
        lines = []
        for model, found in _findings(room, models):
            lines.append(found.line)
            show_held_out(terminal, recipe, f"held out, {model.path}", found.held_out)
        if world.is_first:
            _write(recipe, order, lines)
            terminal.note(f"written to {order.output / EVALUATION}")
    except BaseException as error:
        watchdog.fail(error)
        raise
    watchdog.close()
    leave()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Room:
    """What all models of an order are examined with."""

    recipe: Recipe
    inputs: HeldOutInputs
    cluster: Cluster
    flag: StopFlag
    doing: Callable[[str], None]


def _findings(room: _Room, models: Mapping[str, Evaluated]) -> Iterator[tuple[Evaluated, Findings]]:
    """What is found of the base, if there is one, and of the model; divergences are of the model alone."""
    base, anchor = None, None
    exam = _exam(room)
    if "--base" in models:
        base, given = Base(), models["--base"]
        anchor, subject = _opened(room, given)
        yield given, _examined(room, subject, exam, 0, base)
    given = models["--model"]
    _, subject = _opened(room, given)
    step = _step_of(Path(given.path))
    yield given, _examined(room, subject, replace(exam, base=anchor), step, base)


def _exam(room: _Room) -> Exam:
    train = room.recipe.train
    return Exam(
        held_out=room.inputs.streams,
        micro_batch_rows=train.micro_batch_rows,
        max_rows=train.evaluate_rows,
        pieces=pieces_in(room.inputs.tokenizer_folder),
        base=None,
    )


def _opened(room: _Room, model: Evaluated) -> tuple[Anchor, Subject]:
    recipe, device = room.recipe, device_of(room.cluster.world)
    room.doing(f"making {model.path}")
    dtype = choose_dtype(recipe.model.dtype, device).value
    keys = fill(
        {key: value for key, value in room.inputs.ds_keys.items() if key not in _OF_STEPS},
        micro_batch_rows=recipe.train.micro_batch_rows,
        accumulation=1,
        ranks=room.cluster.world.size,
        clip=recipe.train.clip,
        dtype=dtype,
    )
    origin = Origin(path=model.path, config=model.config, named=model.named)
    anchor = open_frozen(origin, recipe, keys, dtype=dtype, device=device)
    backend = choose_backend(recipe.loss.backend, device).value
    subject = frozen_subject(anchor, computing_of(backend, recipe.loss.chunk_mib), device)
    check_subject(subject, model.config.vocab_size)
    return anchor, subject


def _examined(room: _Room, subject: Subject, exam: Exam, step: int, base: Base | None) -> Findings:
    found = examine(
        subject,
        room.cluster,
        exam,
        step=step,
        base=base,
        stop_asked=room.flag.is_set,
        doing=room.doing,
    )
    if found is None:
        raise Interrupted("stopped on request; the same command begins the evaluation again")
    return found


def _step_of(model: Path) -> int:
    """The last step of the run that a model was exported by; 1 where that is not known."""
    metrics = model.parent / METRICS
    lines = read_lines(metrics) if metrics.is_file() else []
    return max((int(line["step"]) for line in lines), default=1)


def _write(recipe: Recipe, order: Order, lines: Sequence[Line]) -> None:
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
