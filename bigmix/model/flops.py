"""Counts the floating-point operations that training a model needs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Dense bf16 peak in FLOP/s, from the vendors' data sheets.
PEAKS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "MI300X": 1307e12,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the cost of a token follows from: the weights of the linear layers of the body, those of
    the head, and the width of attention over all layers.
    """

    num_body_weights: int
    num_head_weights: int
    attention_width: int

    def of_step(self, num_tokens: int, num_loss_tokens: int, sum_sq_lengths: int) -> float:
        """FLOPs of forward and backward: 6 per weight and token, 12 per attention width and causal
        pair of tokens.

        `sum_sq_lengths` is the sum of the squared document lengths; half of it are causal pairs,
        each with two products of 2 FLOPs forward and twice that backward. The head runs on loss
        tokens only.
        """
        body = 6 * self.num_body_weights * num_tokens
        head = 6 * self.num_head_weights * num_loss_tokens
        return float(body + head + 12 * self.attention_width * sum_sq_lengths / 2)


def cost_of(lm: Any) -> Cost | None:
    """The cost of a causal language model; None for a mixture of experts, where it depends on the
    routing.
    """
    config = lm.config
    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts")):
        return None
    head = lm.get_output_embeddings()
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Cost(
        num_body_weights=sum(_numel(module.weight) for module in linear),
        num_head_weights=_numel(head.weight),
        attention_width=width * config.num_hidden_layers,
    )


def count_parameters(lm: nn.Module) -> int:
    """The number of weights of a model; shards count as the whole that they are part of."""
    return sum(_numel(parameter) for parameter in lm.parameters())


def _numel(parameter: Any) -> int:
    """The number of elements of a parameter; for a ZeRO-3 shard, those of the whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The peak FLOP/s of one device in bf16; None where it is not known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
