"""Where a run begins: at its first step, at a checkpoint, or nowhere since it is complete."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.world import World
from bigmix.errors import BadInput
from bigmix.files import lock_if_supported, replace_text
from bigmix.recipe import Recipe, differences, from_plain, to_yaml
from bigmix.recipe.fields import AtResume
from bigmix.recipe.marks import at_resume, moves_rows
from bigmix.runs.checkpoints import (
    CheckpointManifest,
    faults_of,
    folders,
    other_versions,
    read_checkpoint,
)
from bigmix.runs.layout import CHECKPOINTS, RECIPE


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCheckpoint:
    """The newest complete checkpoint, None where there is none, and what is wrong with each
    newer one.
    """

    listed: CheckpointManifest | None
    damaged: tuple[str, ...] = ()


def newest_complete(
    folder: Path, cluster: Cluster, *, before: int | None = None
) -> FoundCheckpoint:
    """Look for the newest checkpoint whose files are all as they were written, of a step below
    `before` where that is given.

    A collective: each rank reads a part of the files.
    """
    listings = (
        list(map(read_checkpoint, folders(folder, before))) if cluster.world.is_first else None
    )
    candidates, *_ = cluster.gather(listings)
    damaged: list[str] = []
    for candidate in candidates:
        if isinstance(candidate, str):
            damaged.append(candidate)
            continue
        own = slice(cluster.world.rank, None, cluster.world.size)
        faults = [f for part in cluster.gather(list(faults_of(candidate, own))) for f in part]
        if not faults:
            return FoundCheckpoint(listed=candidate, damaged=tuple(damaged))
        damaged += faults
    return FoundCheckpoint(listed=None, damaged=tuple(damaged))


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """Go back to the last checkpoint before `steps`, and then train on without them."""

    steps: tuple[int, ...]
    reason: str


SKIPPED_STEPS, CHANGES, LOCK = "passed-over.json", "changes.jsonl", ".lock"
ENDING_S = 60  # that a command may take to end, and a server of files to see that a machine is gone


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeChange:
    """A setting that is not what it was when a checkpoint was written; None where there was or is
    none.
    """

    key: str
    old: Any
    new: Any

    @property
    def moves_rows(self) -> bool:
        """Whether other rows are drawn from there on, and not only other things learned from
        them.
        """
        return moves_rows(self.key)

    def __str__(self) -> str:
        return f"{self.key} is {self.new!r}, it was {self.old!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """Where a run starts: from `checkpoint`, or from the model as it is.

    `changes` hold from there on; `damaged` says what is wrong with newer checkpoints.
    """

    checkpoint: CheckpointManifest | None = None
    damaged: tuple[str, ...] = ()
    changes: tuple[RecipeChange, ...] = ()

    @property
    def step(self) -> int:
        """The last step that is trained already."""
        return 0 if self.checkpoint is None else self.checkpoint.position.step


@contextmanager
def locked_folder(folder: Path, cluster: Cluster, *, wait_s: float) -> Iterator[bool]:
    """Hold the folder of a run against other commands; a collective.

    False where one holds it still after some seconds.
    """
    with ExitStack() as stack:
        is_ours = None
        if cluster.world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK).open("w"))
            until = time.monotonic() + wait_s
            while not (is_ours := lock_if_supported(file)) and time.monotonic() < until:
                time.sleep(0.2)
        yield bool(cluster.gather(is_ours)[0])


def find_resume_point(recipe: Recipe, content: Mapping[str, str], cluster: Cluster) -> ResumePoint:
    """Find where to begin in the output folder of a recipe, whose sources have this content; a
    collective.

    Raises BadInput on every rank where the folder holds a run and `resume` is never, or where the
    run cannot go on with this recipe: each setting that prevents it is named with its old and
    its new value.
    """
    folder = Path(recipe.output)
    faults = list(_faults(recipe, folder)) if cluster.world.is_first else []
    faults, *_ = cluster.gather(faults)
    if faults:
        raise BadInput(*faults)
    found = newest_complete(folder / CHECKPOINTS, cluster)
    if found.listed is None:
        return ResumePoint(damaged=found.damaged)
    changes = _changes(recipe, content, found.listed)
    return ResumePoint(checkpoint=found.listed, damaged=found.damaged, changes=changes)


def _faults(recipe: Recipe, folder: Path) -> Iterator[str]:
    if not (folder / RECIPE).is_file():
        return
    if recipe.checkpoint.resume == "never":
        yield (
            f"output {folder} holds a run already and checkpoint.resume is never; give another"
            " output, delete the folder, or set checkpoint.resume=auto"
        )
    yield from other_versions(folder / CHECKPOINTS)


def _changes(
    recipe: Recipe, content: Mapping[str, str], listed: CheckpointManifest
) -> tuple[RecipeChange, ...]:
    """What differs from the recipe of a checkpoint and decides what is learned."""
    position = listed.position
    old = from_plain(position.recipe, str(listed.path))
    changes = [
        RecipeChange(key=key, old=before, new=after)
        for key, before, after in differences(old, recipe)
        if not _is_free(key, recipe)
    ]
    faults = [
        f"{change.key} is {change.new!r}, and the run in {recipe.output} has {change.old!r} at step"
        f" {position.step}; it cannot go on with another one, put the old value back or give"
        " another output"
        for change in changes
        if at_resume(change.key) is AtResume.FIXED
    ]
    faults += [
        f"sources.{name}.path: the shards in {recipe.sources[name].path} are not those of"
        f" {old.sources[name].path} that the run in {recipe.output} has read until step"
        f" {position.step}; restore them, or give the source another name: it then starts"
        " from its first row"
        for name, digest in content.items()
        if position.content.get(name, digest) != digest
    ]
    if faults:
        raise BadInput(*faults)
    return tuple(changes)


def _is_free(key: str, recipe: Recipe) -> bool:
    """Whether a setting may change at a resume without a word."""
    mark = at_resume(key)
    if mark is AtResume.FREE_WITHOUT_CONTROLLERS:
        return not recipe.controllers
    return mark is AtResume.FREE


def keep_changes(folder: Path, after_step: int, changes: Sequence[RecipeChange]) -> None:
    """Write down what changes after a step; what was written of later steps is taken back."""
    path = folder / CHANGES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["after_step"] < after_step]
    new = [
        json.dumps({"after_step": after_step, "key": c.key, "old": c.old, "new": c.new})
        for c in changes
    ]
    if lines or new:
        replace_text(path, "".join(f"{line}\n" for line in [*kept, *new]))


def log_to_file(folder: Path, world: World) -> None:
    """What libraries log and warn goes to a file of each rank, not over the progress bar."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=folder / f"rank-{world.rank}.log",
        level=logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        force=True,  # a run before this one in the same process has its own file
    )
    logging.captureWarnings(True)


def write_recipe(recipe: Recipe) -> None:
    """Keep the resolved recipe with its run."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / RECIPE, to_yaml(recipe))


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSteps:
    """Steps that a run has gone back before and does not train, one entry for each time that it
    went back.
    """

    times: tuple[RollBack, ...] = ()

    @property
    def steps(self) -> frozenset[int]:
        """All of them."""
        return frozenset(step for back in self.times for step in back.steps)


def read_skipped_steps(folder: Path) -> SkippedSteps:
    """The steps that an earlier part of a run has gone back before."""
    path = folder / SKIPPED_STEPS
    if not path.is_file():
        return SkippedSteps()
    try:
        times = json.loads(path.read_text(encoding="utf-8"))["times"]
        return SkippedSteps(
            times=tuple(RollBack(steps=tuple(t["steps"]), reason=t["reason"]) for t in times)
        )
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(
            f"{path} is not as it was written ({error}); restore it from a copy, or give another"
            " output"
        ) from error


def write_skipped_steps(folder: Path, passed: SkippedSteps) -> None:
    """Keep the skipped steps outside of the checkpoints: the one that the run goes back to does not
    know them.
    """
    times = [{"steps": back.steps, "reason": back.reason} for back in passed.times]
    replace_text(
        folder / SKIPPED_STEPS, json.dumps({"version": 1, "times": times}, indent=1) + "\n"
    )
