"""The cases of the loss benchmark: random inputs, and the gradients of an fp64 reference.

The inputs are the same in every process. Letters: T tokens, N of them in the loss, D hidden size, V
vocabulary, C tokens of a chunk, R rows of a gradient that are compared.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEAD_SCALE = 0.04  # logits of a standard deviation of 1 (D = 512) to 2.6 (D = 4096)
_CHUNK_BYTES = 1 << 29
_SAMPLE = 1 << 26  # at most this many elements of a gradient are compared


class Inputs(NamedTuple):
    """Hidden states [T, D], the head [V, D] and labels [T], IGNORE where no loss is taken."""

    hidden_TD: Tensor
    head_VD: Tensor
    labels_T: Tensor


class Expected(NamedTuple):
    """What an implementation must give: the loss, and `sampled` rows of both gradients, in fp32."""

    loss: float
    hidden_RD: Tensor
    head_RD: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A size, a dtype and the fraction of the tokens that is in the loss."""

    num_tokens: int
    hidden_size: int
    vocabulary_size: int
    dtype: str
    fraction: float

    @property
    def num_loss_tokens(self) -> int:
        """The number of tokens in the loss, N."""
        return round(self.num_tokens * self.fraction)

    def __str__(self) -> str:
        size = f"{self.num_tokens} x {self.hidden_size} x {self.vocabulary_size}"
        return f"{size}, {self.dtype}, {self.fraction:.0%} in the loss"

    def arguments(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def path(self, folder: Path) -> Path:
        """The file of the reference."""
        size = f"{self.num_tokens}x{self.hidden_size}x{self.vocabulary_size}"
        return folder / f"{size}-{self.dtype}-{self.num_loss_tokens}.pt"

    def head(self, device: torch.device) -> Tensor:
        """The head, the same for all inputs."""
        draw = torch.Generator(device).manual_seed(0)
        head_VD = torch.randn(self.vocabulary_size, self.hidden_size, generator=draw, device=device)
        return head_VD.mul_(_HEAD_SCALE).to(DTYPES[self.dtype])

    def inputs(self, number: int, head_VD: Tensor) -> Inputs:
        """The head, with the hidden states and labels of this number."""
        device = head_VD.device
        draw = torch.Generator(device).manual_seed(1 + number)
        hidden_TD = torch.randn(self.num_tokens, self.hidden_size, generator=draw, device=device)
        labels_T = torch.randint(
            self.vocabulary_size, (self.num_tokens,), generator=draw, device=device
        )
        order_T = torch.randperm(self.num_tokens, generator=draw, device=device)
        labels_T[order_T[self.num_loss_tokens :]] = IGNORE
        return Inputs(hidden_TD.to(DTYPES[self.dtype]), head_VD, labels_T)


def reference(case: Case, device: torch.device) -> Expected:
    """Loss and gradients of inputs 0 in fp64, by the dense equations over chunks of tokens."""
    hidden_TD, head_VD, labels_T = case.inputs(0, case.head(device))
    hidden_TD, head_VD = hidden_TD.double(), head_VD.double()
    positions_N = (labels_T != IGNORE).nonzero().squeeze(1)
    grad_hidden_TD, grad_head_VD = torch.zeros_like(hidden_TD), torch.zeros_like(head_VD)
    loss = 0.0
    for positions_C in torch.split(positions_N, max(1, _CHUNK_BYTES // (8 * case.vocabulary_size))):
        hidden_CD, label_C1 = hidden_TD[positions_C], labels_T[positions_C].unsqueeze(1)
        log_p_CV = (hidden_CD @ head_VD.T).log_softmax(1)
        loss -= float(log_p_CV.gather(1, label_C1).sum())
        # d mean nll / d logits = (softmax - onehot) / N
        grad_CV = log_p_CV.exp_()
        grad_CV.scatter_add_(1, label_C1, -torch.ones_like(label_C1, dtype=grad_CV.dtype))
        grad_CV /= len(positions_N)
        grad_hidden_TD[positions_C] = grad_CV @ head_VD
        grad_head_VD.addmm_(grad_CV.T, hidden_CD)
    return Expected(loss / len(positions_N), sampled(grad_hidden_TD), sampled(grad_head_VD))


def sampled(gradient: Tensor) -> Tensor:
    """The gradient in fp32; of a very large one only every second row, every third and so on."""
    step = -(-gradient.numel() // _SAMPLE)
    return gradient[::step].float()


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    expected = expected.double()
    return float((sampled(found).double() - expected).norm() / expected.norm())
