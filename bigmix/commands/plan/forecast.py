"""Forecasts a run from its recipe and opened inputs: counts, memory, disk space and time."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from bigmix.commands.plan.counts import Counts, count
from bigmix.commands.plan.memory import Memory, Setting, memory_of
from bigmix.commands.plan.shape import Shape, shape_of
from bigmix.data.run_plan import RunPlan
from bigmix.evaluation.behaviour.inputs import BehaviourInputs
from bigmix.model.causal_lm import choose_attention, choose_dtype
from bigmix.model.checks import read_configs
from bigmix.model.ds_config import complete_for_training
from bigmix.model.flops import PEAKS
from bigmix.recipe import Recipe
from bigmix.terminal import GIB
from bigmix.train.inputs import RunInputs

# For each token of a batch of answers the weights are read once. What a GPU computes in the time in
# which it reads a byte, and the time in which Python starts the kernels of a layer: both roughly.
_FLOPS_FOR_A_BYTE, _LAYER_S = 300, 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the run would run on; `gpu` is a key of flops.PEAKS, or cpu.

    `mfu` is the part of the device's peak that the run is expected to reach.
    """

    num_gpus: int
    gpu: str
    device_gib: float
    mfu: float

    @property
    def device(self) -> torch.device:
        """The type of the device, which is never used."""
        return torch.device("cpu" if self.gpu == "cpu" else "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """Bytes in the output folder.

    `checkpoints_bytes` is for all checkpoints, with the one that is being written besides those
    that are kept; `export_bytes` is 0 where nothing is exported.
    """

    checkpoint_bytes: int
    checkpoints_bytes: int
    export_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerCost:
    """What the behaviour probe costs: prompts, evaluations that it is part of, and the tokens after
    which an answer is cut. `seconds` is that of all of them, roughly; None where it is not known.
    """

    num_prompts: int
    num_evaluations: int
    max_new_tokens: int
    seconds: float | None

    @property
    def tokens_per_evaluation(self) -> int:
        """The most tokens that an evaluation generates."""
        return self.num_prompts * self.max_new_tokens

    @property
    def tokens(self) -> int:
        """The most tokens that the run generates."""
        return self.tokens_per_evaluation * self.num_evaluations


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Everything that is known about a run before it starts.

    `behaviour` is None where it is not measured, `flops` for mixtures of experts, and `seconds`
    also where the peak of the device is not known.
    """

    counts: Counts
    shape: Shape
    setting: Setting
    memory: Memory
    disk: Disk
    flops: float | None
    seconds: float | None
    attention: str
    behaviour: AnswerCost | None


def forecast(recipe: Recipe, inputs: RunInputs, plan: RunPlan, machine: Machine) -> Forecast:
    """Everything about the run except its losses; reads lengths and masks, and uses no device.

    Raises BadInput where the model does not fit the data or cannot be built.
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
    all_flops = _with_reference(flops, recipe, reference, counts)
    peak = PEAKS.get(machine.gpu)
    return Forecast(
        counts=counts,
        shape=shape,
        setting=setting,
        memory=memory_of(shape, setting, reference),
        disk=_disk(recipe, shape, setting),
        flops=flops,
        seconds=all_flops / (machine.mfu * peak * machine.num_gpus) if all_flops and peak else None,
        attention=_attention(recipe, config, machine, dtype),
        behaviour=_behaviour(recipe, inputs.behaviour, plan.steps, shape, machine),
    )


def _behaviour(
    recipe: Recipe,
    behaviour: BehaviourInputs | None,
    steps: int,
    shape: Shape,
    machine: Machine,
) -> AnswerCost | None:
    if behaviour is None:
        return None
    settings, every = behaviour.settings, recipe.evaluate.every
    evaluated = {0, steps}
    if settings.when != "ends" and every:
        evaluated |= {*range(every, steps, every)}
    num_prompts, num_evaluations = len(behaviour.prompts), len(evaluated)
    peak, seconds = PEAKS.get(machine.gpu), None
    if peak is not None:
        num_batches = ceil(num_prompts / (machine.num_gpus * settings.batch_rows))
        reading_s = 2 * shape.num_parameters * _FLOPS_FOR_A_BYTE / peak
        token_s = max(reading_s, shape.num_layers * _LAYER_S)
        seconds = num_evaluations * num_batches * settings.max_new_tokens * token_s
    return AnswerCost(
        num_prompts=num_prompts,
        num_evaluations=num_evaluations,
        max_new_tokens=settings.max_new_tokens,
        seconds=seconds,
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
    """The FLOPs of the run and of its reference, which does a forward pass, a third of a step, on
    the rows of its sources.
    """
    if flops is None or reference is None or recipe.reference is None:
        return flops
    if reference.cost is None:
        return None
    sources = [counts.sources[name] for name in recipe.reference.sources]
    num_tokens = sum(source.num_tokens for source in sources)
    num_all = max(1, sum(source.num_tokens for source in counts.sources.values()))
    sum_sq_lengths = round(counts.sum_sq_lengths * num_tokens / num_all)
    num_loss_tokens = sum(source.num_loss_tokens for source in sources)
    return flops + reference.cost.of_step(num_tokens, num_loss_tokens, sum_sq_lengths) / 3


def flops_of(shape: Shape, counts: Counts) -> float | None:
    """The FLOPs of all steps; None for mixtures of experts, where they depend on the routing."""
    if shape.cost is None:
        return None
    sources = counts.sources.values()
    return shape.cost.of_step(
        sum(source.num_tokens for source in sources),
        sum(source.num_loss_tokens for source in sources),
        counts.sum_sq_lengths,
    )


def _setting(recipe: Recipe, keys: Mapping[str, Any], machine: Machine, dtype: str) -> Setting:
    micro_batch_rows = recipe.train.micro_batch_rows
    return Setting(
        keys=complete_for_training(keys, recipe, machine.num_gpus, dtype),
        num_ranks=machine.num_gpus,
        dtype=dtype,
        on_gpu=machine.device.type == "cuda",
        num_tokens=micro_batch_rows * recipe.longest_row,
        device_bytes=int(machine.device_gib * GIB),
        loss_chunk_mib=recipe.loss.chunk_mib,
        activation_checkpointing=recipe.model.activation_checkpointing,
        saves_in_background=recipe.checkpoint.background,
        keeps_average=recipe.train.ema is not None,
        holds_base=recipe.has_own_base,
    )


def _disk(recipe: Recipe, shape: Shape, setting: Setting) -> Disk:
    checkpoint_bytes = setting.state_bytes * shape.num_parameters
    return Disk(
        checkpoint_bytes=checkpoint_bytes,
        checkpoints_bytes=checkpoint_bytes * (recipe.checkpoint.keep + 1),
        export_bytes=setting.weight_bytes * shape.num_parameters if recipe.checkpoint.export else 0,
    )
