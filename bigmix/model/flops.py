"""A model and the lengths of its documents go in, the floating-point operations that training needs
come out.
"""

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
    """What one token costs: weights of the linear layers of the body, of the head, and attention
    per pair of tokens.
    """

    body_weights: int
    head_weights: int
    attention_width: int

    def of_step(self, tokens: int, loss_tokens: int, sum_sq_lengths: int) -> float:
        """FLOPs of forward and backward: 6 per weight and token, 6 per attention width and causal
        pair.

        `sum_sq_lengths` is the sum of the squared document lengths; half of it are causal pairs,
        each with two products of 2 FLOPs forward and twice that backward. The head works for loss
        tokens alone.
        """
        body = 6 * self.body_weights * tokens
        head = 6 * self.head_weights * loss_tokens
        return float(body + head + 12 * self.attention_width * sum_sq_lengths / 2)


def cost_of(lm: Any) -> Cost | None:
    """The cost of a causal language model; None for mixtures of experts, where it depends on the
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
        body_weights=sum(_numel(module.weight) for module in linear),
        head_weights=_numel(head.weight),
        attention_width=width * config.num_hidden_layers,
    )


def count_parameters(lm: nn.Module) -> int:
    """All weights of a model, shards counted whole."""
    return sum(_numel(parameter) for parameter in lm.parameters())


def _numel(parameter: Any) -> int:
    """Elements of a parameter; of a ZeRO-3 shard, those of the whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that one device can do in bf16, where it is known."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
