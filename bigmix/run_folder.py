"""A recipe goes in, where its run begins comes out: at step 0, at a checkpoint, or nowhere since it is finished."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bigmix.checkpoint.listing import Listed, other_versions
from bigmix.checkpoint.restore import newest_whole
from bigmix.dist import Cluster
from bigmix.errors import BadInput
from bigmix.files import replace_text
from bigmix.recipe import Recipe, differences, load_recipe, to_yaml

RECIPE, CHECKPOINTS, EXPORT, LOG = "recipe.yaml", "checkpoints", "export", "log"
# These change speed, memory and what is written down, never what is learned.
_FREE = frozenset(
    f"train.{name}"
    for name in [
        "micro_batch_rows",
        "max_minutes",
        "stop_before_end_minutes",
        "hang_minutes",
        "dead_after_s",
        "evaluate_every",
        "evaluate_rows",
        "save_every",
        "keep_checkpoints",
        "keep_every",
        "save",
        "log_every",
        "prefetch_steps",
        "resume",
        "export",
    ]
) | {
    "output",
    "deepspeed",
    "pad_to_multiple",
    "model.activation_checkpointing",
    "loss.entropy",
    "loss.backend",
    "loss.head_gradient",
    "loss.chunk_mib",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """Where a run starts: from `checkpoint`, or from the model as it is; `torn` says what is wrong with newer ones."""

    checkpoint: Listed | None = None
    torn: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The last step that is trained already."""
        return 0 if self.checkpoint is None else self.checkpoint.position.step


def beginning(recipe: Recipe, cluster: Cluster) -> Beginning:
    """Find where to begin in the output folder of a recipe; a collective.

    Raises BadInput on every rank where the folder holds a run and `resume` is never, or a run of another recipe: each
    setting that differs is named with its old and its new value.
    """
    folder = Path(recipe.output)
    faults = list(_faults(recipe, folder)) if cluster.world.is_first else []
    (faults, *_) = cluster.gather(faults)
    if faults:
        raise BadInput(*faults)
    found = newest_whole(folder / CHECKPOINTS, cluster)
    return Beginning(checkpoint=found.listed, torn=found.torn)


def _faults(recipe: Recipe, folder: Path) -> Iterator[str]:
    if not (folder / RECIPE).is_file():
        return
    if recipe.train.resume == "never":
        yield (
            f"output {folder} holds a run already and train.resume is never; give another output, delete the folder, "
            "or set train.resume=auto"
        )
    yield from _changes(recipe, folder)
    yield from other_versions(folder / CHECKPOINTS)


def write_recipe(recipe: Recipe) -> None:
    """Keep the resolved recipe with its run."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / RECIPE, to_yaml(recipe))


def _changes(recipe: Recipe, folder: Path) -> Iterator[str]:
    for key, old, new in differences(load_recipe(str(folder / RECIPE)), recipe):
        if key not in _FREE and not key.startswith("cache."):
            yield (
                f"{key} is {new!r}, and the run in {folder} was begun with {old!r}; "
                "it cannot go on as the same run, put the old value back or give another output"
            )
