"""Paths go in; out come the folders of results in them: runs, and evaluations of models outside of
a run.

A run's folder goes in; out come the outputs that its tasks kept, to be laid side by side.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.errors import BadInput
from bigmix.runs.layout import CHECKPOINTS, EVALUATION, EXPORT, LOG, RECIPE, SAMPLES
from bigmix.runs.metrics_log import METRICS, TENSORBOARD

# Folders of a run that hold no results and may hold many files.
_PASSED_BY = {CHECKPOINTS, EXPORT, TENSORBOARD, LOG, SAMPLES}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultFolder:
    """A folder of results.

    `is_named` says that it was given itself, and not found in a folder that was given.
    """

    folder: Path
    is_named: bool


def find_result_folders(given: Sequence[Path]) -> list[ResultFolder]:
    """Each folder given, or in place of one that holds no results itself all those in it, however
    deep, in order.
    """
    places: list[ResultFolder] = []
    for folder in given:
        inside = [] if _is_result(folder) else list(_inside(folder))
        places += [ResultFolder(folder=path, is_named=False) for path in inside] or [
            ResultFolder(folder=folder, is_named=True)
        ]
    return places


def _is_result(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / EVALUATION).is_file()


def _inside(folder: Path) -> Iterator[Path]:
    """A run that has not begun has a recipe and nothing else yet: it is found, so that it can be
    counted.

    Links are followed, to each folder once.
    """
    seen = set[Path]()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        is_run = not {RECIPE, METRICS, EVALUATION}.isdisjoint(files)
        passed_by = _PASSED_BY if is_run else set()
        folders[:] = sorted(set(folders) - passed_by, key=_order)
        if is_run and Path(place) != folder:
            yield Path(place)


def _order(name: str) -> list[tuple[int, float, str]]:
    """Numbers inside names in the order of their values: share-0.05 before share-0.1, seed-9 before
    seed-10.
    """
    parts = name.replace("_", "-").split("-")
    return [(0, float(p), "") if _is_number(p) else (1, 0.0, p) for p in parts]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSample:
    """One example of a task: what was asked, what would be right, what came out, and its scores by
    name.
    """

    prompt: str
    references: Sequence[str]
    outputs: Sequence[str]
    scores: Mapping[str, float]


def read_samples(folder: Path, step: int) -> dict[str, list[TaskSample]]:
    """The samples of each task at a step; a task without any is absent."""
    return {
        path.parent.name: _read(path)
        for path in sorted((folder / SAMPLES).glob(f"*/step-{step:06d}.jsonl"))
    }


def _read(path: Path) -> list[TaskSample]:
    samples = []
    # Not splitlines, which also divides at line ends that stand inside of a text.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, raw in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(raw)
            sample = TaskSample(
                prompt=str(line["prompt"]),
                references=[str(text) for text in line["references"]],
                outputs=[str(text) for text in line["outputs"]],
                scores={name: float(value) for name, value in line["scores"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{path}:{number} is {raw[:60]!r}; each line must be a JSON object with prompt,"
                " references, outputs and scores; delete the file to compare without its samples"
            ) from error
        samples.append(sample)
    return samples
