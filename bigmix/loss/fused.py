"""The head and the mixed objective as one differentiable operation on hidden states, in one pass.

The logits exist for one chunk at a time. Their gradient is known as soon as they are, since each
token's coefficient is given beforehand, so all gradients are formed in forward and nothing of size
N x V is kept (the idea of gradient-in-forward: Hsu et al., "Liger Kernel", 2024). `terms` has the
letters and the equations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigmix.loss.chunks import LossShape, chunk_tokens, device_bytes, even_slices
from bigmix.loss.gradients import Gradients, scaled
from bigmix.loss.matmul import gives_fp32, times_transposed_into
from bigmix.loss.recompute import Normalisers, head_gradient
from bigmix.loss.requests import (
    LSE,
    OBJECTIVE,
    STATISTICS,
    ChunkTask,
    LossBackendOptions,
    LossRequest,
    ReferenceTask,
)
from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates, Statistic
from bigmix.loss.torch_kernel import torch_backend

_PLAIN = LogitRule()
_NO_TERMS = LossTerms()
_BY_DEFAULT = LossBackendOptions(backend=torch_backend)
_ALIGNED = 16


def mixed_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    tokens: LossTokens,
    *,
    rule: LogitRule = _PLAIN,
    terms: LossTerms = _NO_TERMS,
    reference: ReferenceStates | None = None,
    options: LossBackendOptions = _BY_DEFAULT,
) -> tuple[Tensor, Tensor]:
    """The objective to differentiate, and the sums of each group [G, Statistic] (see `GroupSums`),
    both fp32.

    Gradients flow to `hidden_TD`, `head_VD` and `bias_V` where these require one, and only once:
    they are formed here and given away by the first backward. Without tokens the objective is 0 and
    the gradients are zeros, still part of the graph. Where no gradient is required, none is formed.
    Under autocast the matrix products are in its dtype, all sums and losses in fp32.

    Raises ValueError where shapes do not fit together.
    """
    _check(hidden_TD, head_VD, bias_V, tokens, reference)
    request = LossRequest(
        tokens=tokens,
        rule=rule,
        terms=terms,
        reference=reference,
        options=options,
        wanted=(_wants(hidden_TD), _wants(head_VD), _wants(bias_V)),
    )
    apply: Any = _MixedLoss.apply  # has no types
    result: tuple[Tensor, Tensor] = apply(hidden_TD, head_VD, bias_V, request)
    return result


def _wants(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


class _MixedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, request: LossRequest
    ) -> tuple[Tensor, Tensor]:
        device_type = hidden_TD.device.type
        dtype = hidden_TD.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            objective, sums_GM, gradients = _all_chunks(
                hidden_TD.to(dtype), head_VD.to(dtype), bias_V, request
            )
        ctx.gradients = gradients
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden_TD, head_VD, bias_V))
        ctx.mark_non_differentiable(sums_GM)
        return objective, sums_GM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward went through the mixed loss a second time; the first time gave its"
                " gradients away, call forward again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # What multiplies the loss outside (loss scale, ranks) must reach every gradient alike.
        return (
            *(
                None if gradient is None else scaled(gradient, outputs[0], dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
            None,
        )


def _all_chunks(
    hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None, request: LossRequest
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The objective, the sums of each group and the gradients of hidden states, head and bias."""
    tokens = request.tokens
    max_tokens = _max_chunk_tokens(hidden_TD, head_VD, request)
    chunks = _chunks(request, max_tokens)
    recomputes = request.wanted[1] and len(chunks) > 1 and _recomputes(hidden_TD, request.options)
    wanted = (request.wanted[0], request.wanted[1] and not recomputes, request.wanted[2])
    scratch = _ScratchPool(hidden_TD, head_VD, request, chunks)
    gradients = Gradients(hidden_TD, head_VD, bias_V, wanted=wanted, in_one_chunk=len(chunks) == 1)
    objective = torch.zeros((), device=hidden_TD.device)
    sums_GM = torch.zeros(tokens.num_groups, len(Statistic), device=hidden_TD.device)
    lse_N2 = sums_GM.new_empty(len(tokens), 2)
    for part in chunks:
        columns_CM = _one_chunk(hidden_TD, head_VD, bias_V, request, part, scratch, gradients)
        objective += columns_CM[:, OBJECTIVE].sum()
        sums_GM += _group_sums(columns_CM[:, STATISTICS], tokens.groups_N[part], tokens.num_groups)
        lse_N2[part] = columns_CM[:, LSE:]
    grad_hidden_TD, grad_head_VD, grad_bias_V = gradients.finish()
    if recomputes:
        del scratch
        hidden_ND = hidden_TD if tokens.positions_N is None else hidden_TD[tokens.positions_N]
        normalisers = Normalisers(
            lse_N=lse_N2[:, 0], reference_lse_K=lse_N2[: request.num_reference_tokens, 1]
        )
        block_bytes = max_tokens * len(head_VD) * head_VD.dtype.itemsize
        grad_head_VD = head_gradient(
            hidden_ND, head_VD, bias_V, request, normalisers, block_bytes=block_bytes
        )
    return objective, sums_GM, (grad_hidden_TD, grad_head_VD, grad_bias_V)


def _one_chunk(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    request: LossRequest,
    part: slice,
    scratch: "_ScratchPool",
    gradients: Gradients,
) -> Tensor:
    """The backend's columns [C, NUM_COLUMNS] of a chunk, whose gradient is added to `gradients`.

    In a function of its own, since the chunk's logits are freed when it returns.
    """
    positions_N = request.tokens.positions_N
    positions_C = part if positions_N is None else positions_N[part]
    hidden_CD = hidden_TD[positions_C]
    task = _chunk_task(hidden_CD, head_VD, bias_V, request, part, scratch)
    columns_CM = request.options.backend(task)
    if task.gradient_CV is not None:
        gradients.add(task.gradient_CV, hidden_CD, positions_C)
    return columns_CM


def _recomputes(hidden_TD: Tensor, options: LossBackendOptions) -> bool:
    if options.head_gradient != "auto":
        return options.head_gradient == "recompute"
    return not gives_fp32(hidden_TD.device, hidden_TD.dtype)


def _max_chunk_tokens(hidden_TD: Tensor, head_VD: Tensor, request: LossRequest) -> int:
    logit_bytes = logit_dtype(hidden_TD.device, hidden_TD.dtype).itemsize
    return chunk_tokens(
        LossShape(
            num_tokens=len(request.tokens),
            hidden_size=hidden_TD.shape[1],
            vocabulary_size=head_VD.shape[0],
            hidden_bytes=hidden_TD.dtype.itemsize,
            logit_bytes=logit_bytes * (2 if request.num_reference_tokens else 1),
            device_type=hidden_TD.device.type,
            device_bytes=device_bytes(hidden_TD.device),
        ),
        request.options.chunk_bytes,
    )


def _chunks(request: LossRequest, max_tokens: int) -> list[slice]:
    """Chunks of tokens with a reference, then of those without; no chunk has both kinds."""
    first = request.num_reference_tokens
    rest = even_slices(len(request.tokens) - first, max_tokens)
    return [
        *even_slices(first, max_tokens),
        *(slice(part.start + first, part.stop + first) for part in rest),
    ]


def logit_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a chunk's logits: fp32 where the device's product of `dtype` can give it, else
    `dtype`.

    Rounding logits to bf16 is half of the error of the hidden states' gradient.
    """
    return torch.float32 if gives_fp32(device, dtype) else dtype


class _Scratch:
    """Memory for the logits of one chunk, used by all chunks in turn.

    Each token's logits begin at a multiple of _ALIGNED elements: with an odd vocabulary a GPU would
    move them element by element.
    """

    def __init__(self, like: Tensor, vocabulary_size: int, chunks: list[slice]) -> None:
        self._vocabulary_size = vocabulary_size
        max_tokens = max((part.stop - part.start for part in chunks), default=0)
        stride = -(-vocabulary_size // _ALIGNED) * _ALIGNED
        self._matrix = like.new_empty(
            max_tokens, stride, dtype=logit_dtype(like.device, like.dtype)
        )

    def logits(self, hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
        """The head's outputs [C, V], which overwrite those of the chunk before."""
        out_CV = self._matrix[: len(hidden_CD), : self._vocabulary_size]
        times_transposed_into(out_CV, hidden_CD, head_VD)
        return out_CV


class _ScratchPool:
    """Memory for a chunk's logits by the model, and for those by the reference."""

    def __init__(
        self, hidden_TD: Tensor, head_VD: Tensor, request: LossRequest, chunks: list[slice]
    ) -> None:
        self.own = _Scratch(hidden_TD, len(head_VD), chunks)
        self.reference = self.own
        if request.reference is not None:
            referenced = [part for part in chunks if part.start < request.num_reference_tokens]
            self.reference = _Scratch(request.reference.hidden_KD, len(head_VD), referenced)


def _chunk_task(
    hidden_CD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    request: LossRequest,
    part: slice,
    scratch: _ScratchPool,
) -> ChunkTask:
    outputs_CV = scratch.own.logits(hidden_CD, head_VD)
    gradient_CV = None
    if any(request.wanted):
        # Where logits are wider than the gradient, each token's gradient lies in the first half of
        # its logits.
        gradient_CV = outputs_CV.view(hidden_CD.dtype)[:, : len(head_VD)]
    return ChunkTask(
        outputs_CV=outputs_CV,
        gradient_CV=gradient_CV,
        bias_V=bias_V,
        labels_C=request.tokens.labels_N[part],
        coefficients_C=request.tokens.coefficients_N[part],
        rule=request.rule,
        terms=request.terms,
        reference=_reference_task(request.reference, part, scratch.reference),
    )


def _reference_task(
    reference: ReferenceStates | None, part: slice, scratch: _Scratch
) -> ReferenceTask | None:
    if reference is None or part.start >= len(reference.coefficients_K):
        return None
    return ReferenceTask(
        outputs_CV=scratch.logits(reference.hidden_KD[part], reference.head_VD),
        bias_V=reference.bias_V,
        rule=reference.rule,
        coefficients_C=reference.coefficients_K[part],
    )


def _group_sums(statistics_CM: Tensor, groups_C: Tensor, num_groups: int) -> Tensor:
    """The sums of each group [G, M], as a product with a one-hot matrix: index_add_ has no fixed
    order on a GPU.
    """
    groups_G1 = torch.arange(num_groups, device=groups_C.device).unsqueeze(1)
    return (groups_G1 == groups_C).to(statistics_CM.dtype) @ statistics_CM


def _check(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    tokens: LossTokens,
    reference: ReferenceStates | None,
) -> None:
    vocabulary_size, hidden_size = head_VD.shape
    if hidden_TD.ndim != 2 or hidden_TD.shape[1] != hidden_size:
        raise ValueError(
            f"hidden states are {tuple(hidden_TD.shape)} and the head is"
            f" {(vocabulary_size, hidden_size)}; both must be matrices with the same second axis,"
            " flatten batch and time first"
        )
    if bias_V is not None and bias_V.shape != (vocabulary_size,):
        raise ValueError(f"the bias is {tuple(bias_V.shape)}, must be {(vocabulary_size,)}")
    num_tokens = len(tokens)
    lengths = {"groups_N": len(tokens.groups_N), "coefficients_N": len(tokens.coefficients_N)}
    lengths["positions_N"] = len(hidden_TD if tokens.positions_N is None else tokens.positions_N)
    wrong = {name: length for name, length in lengths.items() if length != num_tokens}
    if wrong:
        raise ValueError(f"{num_tokens} labels, but {wrong}; each loss token needs one of each")
    if reference is None:
        return
    if reference.head_VD.shape[0] != vocabulary_size:
        raise ValueError(
            f"the reference's head has {reference.head_VD.shape[0]} tokens and the model's"
            f" {vocabulary_size}; a divergence needs one vocabulary"
        )
    if not len(reference.hidden_KD) == len(reference.coefficients_K) <= num_tokens:
        raise ValueError(
            f"{len(reference.hidden_KD)} hidden states and {len(reference.coefficients_K)}"
            f" coefficients of the reference for {num_tokens} loss tokens; it needs one of each for"
            " the first K of them"
        )
