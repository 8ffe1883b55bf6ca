"""The backend of the loss for any device, by torch.

It works through a chunk in blocks of tokens that fit a cache, so that what lies between logits and
gradient never goes to memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bigmix.loss.chunks import slices
from bigmix.loss.requests import (
    LSE,
    NUM_COLUMNS,
    OBJECTIVE,
    REFERENCE_LSE,
    ChunkTask,
    ReferenceTask,
    column_of,
)
from bigmix.loss.terms import LogitRule, Statistic, logit_slopes, token_losses

# Elements of a block. CPU: two or three arrays of 1 MiB in the L2 caches; GPU: enough to keep every
# processor busy.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 26


def torch_backend(task: ChunkTask) -> Tensor:
    """A `Backend` for any device."""
    num_tokens, vocabulary_size = task.outputs_CV.shape
    columns_CM = task.coefficients_C.new_zeros(num_tokens, NUM_COLUMNS)
    for part in cache_blocks(num_tokens, vocabulary_size, task.outputs_CV.device):
        _block(task, part, columns_CM[part])
    return columns_CM


def cache_blocks(height: int, width: int, device: torch.device) -> Iterator[slice]:
    """The first axis of a matrix [height, width] in slices that fit a cache."""
    size = max(1, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // width)
    return slices(height, size)


def _block(task: ChunkTask, part: slice, columns_BM: Tensor) -> None:
    logits_BV = logits_of(task.outputs_CV[part], task.bias_V, task.rule)
    labels_B, coefficients_B = task.labels_C[part], task.coefficients_C[part]
    top_B, best_B = logits_BV.max(1)
    p_BV = logits_BV.softmax(1)
    lse_B = _lse(p_BV, top_B, best_B)
    nll_B = lse_B - logits_BV.gather(1, labels_B.unsqueeze(1)).squeeze(1)
    losses_B = token_losses(logits_BV, nll_B, lse_B, task.terms)
    columns_BM[:, OBJECTIVE] = coefficients_B * losses_B
    columns_BM[:, column_of(Statistic.TOKENS)] = 1
    columns_BM[:, column_of(Statistic.NLL)] = nll_B
    columns_BM[:, column_of(Statistic.HITS)] = best_B == labels_B
    columns_BM[:, column_of(Statistic.Z)] = lse_B.square()
    columns_BM[:, LSE] = lse_B
    if task.terms.entropy:
        columns_BM[:, column_of(Statistic.ENTROPY)] = lse_B - (p_BV * logits_BV).sum(1)
    k_B = q_BV = None
    if task.reference is not None:
        k_B = task.reference.coefficients_C[part]
        kl_B, q_BV, reference_lse_B = _kl(task.reference, part, logits_BV, lse_B)
        columns_BM[:, OBJECTIVE] += k_B * kl_B
        columns_BM[:, column_of(Statistic.KL)] = kl_B
        columns_BM[:, REFERENCE_LSE] = reference_lse_B
    if task.gradient_CV is None:
        return
    slopes = logit_slopes(
        coefficients_B,
        lse_B,
        task.terms,
        vocabulary_size=logits_BV.shape[1],
        reference_coefficients_K=k_B,
    )
    gradient_BV = p_BV.mul_(slopes.of_p_N.unsqueeze(1))
    gradient_BV.scatter_add_(1, labels_B.unsqueeze(1), -slopes.of_label_N.unsqueeze(1))
    if slopes.of_all_N is not None:
        gradient_BV -= slopes.of_all_N.unsqueeze(1)
    if k_B is not None and q_BV is not None:
        gradient_BV -= q_BV.mul_(k_B.unsqueeze(1))
    task.gradient_CV[part].copy_(through_rule(gradient_BV, logits_BV, task.rule))


def logits_of(outputs_BV: Tensor, bias_V: Tensor | None, rule: LogitRule) -> Tensor:
    """fp32 logits; where nothing changes them, the outputs themselves."""
    logits_BV = outputs_BV.float()
    if bias_V is not None:
        logits_BV = logits_BV + bias_V
    if rule.scale != 1:
        logits_BV = logits_BV * rule.scale
    if rule.softcap is not None:
        logits_BV = (logits_BV / rule.softcap).tanh_().mul_(rule.softcap)
    return logits_BV


def _lse(p_BV: Tensor, top_B: Tensor, best_B: Tensor) -> Tensor:
    """log sum exp from the softmax: the likeliest token has p = exp(top - lse) >= 1 / V, whose log
    is exact.
    """
    return top_B - p_BV.gather(1, best_B.unsqueeze(1)).squeeze(1).log()


def _kl(
    reference: ReferenceTask, part: slice, logits_BV: Tensor, lse_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(q || p) [B], q [B, V] and the log-normaliser of q [B]."""
    reference_BV = logits_of(reference.outputs_CV[part], reference.bias_V, reference.rule)
    top_B, best_B = reference_BV.max(1)
    q_BV = reference_BV.softmax(1)
    reference_lse_B = _lse(q_BV, top_B, best_B)
    # sum q (log q - log p): taken within the sum, where the terms are small, not as a difference of
    # large sums.
    log_ratio_BV = (reference_BV - logits_BV) + (lse_B - reference_lse_B).unsqueeze(1)
    return (q_BV * log_ratio_BV).sum(1), q_BV, reference_lse_B


def through_rule(gradient_BV: Tensor, logits_BV: Tensor, rule: LogitRule) -> Tensor:
    """From d / d logits to d / d outputs, in place."""
    if rule.softcap is not None:
        # d/dx cap tanh(x / cap) = 1 - (cap tanh(x / cap) / cap)^2
        gradient_BV *= 1 - (logits_BV / rule.softcap).square_()
    return gradient_BV.mul_(rule.scale) if rule.scale != 1 else gradient_BV
