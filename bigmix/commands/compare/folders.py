"""Finds folders of results, those of runs and of single evaluations, and the outputs kept there."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bigmix.data.shards.location import MANIFEST
from bigmix.errors import BadInput
from bigmix.runs.layout import BEHAVIOUR, CHECKPOINTS, EVALUATION, EXPORT, LOG, RECIPE, SAMPLES
from bigmix.runs.metrics_log import METRICS, TENSORBOARD

# Folders of a run that hold no results and may hold many files.
_NOT_SEARCHED = {CHECKPOINTS, EXPORT, TENSORBOARD, LOG, SAMPLES, BEHAVIOUR}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultFolder:
    """A folder of results; `is_named` where it was given itself and not found in a given folder."""

    folder: Path
    is_named: bool


def find_result_folders(given: Sequence[Path]) -> list[ResultFolder]:
    """Each folder given; in place of one that holds no results itself, all folders of results in
    it at any depth, in order.
    """
    results: list[ResultFolder] = []
    for folder in given:
        inside = [] if _is_result(folder) else list(_inside(folder))
        results += [ResultFolder(folder=path, is_named=False) for path in inside] or [
            ResultFolder(folder=folder, is_named=True)
        ]
    return results


def _is_result(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / EVALUATION).is_file()


def _inside(folder: Path) -> Iterator[Path]:
    """Folders of results in a folder, through links too, each once.

    A run that has not begun has only a recipe; it is among them, so that it can be counted.
    """
    seen = set[Path]()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = Path(path).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        is_run = not {RECIPE, METRICS, EVALUATION}.isdisjoint(files)
        not_searched = _NOT_SEARCHED if is_run else set()
        folders[:] = sorted(set(folders) - not_searched, key=_order)
        if is_run and Path(path) != folder:
            yield Path(path)


def _order(name: str) -> list[tuple[int, float, str]]:
    """A key that sorts numbers inside names by their values: share-0.05 before share-0.1, seed-9
    before seed-10.
    """
    parts = name.replace("_", "-").split("-")
    return [(0, float(p), "") if _is_number(p) else (1, 0.0, p) for p in parts]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSample:
    """One example of a task: the prompt, the right outputs, those of the model, and its scores by
    name.
    """

    prompt: str
    references: Sequence[str]
    outputs: Sequence[str]
    scores: Mapping[str, float]


def read_samples(folder: Path, step: int) -> dict[str, list[TaskSample]]:
    """The samples of each task at a step; a task without samples is absent.

    Raises BadInput where a line of them is damaged.
    """
    return {
        path.parent.name: _read(path)
        for path in sorted((folder / SAMPLES).glob(f"*/step-{step:06d}.jsonl"))
    }


def _read(path: Path) -> list[TaskSample]:
    samples = []
    # splitlines would also split at line ends inside a text.
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


def prepared_chats(folders: Mapping[str, str]) -> dict[str, bool]:
    """Whether prepared sources, given as folders by name, have conversations, as far as they are on
    this machine.
    """
    found = {}
    for name, folder in folders.items():
        with suppress(OSError, ValueError):
            manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(manifest, dict) and manifest.get("kind") in ("text", "chat"):
                found[name] = manifest["kind"] == "chat"
    return found
