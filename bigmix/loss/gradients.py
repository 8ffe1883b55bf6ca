"""Adds up the gradients of hidden states, head and bias from the logit gradients of chunks.

The head's gradient is added up in fp32: in bf16 the sum drifts by per cents over many chunks. It is
narrowed to the weight's dtype within its own memory, so that the two never exist at the same time.
"""

import torch
from torch import Tensor

from bigmix.loss.chunks import slices
from bigmix.loss.matmul import times_transposed

# Elements that are narrowed, or multiplied and added, at a time where an operation needs memory of
# its own (on a CPU).
_BLOCK = 1 << 20


class Gradients:
    """The gradients as added up so far; one that is not wanted stays None."""

    def __init__(
        self,
        hidden_TD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        *,
        wanted: tuple[bool, bool, bool],
        in_one_chunk: bool,
    ) -> None:
        self._one_chunk = in_one_chunk
        self._head_VD = head_VD
        self.hidden_TD = torch.zeros_like(hidden_TD) if wanted[0] else None
        self.head_VD = self._for_head(head_VD) if wanted[1] else None
        self.bias_V = (
            torch.zeros_like(bias_V, dtype=torch.float32)
            if wanted[2] and bias_V is not None
            else None
        )
        self._is_first = True

    def _for_head(self, head_VD: Tensor) -> Tensor:
        # The first chunk writes, later ones add: zeros are needed only where there is no chunk.
        dtype = head_VD.dtype if self._one_chunk else torch.float32
        return torch.empty_like(head_VD, dtype=dtype)

    def add(self, grad_logits_CV: Tensor, hidden_CD: Tensor, positions_C: Tensor | slice) -> None:
        """Add a chunk: d objective / d outputs, and the hidden states that the outputs are of, with
        their positions among all hidden states.
        """
        if self.hidden_TD is not None:
            self.hidden_TD[positions_C] = times_transposed(grad_logits_CV, self._head_VD.T)
        if self.head_VD is not None:
            _add_product(self.head_VD, grad_logits_CV, hidden_CD, first=self._is_first)
        if self.bias_V is not None:
            self.bias_V += grad_logits_CV.sum(0, dtype=torch.float32)
        self._is_first = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden states, head and bias; zeros where there was no chunk."""
        if self._is_first and self.head_VD is not None:
            self.head_VD.zero_()
        return self.hidden_TD, self.head_VD, self.bias_V


def _add_product(sum_VD: Tensor, left_CV: Tensor, right_CD: Tensor, *, first: bool) -> None:
    """sum_VD (+)= left_CV^T right_CD."""
    if sum_VD.dtype == left_CV.dtype:
        torch.addmm(sum_VD, left_CV.T, right_CD, beta=0 if first else 1, out=sum_VD)
    elif sum_VD.device.type == "cuda":
        torch.addmm(
            sum_VD, left_CV.T, right_CD, out_dtype=sum_VD.dtype, beta=0 if first else 1, out=sum_VD
        )
    else:
        _add_product_in_blocks(sum_VD, left_CV, right_CD, first=first)


def _add_product_in_blocks(
    sum_VD: Tensor, left_CV: Tensor, right_CD: Tensor, *, first: bool
) -> None:
    """The same by products of fp32 copies, block by block of the vocabulary.

    A CPU has no product of bf16 that gives fp32, and rounding each chunk's product would double the
    error of the sum.
    """
    right_CD = right_CD.to(sum_VD.dtype)
    block_size = max(1, _BLOCK // len(left_CV))
    for part in slices(len(sum_VD), block_size):
        left, block = left_CV[:, part].to(sum_VD.dtype), sum_VD[part]
        torch.addmm(block, left.T, right_CD, beta=0 if first else 1, out=block)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in `dtype`, in the gradient's own memory where `dtype` is not wider; the
    gradient must not be used afterwards.
    """
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    if dtype.itemsize > gradient.dtype.itemsize:
        return gradient.to(dtype).mul_(factor)
    return _narrowed(gradient, factor, dtype)


def _narrowed(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in a dtype of half the width, in the same memory.

    Element i of the result lies where element i / 2 of the gradient was, which has been read by
    then.
    """
    wide_X = gradient.view(-1)
    narrow = torch.empty(0, dtype=dtype, device=gradient.device)
    narrow.set_(gradient.untyped_storage(), 0, gradient.shape, gradient.stride())
    narrow_X = narrow.view(-1)
    begin = 0
    while begin < len(wide_X):
        # From `begin` on, as many elements as lie wholly behind what they are written over; the
        # very first through memory of their own.
        size = min(max(begin, _BLOCK), len(wide_X) - begin, _max_block(gradient.device))
        block_X = wide_X[begin : begin + size]
        block_X = block_X * factor if begin < size else block_X.mul_(factor)
        narrow_X[begin : begin + size].copy_(block_X)
        begin += size
    return narrow


def _max_block(device: torch.device) -> int:
    return _BLOCK if device.type == "cpu" else 1 << 62
