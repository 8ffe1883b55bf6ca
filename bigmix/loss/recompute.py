"""Normalisers of all tokens go in, the head's gradient comes out, block by block of the vocabulary.

For a block of B tokens of the vocabulary the logits are computed again, for all N loss tokens at
once, and give its rows of the gradient in one product over N: nothing is added up outside the
matrix product, so the gradient is rounded once and needs no fp32 copy. The price is a fourth
product of N V D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigmix.loss.chunks import slices
from bigmix.loss.matmul import times_transposed, times_transposed_into
from bigmix.loss.requests import LossRequest
from bigmix.loss.torch_kernel import blocks, logits_of, through_rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the pass over chunks of tokens leaves: the log-normaliser of each token, and the
    reference's of the first K.
    """

    lse_N: Tensor
    reference_lse_K: Tensor


def head_gradient(
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    request: LossRequest,
    known: Known,
    *,
    block_bytes: int,
) -> Tensor:
    """d objective / d head [V, D] in the head's dtype; the logits of a block take about
    `block_bytes`.
    """
    gradient_VD = torch.empty_like(head_VD)
    tokens, vocabulary = len(hidden_ND), len(head_VD)
    token_bytes = head_VD.dtype.itemsize * (tokens + request.anchored)
    most = max(16, block_bytes // token_bytes)
    size = -(-vocabulary // -(-vocabulary // most))
    room_X = hidden_ND.new_empty(size * tokens)
    slope_N = _slopes(request, known)
    for part in slices(vocabulary, size):
        # The vocabulary comes first, so that the second product has no transposed side: it is
        # slower with one.
        outputs_BN = room_X[: (part.stop - part.start) * tokens].view(-1, tokens)
        times_transposed_into(outputs_BN, head_VD[part], hidden_ND)
        _to_gradient(outputs_BN, part, bias_V, request, known, slope_N, vocabulary)
        torch.mm(outputs_BN, hidden_ND, out=gradient_VD[part])
    return gradient_VD


def _slopes(request: LossRequest, known: Known) -> Tensor:
    """What each token's probabilities are multiplied by; see `torch_rows` for the equation."""
    slope_N = request.tokens.coefficients_N * (1 + 2 * request.terms.z_loss * known.lse_N)
    if request.reference is not None:
        slope_N[: request.anchored] += request.reference.coefficients_K
    return slope_N


def _to_gradient(
    outputs_BN: Tensor,
    part: slice,
    bias_V: Tensor | None,
    request: LossRequest,
    known: Known,
    slope_N: Tensor,
    vocabulary: int,
) -> None:
    """The head's outputs for a part of the vocabulary become d objective / d outputs."""
    smoothing, weights_N = request.terms.label_smoothing, request.tokens.coefficients_N
    size, tokens = outputs_BN.shape
    theirs_BK = None
    if request.reference is not None:
        theirs_BK = times_transposed(request.reference.head_VD[part], request.reference.hidden_KD)
    for rows in blocks(size, tokens, outputs_BN.device):
        own = slice(part.start + rows.start, part.start + rows.stop)
        logits_BN = logits_of(outputs_BN[rows], _column(bias_V, own), request.rule)
        gradient_BN = (logits_BN - known.lse_N).exp_().mul_(slope_N)
        _take_from_labels(
            gradient_BN, own.start, request.tokens.labels_N, (1 - smoothing) * weights_N
        )
        if smoothing:
            gradient_BN -= weights_N * (smoothing / vocabulary)
        if theirs_BK is not None and request.reference is not None:
            reference = request.reference
            theirs = logits_of(theirs_BK[rows], _column(reference.bias_V, own), reference.rule)
            q_BK = (theirs - known.reference_lse_K).exp_()
            gradient_BN[:, : request.anchored] -= q_BK.mul_(reference.coefficients_K)
        outputs_BN[rows].copy_(through_rule(gradient_BN, logits_BN, request.rule))


def _column(bias_V: Tensor | None, part: slice) -> Tensor | None:
    return None if bias_V is None else bias_V[part].unsqueeze(1)


def _take_from_labels(gradient_BN: Tensor, begin: int, labels_N: Tensor, amounts_N: Tensor) -> None:
    """Take its amount from the label of each token whose label is among these B, which begin at
    `begin`.
    """
    places_N = labels_N - begin
    is_here_N = (places_N >= 0) & (places_N < len(gradient_BN))
    places_N = places_N.clamp_(0, len(gradient_BN) - 1)
    gradient_BN.scatter_add_(0, places_N.unsqueeze(0), -(amounts_N * is_here_N).unsqueeze(0))
