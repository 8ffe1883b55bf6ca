"""Paths go in; out come the folders of results in them: runs, and evaluations of models outside of a run."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.runs.metrics_log import METRICS

RECIPE, EVALUATION, EXPORT = "recipe.yaml", "evaluation.json", "export"
# Folders of a run that hold no results and may hold many files.
_PASSED_BY = {"checkpoints", EXPORT, "tensorboard", "log", "samples"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A folder of results. `is_named` says that it was given itself, and not found in a folder that was given."""

    folder: Path
    is_named: bool


def find_places(given: Sequence[Path]) -> list[Place]:
    """Each folder given, or in place of one that holds no results itself all those in it, however deep, in order."""
    places: list[Place] = []
    for folder in given:
        inside = [] if _is_result(folder) else list(_inside(folder))
        places += [Place(folder=path, is_named=False) for path in inside] or [
            Place(folder=folder, is_named=True)
        ]
    return places


def _is_result(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / EVALUATION).is_file()


def _inside(folder: Path) -> Iterator[Path]:
    """A run that has not begun has a recipe and nothing else yet: it is found, so that it can be counted.

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
    """Numbers inside names in the order of their values: share-0.05 before share-0.1, seed-9 before seed-10."""
    parts = name.replace("_", "-").split("-")
    return [(0, float(p), "") if _is_number(p) else (1, 0.0, p) for p in parts]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()
