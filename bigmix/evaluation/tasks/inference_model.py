"""Holds a model for tasks: sharded weights are copied whole where a copy fits in memory.

Gathering the weights of a sharded model for every generated token costs far more than the token.
With a whole copy each rank works alone; without one, all ranks run their forwards in step.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
import transformers
from torch import Tensor

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.processes import available_memory_bytes
from bigmix.cluster.world import World
from bigmix.model.engine import is_sharded, whole_parameters

_ROOM = 2  # times the copy: activations and the cache of keys and values need memory as well

T = TypeVar("T")
WeightPlacement = Literal["auto", "whole", "sharded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceModel:
    """A causal language model of transformers in evaluation mode, and the device of its inputs.

    `in_step`: each forward is a collective, so all ranks must make the same number of them.
    """

    lm: Any
    device: torch.device
    in_step: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBatch(Generic[T]):
    """The rows of one batch on a rank; what an idle one gives is not used."""

    rows: Sequence[T]
    is_idle: bool


def batches_of_rank(rows: Sequence[T], world: World, size: int) -> Sequence[RankBatch[T]]:
    """The rows of a rank in batches of at most `size`, in the same number of batches as on every
    other rank; rows that are next to each other share a batch.
    """
    own = rows[world.rank :: world.size]
    longest = -(-len(rows) // world.size)
    parts = [own[at : at + size] for at in range(0, longest, size)]
    return [RankBatch(rows=part or rows[-1:], is_idle=not part) for part in parts]


def padded(
    rows: Sequence[Sequence[int]], width: int, device: torch.device, *, at_left: bool
) -> tuple[Tensor, Tensor]:
    """The rows as one tensor of this width, and an attention mask that is 0 for padding."""
    ids, mask = [], []
    for row in rows:
        padding, ones = [0] * (width - len(row)), [1] * len(row)
        ids.append([*padding, *row] if at_left else [*row, *padding])
        mask.append([*padding, *ones] if at_left else [*ones, *padding])
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def gathered_for_inference(
    lm: Any, device: torch.device, cluster: Cluster, weights: WeightPlacement = "auto"
) -> Iterator[InferenceModel]:
    """A context with a language model that can answer tasks; `lm` must be in evaluation mode. A
    collective.

    A model with whole weights is used as it is. A sharded one is copied whole where `weights` is
    whole, or auto and the copy fits.
    """
    if not is_sharded(lm):
        yield InferenceModel(lm=lm, device=device)
    elif weights == "sharded" or (weights == "auto" and not _fits(lm, device, cluster)):
        yield InferenceModel(lm=lm, device=device, in_step=True)
    else:
        yield InferenceModel(lm=_whole_copy(lm, device), device=device)


def _fits(lm: Any, device: torch.device, cluster: Cluster) -> bool:
    """Whether every rank has memory for a copy; a collective."""
    needed = sum(int(p.ds_numel) * p.element_size() for p in lm.parameters())
    free = min(cluster.gather(_free_bytes(device, cluster.world.local_size)))
    return bool(_ROOM * needed <= free)


def _free_bytes(device: torch.device, num_local_ranks: int) -> int:
    """The memory that is free for this rank, in bytes."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return available_memory_bytes() // num_local_ranks


def _whole_copy(lm: Any, device: torch.device) -> Any:
    """The same model with whole weights of its own; a collective."""
    config = copy.deepcopy(lm.config)
    options = {"dtype": lm.dtype, "attn_implementation": lm.config._attn_implementation}
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(config, **options)
    twin.to_empty(device=device)
    twin.tie_weights()
    # What is computed when a model is made, such as the angles of rotary positions, is missing on
    # the meta device.
    for name, buffer in lm.named_buffers():
        module, _, own = name.rpartition(".")
        twin.get_submodule(module)._buffers[own] = buffer.clone()
    for name, weight in whole_parameters(lm):
        parameter = twin.get_parameter(name)
        parameter.data = weight.to(device, copy=True)
    return twin.eval()
