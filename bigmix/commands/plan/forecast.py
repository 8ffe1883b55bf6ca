"""A recipe and its opened inputs go in, everything that can be known of the run before it starts
comes out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmix.commands.plan.counts import Counts, count
from bigmix.commands.plan.memory import Memory, Setting, memory_of
from bigmix.commands.plan.shape import Shape, shape_of
from bigmix.data.run_plan import RunPlan
from bigmix.model.causal_lm import choose_attention, choose_dtype
from bigmix.model.checks import read_configs
from bigmix.model.ds_config import complete_for_training
from bigmix.model.flops import PEAKS
from bigmix.recipe import Recipe
from bigmix.terminal import GIB
from bigmix.train.inputs import RunInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the run would run on; `gpu` is a key of flops.PEAKS, or cpu."""

    gpus: int
    gpu: str
    device_gib: float
    mfu: float

    @property
    def device(self) -> torch.device:
        """The kind of device; nothing is done on it."""
        return torch.device("cpu" if self.gpu == "cpu" else "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Bytes in the output folder; while a checkpoint is written, one more than are kept is
    there.
    """

    checkpoint: int
    checkpoints: int
    export: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a run will be.

    `seconds` is None where the model's FLOPs or the device's peak are not known.
    """

    counts: Counts
    shape: Shape
    setting: Setting
    memory: Memory
    disk: Disk
    flops: float | None
    seconds: float | None
    attention: str


def forecast(recipe: Recipe, inputs: RunInputs, plan: RunPlan, machine: Machine) -> Forecast:
    """Everything about the run but its losses; reads lengths and masks, and touches no device.

    Raises BadInput where the model does not fit the data or cannot be made.
    """
    configs = read_configs(recipe, inputs.manifest)
    config = configs.model
    dtype = choose_dtype(recipe.model.dtype, machine.device).value
    shape = _shape(recipe, config, machine, dtype)
    reference = None
    if configs.reference is not None:
        reference = _shape(recipe, configs.reference, machine, dtype)
    counts = count(recipe, plan)
    setting = _setting(recipe, inputs.ds_keys, machine, dtype)
    flops = flops_of(shape, counts)
    spent = _with_reference(flops, recipe, reference, counts)
    peak = PEAKS.get(machine.gpu)
    return Forecast(
        counts=counts,
        shape=shape,
        setting=setting,
        memory=memory_of(shape, setting, reference),
        disk=_disk(recipe, shape, setting),
        flops=flops,
        seconds=spent / (machine.mfu * peak * machine.gpus) if spent and peak else None,
        attention=_attention(recipe, config, machine, dtype),
    )


def _attention(recipe: Recipe, config: Any, machine: Machine, dtype: str) -> str:
    return choose_attention(recipe.model.attention, config, machine.device, dtype).value


def _shape(recipe: Recipe, config: Any, machine: Machine, dtype: str) -> Shape:
    return shape_of(
        config,
        dtype=dtype,
        attention=_attention(recipe, config, machine, dtype),
        micro_batch_rows=recipe.train.micro_batch_rows,
        row_tokens=recipe.longest_row,
    )


def _with_reference(
    flops: float | None, recipe: Recipe, reference: Shape | None, counts: Counts
) -> float | None:
    """The needed operations and those of the frozen model: a forward, a third of a step, on the
    rows of its sources.
    """
    if flops is None or reference is None or recipe.reference is None:
        return flops
    if reference.cost is None:
        return None
    shown = [counts.sources[name] for name in recipe.reference.sources]
    tokens = sum(source.tokens for source in shown)
    everything = max(1, sum(source.tokens for source in counts.sources.values()))
    sum_sq_lengths = round(counts.sum_sq_lengths * tokens / everything)
    loss_tokens = sum(source.loss_tokens for source in shown)
    return flops + reference.cost.of_step(tokens, loss_tokens, sum_sq_lengths) / 3


def flops_of(shape: Shape, counts: Counts) -> float | None:
    """The operations of the whole run; None for mixtures of experts, where they depend on the
    routing.
    """
    if shape.cost is None:
        return None
    sources = counts.sources.values()
    return shape.cost.of_step(
        sum(source.tokens for source in sources),
        sum(source.loss_tokens for source in sources),
        counts.sum_sq_lengths,
    )


def _setting(recipe: Recipe, keys: Mapping[str, Any], machine: Machine, dtype: str) -> Setting:
    rows = recipe.train.micro_batch_rows
    return Setting(
        keys=complete_for_training(keys, recipe, machine.gpus, dtype),
        ranks=machine.gpus,
        dtype=dtype,
        on_gpu=machine.device.type == "cuda",
        tokens=rows * recipe.longest_row,
        device_bytes=int(machine.device_gib * GIB),
        loss_chunk_mib=recipe.loss.chunk_mib,
        activation_checkpointing=recipe.model.activation_checkpointing,
        saves_in_background=recipe.checkpoint.background,
        keeps_average=recipe.train.ema is not None,
        holds_base=recipe.has_own_base,
    )


def _disk(recipe: Recipe, shape: Shape, setting: Setting) -> Disk:
    checkpoint = setting.state_bytes * shape.parameters
    return Disk(
        checkpoint=checkpoint,
        checkpoints=checkpoint * (recipe.checkpoint.keep + 1),
        export=setting.weight_bytes * shape.parameters if recipe.checkpoint.export else 0,
    )
