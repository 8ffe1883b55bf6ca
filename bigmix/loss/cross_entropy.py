"""Hidden states and the head's weight go in; the objective and the nll sum of each group come out, in one pass.

Letters: N loss tokens, D hidden size, V vocabulary, G groups (sources while training), C tokens of a chunk.

The logits exist for one chunk at a time. Their gradient is known as soon as they are, since each token's coefficient
is given beforehand, so both gradients are formed in forward and nothing of size N x V is kept (the idea of
gradient-in-forward: Hsu et al., "Liger Kernel", 2024).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BYTES_OF_A_LOGIT = 4  # chunks of logits are fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitRule:
    """How an architecture turns the head's output x into logits: softcap * tanh(scale * x / softcap), cap optional."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """The tokens in the loss: `labels_N` to predict, `groups_N` (below `num_groups`) their sums, `coefficients_N` their weights."""

    labels_N: Tensor
    groups_N: Tensor
    coefficients_N: Tensor
    num_groups: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chunk:
    """One chunk: gradient of the logits before the head [C, V] in the hidden dtype (None without gradient), nll [C] in fp32."""

    grad_logits_CV: Tensor | None
    nll_C: Tensor


def mixed_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    tokens: LossTokens,
    *,
    rule: LogitRule,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The objective, sum_i coefficient_i nll_i, to differentiate, and the plain nll sum of each group [G], both fp32.

    `chunk_bytes` bounds the memory of the logits of a chunk. Without tokens the objective is 0 and the gradients are
    zeros, still part of the graph. Where no gradient is asked for, none is formed.
    """
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden_ND, head_VD, bias_V)
    )
    chunk = max(16, chunk_bytes // (BYTES_OF_A_LOGIT * head_VD.shape[0]))
    result: tuple[Tensor, Tensor] = _MixedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, bias_V, tokens, rule, chunk, wanted
    )
    return result


class _MixedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        tokens: LossTokens,
        rule: LogitRule,
        chunk: int,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        grads = [
            torch.zeros_like(tensor, dtype=torch.float32) if want and tensor is not None else None
            for want, tensor in zip(wanted, (None, head_VD, bias_V), strict=True)
        ]
        grad_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        objective = hidden_ND.new_zeros((), dtype=torch.float32)
        sums_G = hidden_ND.new_zeros(tokens.num_groups, dtype=torch.float32)
        for part in _slices(len(hidden_ND), chunk):
            hidden_CD = hidden_ND[part]
            done = _chunk(hidden_CD, head_VD, bias_V, _of(tokens, part), rule, any(wanted))
            objective += torch.dot(done.nll_C, tokens.coefficients_N[part])
            sums_G += _sums(done.nll_C, tokens.groups_N[part], tokens.num_groups)
            if done.grad_logits_CV is None:
                continue
            if grad_hidden_ND is not None:
                torch.mm(done.grad_logits_CV, head_VD, out=grad_hidden_ND[part])
            if grads[1] is not None:
                # Each chunk's product is added up in fp32: in bf16 the sum over many chunks drifts by per cents.
                grads[1] += done.grad_logits_CV.T @ hidden_CD
            if grads[2] is not None:
                grads[2] += done.grad_logits_CV.sum(0, dtype=torch.float32)
        ctx.grads = (grad_hidden_ND, *grads[1:])
        ctx.dtypes = (hidden_ND.dtype, head_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(sums_G)
        return objective, sums_G

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        factor = outputs[0]
        grads = tuple(
            # What multiplies the loss outside (loss scale, ranks) must reach every gradient alike.
            None if grad is None else grad.mul_(factor).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        )
        ctx.grads = None
        return (*grads, None, None, None, None)


def _chunk(
    hidden_CD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    tokens: LossTokens,
    rule: LogitRule,
    with_gradient: bool,
) -> _Chunk:
    """Loss and logit gradient of one chunk; the gradient takes the place of the logits."""
    logits_CV = (hidden_CD @ head_VD.T).float()
    if bias_V is not None:
        logits_CV += bias_V
    logits_CV *= rule.scale
    if rule.softcap is not None:
        logits_CV.div_(rule.softcap).tanh_().mul_(rule.softcap)
    labels_C1 = tokens.labels_N.unsqueeze(1)
    lse_C = logits_CV.logsumexp(1)
    nll_C = lse_C - logits_CV.gather(1, labels_C1).squeeze(1)
    if not with_gradient:
        return _Chunk(grad_logits_CV=None, nll_C=nll_C)
    slope_CV = None
    if rule.softcap is not None:  # d/dx cap tanh(x / cap) = 1 - (cap tanh(x / cap) / cap)^2
        slope_CV = 1 - (logits_CV / rule.softcap).square_()
    # d nll / d logits = softmax - onehot(label)
    grad_CV = logits_CV.sub_(lse_C.unsqueeze(1)).exp_()
    grad_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1, dtype=grad_CV.dtype))
    grad_CV *= (tokens.coefficients_N * rule.scale).unsqueeze(1)
    if slope_CV is not None:
        grad_CV *= slope_CV
    return _Chunk(grad_logits_CV=grad_CV.to(hidden_CD.dtype), nll_C=nll_C)


def _slices(total: int, size: int) -> Iterator[slice]:
    for begin in range(0, total, size):
        yield slice(begin, min(begin + size, total))


def _of(tokens: LossTokens, part: slice) -> LossTokens:
    return LossTokens(
        labels_N=tokens.labels_N[part],
        groups_N=tokens.groups_N[part],
        coefficients_N=tokens.coefficients_N[part],
        num_groups=tokens.num_groups,
    )


def _sums(values_C: Tensor, groups_C: Tensor, num_groups: int) -> Tensor:
    """The sum of each group [G], as a product with a one-hot matrix: index_add_ has no fixed order on a GPU."""
    groups_G1 = torch.arange(num_groups, device=groups_C.device).unsqueeze(1)
    return (groups_G1 == groups_C).to(values_C.dtype) @ values_C
