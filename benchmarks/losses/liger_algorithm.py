"""The algorithm of Liger's fused loss (Hsu et al., 2024), in torch since its kernels need a GPU."""

from typing import Any

import torch
from contestant import Contestant
from loss_case import IGNORE
from torch import Tensor


def _chunk_tokens(num_tokens: int, hidden_size: int, vocabulary_size: int) -> int:
    """As many as keep a chunk's logits at about the size of the hidden states, up to a power of
    two.
    """
    even = -(-num_tokens // -(-vocabulary_size // hidden_size))
    return min(num_tokens, 1 << (even - 1).bit_length())


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
        count = (labels_T != IGNORE).sum()
        wanted = ctx.needs_input_grad[0]
        grad_hidden_TD = torch.zeros_like(hidden_TD) if wanted else None
        grad_head_VD = torch.zeros_like(head_VD) if wanted else None
        losses_T = torch.zeros(len(hidden_TD), device=hidden_TD.device)
        num_tokens, hidden_size = hidden_TD.shape
        size = _chunk_tokens(num_tokens, hidden_size, len(head_VD))
        for begin in range(0, len(hidden_TD), size):
            part = slice(begin, begin + size)
            logits_CV = hidden_TD[part] @ head_VD.T
            losses_T[part] = _to_gradient(logits_CV, labels_T[part], count)
            if grad_hidden_TD is not None and grad_head_VD is not None:
                torch.mm(logits_CV, head_VD, out=grad_hidden_TD[part])
                grad_head_VD.addmm_(logits_CV.T, hidden_TD[part])
        ctx.gradients = grad_hidden_TD, grad_head_VD
        return losses_T.sum() / count

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, head_VD = ctx.gradients
        return hidden_TD.mul_(outputs[0]), head_VD.mul_(outputs[0]), None


def _to_gradient(logits_CV: Tensor, labels_C: Tensor, count: Tensor) -> Tensor:
    """The nll of each token; the logits become d mean / d logits, token by token as in a kernel."""
    losses_C = logits_CV.new_zeros(len(labels_C), dtype=torch.float32)
    for at, (out_V, label) in enumerate(zip(logits_CV, labels_C.tolist(), strict=True)):
        if label == IGNORE:
            out_V.zero_()
            continue
        logits_V = out_V.float()
        lse = logits_V.logsumexp(0)
        losses_C[at] = lse - logits_V[label]
        p_V = logits_V.sub_(lse).exp_()
        p_V[label] -= 1
        out_V.copy_(p_V.div_(count))
    return losses_C


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """With sums in the weights' dtype, its default."""
    apply: Any = _GradientInForward.apply
    result: Tensor = apply(hidden_TD, head_VD, labels_T)
    return result


CONTESTANT = Contestant(loss=loss, note="chunks; masked cost products; no fp32 sums")
