"""The head's gradient, computed from the log-normalisers of all tokens by blocks of the vocabulary.

For a block of B entries of the vocabulary the logits are computed again, for all N loss tokens at
once, and give these entries' part of the gradient in one product over N: nothing is added up
outside of the matrix product, so the gradient is rounded once and needs no fp32 copy. The price is
a fourth product of N V D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bigmix.loss.chunks import slices
from bigmix.loss.matmul import times_transposed, times_transposed_into
from bigmix.loss.requests import LossRequest
from bigmix.loss.terms import LogitSlopes, logit_slopes
from bigmix.loss.torch_kernel import cache_blocks, logits_of, through_rule

_MIN_ENTRIES = 16  # of the vocabulary in a block


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalisers:
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
    normalisers: Normalisers,
    *,
    block_bytes: int,
) -> Tensor:
    """d objective / d head [V, D] in the head's dtype; the logits of a block take about
    `block_bytes`.
    """
    gradient_VD = torch.empty_like(head_VD)
    num_tokens, vocabulary_size = len(hidden_ND), len(head_VD)
    entry_bytes = head_VD.dtype.itemsize * (num_tokens + request.num_reference_tokens)
    max_entries = max(_MIN_ENTRIES, block_bytes // entry_bytes)
    num_blocks = -(-vocabulary_size // max_entries)
    size = -(-vocabulary_size // num_blocks)
    scratch_X = hidden_ND.new_empty(size * num_tokens)
    reference = request.reference
    slopes = logit_slopes(
        request.tokens.coefficients_N,
        normalisers.lse_N,
        request.terms,
        vocabulary_size=vocabulary_size,
        reference_coefficients_K=None if reference is None else reference.coefficients_K,
    )
    for part in slices(vocabulary_size, size):
        # The vocabulary comes first, so that the second product has no transposed side: it is
        # slower with one.
        outputs_BN = scratch_X[: (part.stop - part.start) * num_tokens].view(-1, num_tokens)
        times_transposed_into(outputs_BN, head_VD[part], hidden_ND)
        _to_gradient(outputs_BN, part, bias_V, request, normalisers, slopes)
        torch.mm(outputs_BN, hidden_ND, out=gradient_VD[part])
    return gradient_VD


def _to_gradient(
    outputs_BN: Tensor,
    part: slice,
    bias_V: Tensor | None,
    request: LossRequest,
    normalisers: Normalisers,
    slopes: LogitSlopes,
) -> None:
    """Turn the head's outputs for a part of the vocabulary into d objective / d outputs, in place.

    `part` is where in the vocabulary the B entries are.
    """
    reference, num_entries, num_tokens = request.reference, *outputs_BN.shape
    reference_outputs_BK = None
    if reference is not None:
        reference_outputs_BK = times_transposed(reference.head_VD[part], reference.hidden_KD)
    for block in cache_blocks(num_entries, num_tokens, outputs_BN.device):
        entries = slice(part.start + block.start, part.start + block.stop)
        logits_BN = logits_of(outputs_BN[block], _column(bias_V, entries), request.rule)
        gradient_BN = (logits_BN - normalisers.lse_N).exp_().mul_(slopes.of_p_N)
        _subtract_at_labels(gradient_BN, entries.start, request.tokens.labels_N, slopes.of_label_N)
        if slopes.of_all_N is not None:
            gradient_BN -= slopes.of_all_N
        if reference_outputs_BK is not None and reference is not None:
            reference_BK = logits_of(
                reference_outputs_BK[block], _column(reference.bias_V, entries), reference.rule
            )
            q_BK = (reference_BK - normalisers.reference_lse_K).exp_()
            gradient_BN[:, : request.num_reference_tokens] -= q_BK.mul_(reference.coefficients_K)
        outputs_BN[block].copy_(through_rule(gradient_BN, logits_BN, request.rule))


def _column(bias_V: Tensor | None, entries: slice) -> Tensor | None:
    return None if bias_V is None else bias_V[entries].unsqueeze(1)


def _subtract_at_labels(
    gradient_BN: Tensor, begin: int, labels_N: Tensor, amounts_N: Tensor
) -> None:
    """Subtract its amount at the label of each token whose label is among these B entries, which
    begin at `begin`.
    """
    indices_N = labels_N - begin
    is_here_N = (indices_N >= 0) & (indices_N < len(gradient_BN))
    indices_N = indices_N.clamp_(0, len(gradient_BN) - 1)
    gradient_BN.scatter_add_(0, indices_N.unsqueeze(0), -(amounts_N * is_here_N).unsqueeze(0))
