"""The DeepSpeed configuration: the keys of a file, completed with what the recipe decides."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bigmix
from bigmix.errors import BadInput
from bigmix.recipe import Recipe

_REPOSITORY = Path(bigmix.__file__).resolve().parent.parent
_OURS = {
    "optimizer": "train.lr, train.betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
    "fp16": "model.dtype, bf16 or fp32",
    "elasticity": "the ranks that are started; a run can resume on any number of them",
}
_BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_TABLES = ("zero_optimization", "bf16")
_STAGES = (1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSize:
    """How the rows of a step are divided; `num_micro_batches` is the number on each rank."""

    micro_batch_rows: int
    num_micro_batches: int
    num_ranks: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, over all ranks and micro-batches."""
        return self.micro_batch_rows * self.num_micro_batches * self.num_ranks


def read_ds_config(path: str) -> dict[str, Any]:
    """The keys of a DeepSpeed configuration file; a relative path is also looked up in the folder
    that holds the package.

    Raises BadInput where there is no such file, it is not a JSON object, or a key that must be an
    object is none.
    """
    places = [Path(path), _REPOSITORY / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(p.name for p in (_REPOSITORY / "ds_configs").glob("*.json")))
        raise BadInput(
            f"deepspeed: {path} does not exist; give a JSON file of DeepSpeed keys, or one of"
            f" ds_configs/: {shipped}"
        )
    try:
        keys = json.loads(found.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"deepspeed: {found} is not JSON: {error}") from error
    if not isinstance(keys, dict):
        raise BadInput(
            f"deepspeed: {found} holds a {type(keys).__name__}; it must be a JSON object"
        )
    faults = list(_faults_of_tables(keys, found))
    if faults:
        raise BadInput(*faults)
    return keys


def _faults_of_tables(keys: Mapping[str, Any], file: Path) -> Iterator[str]:
    wrong = [key for key in _TABLES if not isinstance(keys.get(key, {}), dict)]
    for key in wrong:
        yield (
            f"deepspeed: {key} is {json.dumps(keys[key])} in {file}, must be a JSON object, or"
            " left out"
        )


def _stage_of(keys: Mapping[str, Any]) -> Any:
    return keys.get("zero_optimization", {}).get("stage", 0)


def batch_size_of(recipe: Recipe, num_ranks: int) -> BatchSize:
    """How a step of the recipe is divided over ranks, where its rows can be divided evenly."""
    micro_batch_rows = recipe.train.micro_batch_rows
    return BatchSize(
        micro_batch_rows=micro_batch_rows,
        num_micro_batches=recipe.rows_per_step // (num_ranks * micro_batch_rows),
        num_ranks=num_ranks,
    )


def complete_for_training(
    keys: Mapping[str, Any], recipe: Recipe, num_ranks: int, dtype: str
) -> dict[str, Any]:
    """The configuration of a run on a number of ranks; raises BadInput as `complete` does."""
    return complete(keys, batch_size_of(recipe, num_ranks), dtype, recipe.train.clip)


def complete_for_evaluation(
    keys: Mapping[str, Any], recipe: Recipe, num_ranks: int, dtype: str
) -> dict[str, Any]:
    """The configuration of an evaluation without training; raises BadInput as `complete` does.

    Sizes of steps that the file fixes are left out: they would rule out other numbers of ranks.
    """
    free = {key: value for key, value in keys.items() if key not in _BATCH_KEYS}
    micro_batch_rows = recipe.train.micro_batch_rows
    batch = BatchSize(micro_batch_rows=micro_batch_rows, num_micro_batches=1, num_ranks=num_ranks)
    return complete(free, batch, dtype, recipe.train.clip)


def complete(keys: Mapping[str, Any], batch: BatchSize, dtype: str, clip: float) -> dict[str, Any]:
    """The configuration with everything that follows from the recipe: the sizes of a step, the
    precision (`dtype` is bf16 or fp32) and the norm at which gradients are clipped.

    Raises BadInput for each key that contradicts the recipe, and for a ZeRO stage that shards
    nothing.
    """
    decided: dict[str, Any] = {
        "train_batch_size": batch.rows_per_step,
        "train_micro_batch_size_per_gpu": batch.micro_batch_rows,
        "gradient_accumulation_steps": batch.num_micro_batches,
        "gradient_clipping": clip,
        "bf16": dict(keys.get("bf16", {})) | {"enabled": dtype == "bf16"},
    }
    faults = list(_contradictions(keys, decided))
    if faults:
        raise BadInput(*faults)
    # The optimizer is torch's AdamW, which needs no compiler; DeepSpeed must neither replace nor
    # refuse it.
    ours = {"zero_allow_untested_optimizer": True, "steps_per_print": 1 << 40}
    zero = dict(keys.get("zero_optimization", {}))
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {**keys, **ours, **decided, "zero_optimization": zero}


def zero_stage(keys: Mapping[str, Any]) -> int:
    """The ZeRO stage of a configuration; 0 where it has none."""
    return int(_stage_of(keys))


def _contradictions(keys: Mapping[str, Any], decided: Mapping[str, Any]) -> Iterator[str]:
    for key, instead in _OURS.items():
        if key in keys and keys[key] != {"enabled": False}:
            yield (
                f"deepspeed: {key} is set in the file; the recipe decides it by {instead}, delete"
                " it there"
            )
    if (stage := _stage_of(keys)) not in _STAGES:
        yield (
            f"deepspeed: zero_optimization.stage is {json.dumps(stage)} in the file, must be 1, 2"
            " or 3; ds_configs/zero1.json is the nearest to none"
        )
    for key, value in decided.items():
        given = keys.get(key, "auto")
        if key == "bf16" and isinstance(given, dict):
            given, value = given.get("enabled", "auto"), value["enabled"]
        if given not in ("auto", value):
            yield (
                f"deepspeed: {key} is {given} in the file and {value} by the recipe; delete it"
                " there"
            )
