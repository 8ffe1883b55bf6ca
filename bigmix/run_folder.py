"""A recipe goes in, where its run begins comes out: at step 0, at a checkpoint, or nowhere since it is finished."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bigmix.checkpoint import Position, newest, torn
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
        "evaluate_every",
        "evaluate_rows",
        "save_every",
        "keep_checkpoints",
        "log_every",
        "prefetch_steps",
        "resume",
        "export",
    ]
) | {
    "output",
    "bad_shards",
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
    """Where a run starts: from `checkpoint` at `position`, written by `ranks`, or from the model as it is."""

    checkpoint: Path | None
    position: Position
    ranks: int
    torn: tuple[str, ...] = ()


_AT_ZERO = Beginning(checkpoint=None, position=Position(step=0, report={}), ranks=0)


def beginning(recipe: Recipe) -> Beginning:
    """Find where to begin in the output folder of a recipe.

    Raises BadInput where the folder holds a run and `resume` is never, or a run of another recipe: each setting that
    differs is named with its old and its new value.
    """
    folder = Path(recipe.output)
    if not (folder / RECIPE).is_file():
        return _AT_ZERO
    if recipe.train.resume == "never":
        raise BadInput(
            f"output {folder} holds a run already and train.resume is never; give another output, delete the folder, "
            "or set train.resume=auto"
        )
    found = newest(folder / CHECKPOINTS)
    changed = tuple(_changes(recipe, folder))
    if changed:
        raise BadInput(*changed)
    broken = tuple(torn(folder / CHECKPOINTS))
    if found is None:
        return Beginning(checkpoint=None, position=_AT_ZERO.position, ranks=0, torn=broken)
    path, position, ranks = found
    return Beginning(checkpoint=path, position=position, ranks=ranks, torn=broken)


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
