"""A language model goes in, sharded or not; out comes one that can be asked: its own weights whole,
or in step with all ranks.

To gather a sharded model's weights for every token that is written costs far more than the token.
Where a copy fits, the weights are gathered once; each rank then works for itself.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.processes import available_memory_bytes
from bigmix.model.engine import is_sharded, whole_parameters

_ROOM = 2  # times the copy: activations and the cache of keys and values need some, too

WeightPlacement = Literal["auto", "whole", "sharded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceModel:
    """A causal language model of transformers in evaluation mode, and where its inputs must be.

    `in_step`: each forward is a collective, so that all ranks must make the same number of them.
    """

    lm: Any
    device: torch.device
    in_step: bool = False


def padded(
    rows: Sequence[Sequence[int]], width: int, device: torch.device, *, at_left: bool
) -> tuple[Tensor, Tensor]:
    """The rows as one tensor of this width, and another with 1 for what is no padding."""
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
    """A language model that can be asked inside; it must be in evaluation mode. A collective.

    A model with whole weights is taken as it is. Of a sharded one a whole copy is made where that
    is asked for or fits.
    """
    if not is_sharded(lm):
        yield InferenceModel(lm=lm, device=device)
    elif weights == "sharded" or (weights == "auto" and not _fits(lm, device, cluster)):
        yield InferenceModel(lm=lm, device=device, in_step=True)
    else:
        yield InferenceModel(lm=_whole_copy(lm, device), device=device)


def _fits(lm: Any, device: torch.device, cluster: Cluster) -> bool:
    """Whether every rank has room for a copy; a collective."""
    needed = sum(int(p.ds_numel) * p.element_size() for p in lm.parameters())
    free = min(cluster.gather(_free_bytes(device, cluster.world.local_size)))
    return bool(_ROOM * needed <= free)


def _free_bytes(device: torch.device, local_ranks: int) -> int:
    """Memory that this rank can still take."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return available_memory_bytes() // local_ranks


def _whole_copy(lm: Any, device: torch.device) -> Any:
    """The same model with weights of its own; a collective."""
    config = copy.deepcopy(lm.config)
    options = {"dtype": lm.dtype, "attn_implementation": lm.config._attn_implementation}
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(config, **options)
    twin.to_empty(device=device)
    twin.tie_weights()
    # What is computed when a model is made, such as the angles of rotary positions, is not there on
    # meta.
    for name, buffer in lm.named_buffers():
        module, _, own = name.rpartition(".")
        twin.get_submodule(module)._buffers[own] = buffer.clone()
    for name, weight in whole_parameters(lm):
        parameter = twin.get_parameter(name)
        parameter.data = weight.to(device, copy=True)
    return twin.eval()
