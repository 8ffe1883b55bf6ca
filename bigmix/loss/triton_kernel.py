"""The backend of the loss for a GPU, by one kernel.

One program has the logits of one token and goes over them twice, block by block of the vocabulary:
first for the sums, then, where there is a gradient or a reference, for what needs them. Logits that
fit one block are read once and stay in registers. Nothing is added up across programs, so runs
repeat bit for bit.

In the first pass each lane (index within a block) keeps its own maximum and its own sums over the
blocks; they are combined once, at the end, so that the threads of a program need not wait for each
other at every block.

The kernel is given None for what is not wanted, and is compiled without it. In it a name without an
axis is one value or one block of values; `outputs`, `bias` and so on are pointers, and q_ is of the
reference.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigmix.loss.requests import (
    LSE,
    NUM_COLUMNS,
    OBJECTIVE,
    REFERENCE_LSE,
    ChunkTask,
    ReferenceTask,
    column_of,
)
from bigmix.loss.terms import Statistic

# A vocabulary of up to this many entries is one block, 16 elements to a thread. By ptxas (triton
# 3.9, sm_90) that takes 50 registers of a thread, 82 with a reference and 113 with everything;
# twice as many elements spill from the 128 that each of 512 threads can have.
_MAX_IN_ONE_BLOCK = 1 << 13
_ELEMENTS_PER_WARP = 512
# A larger one is done in blocks of 8 elements to a thread, as each has two to five sums of its own:
# 51 registers, 62 with a reference, 104 with everything. In 64, two programs run on a processor,
# and one reads while the other waits at a barrier; more programs would push each other out of the
# L2 cache before their second pass.
_BLOCK = 1 << 12
_ELEMENTS_PER_WARP_IN_BLOCKS = 256

# The logit behind the vocabulary's end: exp(it - m) is 0. Finite, as the difference of two infinite
# ones is not a number.
_NOTHING = tl.constexpr(-1e18)

_NUM_COLUMNS = tl.constexpr(NUM_COLUMNS)
_OBJECTIVE = tl.constexpr(OBJECTIVE)
_TOKENS = tl.constexpr(column_of(Statistic.TOKENS))
_NLL = tl.constexpr(column_of(Statistic.NLL))
_HITS = tl.constexpr(column_of(Statistic.HITS))
_Z = tl.constexpr(column_of(Statistic.Z))
_ENTROPY = tl.constexpr(column_of(Statistic.ENTROPY))
_KL = tl.constexpr(column_of(Statistic.KL))
_LSE = tl.constexpr(LSE)
_REFERENCE_LSE = tl.constexpr(REFERENCE_LSE)


class _Head(NamedTuple):
    """The outputs of a head, the elements from one token to the next, and what makes logits of
    them.
    """

    outputs: Any
    stride: Any
    bias: Any
    scale: Any
    softcap: Any


class _Sums(NamedTuple):
    """What the first pass leaves of a token's logits u.

    logits: those of the first block
    top = m = max u, mass = sum exp(u - m), log_mass = log mass, lse = m + log mass
    best: the first index of m, total = sum u, fall = sum exp(u - m) (u - m)
    """

    logits: Any
    top: Any
    mass: Any
    log_mass: Any
    lse: Any
    best: Any
    total: Any
    fall: Any


class _Slopes(NamedTuple):
    """What the second pass needs besides the sums of the logits u and of the reference's logits t.

    d objective / d u = of_p exp(u - sums.top) - of_label onehot(label) - of_all - of_q q
    q = exp(t - q_sums.top) / q_sums.mass,  log q - log p = t - u + shift
    """

    label: Any
    of_p: Any
    of_label: Any
    of_all: Any
    of_q: Any
    shift: Any


_NO_HEAD = _Head(None, None, None, None, None)


def triton_backend(task: ChunkTask, *, block: int | None = None) -> Tensor:
    """A `Backend` for a GPU; each token's logits must be contiguous.

    `block`: elements that are worked on at once, a power of 2; None: by the size of the vocabulary.
    """
    num_tokens, vocabulary_size = task.outputs_CV.shape
    columns_CM = task.outputs_CV.new_empty(num_tokens, NUM_COLUMNS, dtype=torch.float32)
    if not num_tokens:
        return columns_CM
    block = block or _block(vocabulary_size)
    in_one_block = vocabulary_size <= block
    gradient_CV, reference = task.gradient_CV, task.reference
    with torch.cuda.device_of(task.outputs_CV):  # type: ignore[no-untyped-call]
        _token_kernel[(num_tokens,)](
            _head(task),
            _NO_HEAD if reference is None else _head(reference),
            task.labels_C.contiguous(),
            task.coefficients_C.contiguous(),
            None if reference is None else reference.coefficients_C.contiguous(),
            task.terms.label_smoothing or None,
            task.terms.z_loss,
            columns_CM,
            gradient_CV,
            None if gradient_CV is None else gradient_CV.stride(0),
            vocabulary_size,
            ENTROPY=task.terms.entropy,
            OVERLAPS=gradient_CV is not None and _overlaps(task.outputs_CV, gradient_CV),
            BLOCK=block,
            ONE_BLOCK=in_one_block,
            num_warps=_warps(block, in_one_block=in_one_block),
            # Explicit, as its default changes from one version of triton to the next.
            enable_fp_fusion=True,
        )
    return columns_CM


def _block(vocabulary_size: int) -> int:
    if vocabulary_size > _MAX_IN_ONE_BLOCK:
        return _BLOCK
    return 1 << (vocabulary_size - 1).bit_length()


def _warps(block: int, *, in_one_block: bool) -> int:
    return max(1, block // (_ELEMENTS_PER_WARP if in_one_block else _ELEMENTS_PER_WARP_IN_BLOCKS))


def _head(task: ChunkTask | ReferenceTask) -> _Head:
    return _Head(
        outputs=task.outputs_CV,
        stride=task.outputs_CV.stride(0),
        bias=None if task.bias_V is None else task.bias_V.contiguous(),
        scale=None if task.rule.scale == 1 else task.rule.scale,
        softcap=task.rule.softcap,
    )


def _overlaps(outputs_CV: Tensor, gradient_CV: Tensor) -> bool:
    """Whether an element of the gradient lies where another one of the outputs does."""
    outputs, gradient = outputs_CV.untyped_storage(), gradient_CV.untyped_storage()
    in_one_storage = outputs.data_ptr() == gradient.data_ptr()
    return in_one_storage and outputs_CV.element_size() != gradient_CV.element_size()


@triton.jit
def _token_kernel(
    head: tl.tuple,
    q_head: tl.tuple,
    labels: tl.tensor,
    coefficients: tl.tensor,
    q_coefficients: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    columns: tl.tensor,
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    num_logits: tl.tensor,
    ENTROPY: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> None:
    """The columns and the gradient of one token; the equations are in `terms`."""
    token = tl.program_id(0).to(tl.int64)  # int64: a chunk may have more than 2^31 logits
    label, coefficient = tl.load(labels + token).to(tl.int32), tl.load(coefficients + token)
    label_logit = _logits(head, token, label, num_logits)
    sums = _sums(head, token, num_logits, smoothing is not None, ENTROPY, BLOCK, ONE_BLOCK)
    nll = sums.log_mass + (sums.top - label_logit)
    loss, of_label, of_all = nll, coefficient, 0.0
    if smoothing is not None:
        smooth = sums.log_mass + (sums.top - sums.total / num_logits)
        loss = (1 - smoothing) * nll + smoothing * smooth
        of_label, of_all = (1 - smoothing) * coefficient, smoothing * coefficient / num_logits
    objective = coefficient * (loss + z_loss * sums.lse * sums.lse)
    slope = coefficient * (1 + 2 * z_loss * sums.lse)
    q_sums, of_q, shift, kl, q_lse = sums, 0.0, 0.0, 0.0, 0.0
    if q_head.outputs is not None:
        of_q = tl.load(q_coefficients + token)
        slope += of_q
        q_sums = _sums(q_head, token, num_logits, False, False, BLOCK, ONE_BLOCK)
        q_lse = q_sums.lse
        shift = (sums.top - q_sums.top) + (sums.log_mass - q_sums.log_mass)
    if gradient is not None or q_head.outputs is not None:
        slopes = _Slopes(label, slope / sums.mass, of_label, of_all, of_q, shift)
        if gradient is not None:
            gradient += token * gradient_stride
        kl = _second_pass(
            head,
            q_head,
            token,
            sums,
            q_sums,
            slopes,
            gradient,
            num_logits,
            OVERLAPS,
            BLOCK,
            ONE_BLOCK,
        )
        objective += of_q * kl
    hit = tl.where(sums.best == label, 1.0, 0.0)
    # - sum p log p with log p = (u - m) - log mass: nothing large is subtracted.
    entropy = sums.log_mass - sums.fall / sums.mass if ENTROPY else 0.0
    _store(columns + token * _NUM_COLUMNS, objective, nll, hit, sums.lse, entropy, kl, q_lse)


@triton.jit
def _store(
    columns: tl.tensor,
    objective: tl.tensor,
    nll: tl.tensor,
    hit: tl.tensor,
    lse: tl.tensor,
    entropy: tl.tensor,
    kl: tl.tensor,
    q_lse: tl.tensor,
) -> None:
    """Writes a token's columns."""
    tl.store(columns + _OBJECTIVE, objective)
    tl.store(columns + _TOKENS, 1.0)
    tl.store(columns + _NLL, nll)
    tl.store(columns + _HITS, hit)
    tl.store(columns + _Z, lse * lse)
    tl.store(columns + _ENTROPY, entropy)
    tl.store(columns + _KL, kl)
    tl.store(columns + _LSE, lse)
    tl.store(columns + _REFERENCE_LSE, q_lse)


@triton.jit
def _logits(
    head: tl.tuple, token: tl.tensor, indices: tl.tensor, num_logits: tl.tensor
) -> tl.tensor:
    """A token's fp32 logits at these indices, _NOTHING behind the vocabulary's end."""
    is_there = indices < num_logits
    outputs = head.outputs + token * head.stride
    logits = tl.load(outputs + indices, mask=is_there, other=0).to(tl.float32)
    if head.bias is not None:
        logits += tl.load(head.bias + indices, mask=is_there, other=0).to(tl.float32)
    if head.scale is not None:
        logits *= head.scale
    if head.softcap is not None:
        logits = head.softcap * _tanh(logits / head.softcap)
    return tl.where(is_there, logits, _NOTHING)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh x to 2e-7 of its value, by the two formulas of tanhf.c in S. Moshier's Cephes.

    One would not do: 1 - 2 / (e^2x + 1) loses digits near 0.
    """
    size, square = tl.abs(x), x * x
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _sums(
    head: tl.tuple,
    token: tl.tensor,
    num_logits: tl.tensor,
    TOTAL: tl.constexpr,
    FALL: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> tl.tuple:
    """The first pass over a token's logits; `total` where TOTAL and `fall` where FALL, else 0."""
    lanes = tl.arange(0, BLOCK)
    logits = _logits(head, token, lanes, num_logits)
    top, mass, best = logits, tl.full([BLOCK], 1.0, tl.float32), lanes
    total = tl.where(lanes < num_logits, logits, 0.0)
    fall = tl.zeros([BLOCK], tl.float32)
    if not ONE_BLOCK:
        for begin in range(BLOCK, num_logits, BLOCK):
            indices = begin + lanes
            values = _logits(head, token, indices, num_logits)
            is_higher = values > top
            # The lower of the two relative to the higher: one exp, whichever it is.
            distance = -tl.abs(values - top)
            lower = tl.exp(distance)
            if TOTAL:
                total += tl.where(indices < num_logits, values, 0.0)
            if FALL:
                fall = tl.where(
                    is_higher, lower * (fall + distance * mass), fall + lower * distance
                )
            mass = tl.where(is_higher, lower * mass + 1, mass + lower)
            best = tl.where(is_higher, indices, best)
            top = tl.maximum(top, values)
    token_top = tl.max(top, 0)
    decay = tl.exp(top - token_top)
    token_fall = 0.0
    if FALL:
        token_fall = tl.sum(decay * (fall + (top - token_top) * mass), 0)
    token_total = 0.0
    if TOTAL:
        token_total = tl.sum(total, 0)
    # Of equal maxima the first is the best, as in torch.
    token_best = tl.min(tl.where(top == token_top, best, num_logits), 0)
    token_mass = tl.sum(decay * mass, 0)
    log_mass = tl.log(token_mass)
    return _Sums(
        logits=logits,
        top=token_top,
        mass=token_mass,
        log_mass=log_mass,
        lse=token_top + log_mass,
        best=token_best,
        total=token_total,
        fall=token_fall,
    )


@triton.jit
def _second_pass(
    head: tl.tuple,
    q_head: tl.tuple,
    token: tl.tensor,
    sums: tl.tuple,
    q_sums: tl.tuple,
    slopes: tl.tuple,
    gradient: tl.tensor,
    num_logits: tl.tensor,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Writes a token's gradient and returns its KL.

    A gradient with elements of the outputs' size is written where the same element was read, and
    its value follows from that reading. A narrower one (OVERLAPS) lies in the first half of the
    outputs: its block b is where block b / 2 of the outputs is, which other threads may still be
    about to read. So all wait for each other between reading a block and writing it; then blocks up
    to b have been read by all when block b is written.
    """
    # In any case: each thread has read the label's logit, and in a small vocabulary several threads
    # read the same element.
    tl.debug_barrier()
    lanes = tl.arange(0, BLOCK)
    logits, q_logits = sums.logits, q_sums.logits
    if ONE_BLOCK:
        parts = _finish(
            head, q_head, sums, q_sums, slopes, lanes, logits, q_logits, gradient, num_logits
        )
    else:
        parts = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, num_logits, BLOCK):
            indices = begin + lanes
            values = _logits(head, token, indices, num_logits)
            q_values = values
            if q_head.outputs is not None:
                q_values = _logits(q_head, token, indices, num_logits)
            if OVERLAPS:
                tl.debug_barrier()
            parts += _finish(
                head, q_head, sums, q_sums, slopes, indices, values, q_values, gradient, num_logits
            )
    kl = 0.0
    if q_head.outputs is not None:
        kl = tl.sum(parts, 0)
    return kl


@triton.jit
def _finish(
    head: tl.tuple,
    q_head: tl.tuple,
    sums: tl.tuple,
    q_sums: tl.tuple,
    slopes: tl.tuple,
    indices: tl.tensor,
    logits: tl.tensor,
    q_logits: tl.tensor,
    gradient: tl.tensor,
    num_logits: tl.tensor,
) -> tl.tensor:
    """Writes the gradient of a block and returns its q (log q - log p)."""
    slope = slopes.of_p * tl.exp(logits - sums.top) - slopes.of_all
    slope -= tl.where(indices == slopes.label, slopes.of_label, 0.0)
    parts = tl.zeros_like(logits)
    if q_head.outputs is not None:
        q = tl.exp(q_logits - q_sums.top) / q_sums.mass
        # Taken within the sum, where the terms are small, not as a difference of large sums.
        parts = q * ((q_logits - logits) + slopes.shift)
        slope -= slopes.of_q * q
    if head.softcap is not None:
        # d/dx cap tanh(x / cap) = 1 - (cap tanh(x / cap) / cap)^2
        capped = logits / head.softcap
        slope *= 1 - capped * capped
    if head.scale is not None:
        slope *= head.scale
    if gradient is not None:
        dtype = gradient.dtype.element_ty
        tl.store(gradient + indices, slope.to(dtype), mask=indices < num_logits)
    return parts
