"""A chunk of logits goes in, statistics of each token and the gradient in the logits' place come
out: any device, by torch.

The chunk is worked through in blocks of rows that fit a cache, so that what lies between logits and
gradient never goes to memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bigmix.loss.chunks import slices
from bigmix.loss.requests import COLUMNS, LSE, OBJECTIVE, REFERENCE_LSE, ChunkTask, ReferenceTask
from bigmix.loss.terms import LogitRule, Statistic

# Elements of a block. CPU: two or three arrays of 1 MiB in the L2 caches; GPU: enough to keep every
# processor busy.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 26


def torch_rows(work: ChunkTask) -> Tensor:
    """A `Backend` for any device."""
    tokens, vocabulary = work.outputs_CV.shape
    stats_CM = work.coefficients_C.new_zeros(tokens, COLUMNS)
    for part in blocks(tokens, vocabulary, work.outputs_CV.device):
        _block(work, part, stats_CM[part])
    return stats_CM


def blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """The rows of a matrix in blocks that fit a cache."""
    size = max(1, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // columns)
    return slices(rows, size)


def _block(work: ChunkTask, part: slice, stats_BM: Tensor) -> None:
    terms, smoothing = work.terms, work.terms.label_smoothing
    logits_BV = logits_of(work.outputs_CV[part], work.bias_V, work.rule)
    labels_B, weights_B = work.labels_C[part], work.coefficients_C[part]
    top_B, best_B = logits_BV.max(1)
    p_BV = logits_BV.softmax(1)
    lse_B = _lse(p_BV, top_B, best_B)
    nll_B = lse_B - logits_BV.gather(1, labels_B.unsqueeze(1)).squeeze(1)
    loss_B = nll_B
    if smoothing:
        loss_B = (1 - smoothing) * nll_B + smoothing * (lse_B - logits_BV.mean(1))
    z_B = lse_B.square()
    stats_BM[:, OBJECTIVE] = weights_B * (loss_B + terms.z_loss * z_B)
    stats_BM[:, 1 + Statistic.TOKENS] = 1
    stats_BM[:, 1 + Statistic.NLL] = nll_B
    stats_BM[:, 1 + Statistic.HITS] = best_B == labels_B
    stats_BM[:, 1 + Statistic.Z] = z_B
    stats_BM[:, LSE] = lse_B
    if terms.entropy:
        stats_BM[:, 1 + Statistic.ENTROPY] = lse_B - (p_BV * logits_BV).sum(1)
    # d objective / d logits = slope p - (1 - eps) c onehot(y) - eps c / V - k q,  slope = c (1 + 2
    # z_loss lse) + k
    slope_B = weights_B * (1 + 2 * terms.z_loss * lse_B)
    kq_BV = None
    if work.reference is not None:
        k_B = work.reference.coefficients_C[part]
        kl_B, q_BV, theirs_B = _kl(work.reference, part, logits_BV, lse_B)
        stats_BM[:, OBJECTIVE] += k_B * kl_B
        stats_BM[:, 1 + Statistic.KL] = kl_B
        stats_BM[:, REFERENCE_LSE] = theirs_B
        slope_B, kq_BV = slope_B + k_B, q_BV.mul_(k_B.unsqueeze(1))
    if work.gradient_CV is None:
        return
    gradient_BV = p_BV.mul_(slope_B.unsqueeze(1))
    gradient_BV.scatter_add_(1, labels_B.unsqueeze(1), ((smoothing - 1) * weights_B).unsqueeze(1))
    if smoothing:
        gradient_BV -= (weights_B * (smoothing / logits_BV.shape[1])).unsqueeze(1)
    if kq_BV is not None:
        gradient_BV -= kq_BV
    work.gradient_CV[part].copy_(through_rule(gradient_BV, logits_BV, work.rule))


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
    theirs_BV = logits_of(reference.outputs_CV[part], reference.bias_V, reference.rule)
    top_B, best_B = theirs_BV.max(1)
    q_BV = theirs_BV.softmax(1)
    lse_q_B = _lse(q_BV, top_B, best_B)
    # sum q (log q - log p): taken within the sum, where the terms are small, not as a difference of
    # large sums.
    log_ratio_BV = (theirs_BV - logits_BV) + (lse_B - lse_q_B).unsqueeze(1)
    return (q_BV * log_ratio_BV).sum(1), q_BV, lse_q_B


def through_rule(gradient_BV: Tensor, logits_BV: Tensor, rule: LogitRule) -> Tensor:
    """From d / d logits to d / d outputs, in place."""
    if rule.softcap is not None:
        # d/dx cap tanh(x / cap) = 1 - (cap tanh(x / cap) / cap)^2
        gradient_BV *= 1 - (logits_BV / rule.softcap).square_()
    return gradient_BV.mul_(rule.scale) if rule.scale != 1 else gradient_BV
