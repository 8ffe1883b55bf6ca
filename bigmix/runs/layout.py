"""The files in the folder of a run, and how far the run is.

Nothing here imports torch.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigmix.errors import BadInput
from bigmix.files import replace_text
from bigmix.recipe import Recipe
from bigmix.runs.checkpoints import FOLDER, newest_step
from bigmix.runs.metrics_log import METRICS, has_evaluation, read_lines

# What is in the folder of a run, besides METRICS and TENSORBOARD, which the metrics log names.
RECIPE, ATTEMPT = "recipe.yaml", "attempt.json"
CHECKPOINTS, EXPORT, LOG = FOLDER, "export", "log"
SAMPLES, BEHAVIOUR = "samples", "behaviour"  # answers to tasks, and to the behaviour probe
EVALUATION = "evaluation.json"  # of a model that was evaluated outside of a run, in its own folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A run of a sweep that was begun after a step and has not ended well; `reason` is why it
    failed, as far as known.
    """

    after_step: int
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """How far a run is; `step` is that of its newest checkpoint, `reason` why it failed."""

    kind: Literal["waiting", "begun", "failed", "done"]
    step: int
    reason: str | None = None


def is_through(recipe: Recipe, *, step: int, steps: int, evaluates: bool) -> bool:
    """Whether nothing is left to do once `step` of `steps` is trained."""
    folder = Path(recipe.output)
    return (
        step >= steps
        and ((folder / EXPORT).is_dir() or not recipe.checkpoint.export)
        and (not evaluates or has_evaluation(folder / METRICS, step))
    )


def state_of(recipe: Recipe, *, steps: int, evaluates: bool) -> State:
    """How far a run is, as its folder shows."""
    folder = Path(recipe.output)
    step = newest_step(folder / FOLDER)
    if is_through(recipe, step=step, steps=steps, evaluates=evaluates):
        return State(kind="done", step=step)
    attempt = read_attempt(folder)
    if attempt is not None and attempt.reason is not None:
        return State(kind="failed", step=step, reason=attempt.reason)
    is_begun = step > 0 or attempt is not None or (folder / METRICS).exists()
    return State(kind="begun" if is_begun else "waiting", step=step)


def fails_again(recipe: Recipe) -> bool:
    """Whether the last attempt of a run failed, or its process ended before there was a further
    checkpoint.
    """
    folder = Path(recipe.output)
    attempt = read_attempt(folder)
    if attempt is None:
        return False
    return attempt.reason is not None or attempt.after_step == newest_step(folder / FOLDER)


def read_attempt(folder: Path) -> Attempt | None:
    """What is written of an attempt that has not ended well; None where there is none."""
    try:
        value = json.loads((folder / ATTEMPT).read_text(encoding="utf-8"))
        return Attempt(after_step=value["after_step"], reason=value["reason"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / ATTEMPT} is not as it was written; delete it") from error


def begin_attempt(folder: Path, reason: str | None = None) -> None:
    """Write down that a run is begun after its newest checkpoint, or why it failed there."""
    folder.mkdir(parents=True, exist_ok=True)
    attempt = {"version": 1, "after_step": newest_step(folder / FOLDER), "reason": reason}
    replace_text(folder / ATTEMPT, json.dumps(attempt) + "\n")


def end_attempt(folder: Path) -> None:
    """Take that back: the run is done, or was stopped on request."""
    (folder / ATTEMPT).unlink(missing_ok=True)


def progress(recipes: Iterable[Recipe]) -> int:
    """A number that grows as long as runs come on: their trained steps, and the attempts that
    failed.
    """
    folders = [Path(recipe.output) for recipe in recipes]
    return sum(newest_step(folder / FOLDER) + (folder / ATTEMPT).exists() for folder in folders)


def step_of_export(model: Path) -> int:
    """The last step of the run that exported a model; 1 where that is unknown."""
    metrics = model.parent / METRICS
    lines = read_lines(metrics) if metrics.is_file() else []
    return max((int(line["step"]) for line in lines), default=1)
