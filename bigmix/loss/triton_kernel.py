"""A chunk of logits goes in, statistics of each token and the gradient in the logits' place come
out: a GPU, by one kernel.

One program has one row and goes over it twice, block by block: first for the sums, then, where
there is a gradient or a reference, for what needs them. A row that fits one block is read once and
stays in registers. Nothing is added up across programs, so runs repeat bit for bit.

In the first pass each lane (place within a block) keeps its own maximum and its own sums over the
blocks; they are put together once, at the end, so that the threads of a row need not wait for each
other at every block.

The kernel is given None for what is not asked for, and is compiled without it. In it a name without
an axis is one value or one block of values; `outputs`, `bias` and so on are pointers.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigmix.loss.requests import COLUMNS, LSE, OBJECTIVE, REFERENCE_LSE, ChunkTask, ReferenceTask
from bigmix.loss.terms import Statistic

# A row of up to so many elements is one block, 16 of them to a thread. By ptxas (triton 3.9, sm_90)
# that takes 50 registers of a thread, 82 with a reference and 113 with all there is; twice as many
# elements spill from the 128 that each of 512 threads can have.
_MOST_IN_ONE_BLOCK = 1 << 13
_ELEMENTS_OF_A_WARP = 512
# A longer row goes by blocks of 8 elements to a thread, as each has two to five sums of its own: 51
# registers, 62 with a reference, 104 with all. In 64, two rows run on a processor, and one reads
# while the other waits at a barrier; more rows would push each other out of the L2 cache before
# their second pass.
_BLOCK = 1 << 12
_ELEMENTS_OF_A_WARP_IN_BLOCKS = 256

# Stands behind a row's end: exp(it - m) is 0. Finite, as the difference of two infinite ones is not
# a number.
_NOTHING = tl.constexpr(-1e18)

_COLUMNS = tl.constexpr(COLUMNS)
_OBJECTIVE = tl.constexpr(OBJECTIVE)
_TOKENS = tl.constexpr(1 + Statistic.TOKENS)
_NLL = tl.constexpr(1 + Statistic.NLL)
_HITS = tl.constexpr(1 + Statistic.HITS)
_Z = tl.constexpr(1 + Statistic.Z)
_ENTROPY = tl.constexpr(1 + Statistic.ENTROPY)
_KL = tl.constexpr(1 + Statistic.KL)
_LSE = tl.constexpr(LSE)
_REFERENCE_LSE = tl.constexpr(REFERENCE_LSE)


class _Head(NamedTuple):
    """The outputs of a head, the elements from one row to the next, and what makes logits of
    them.
    """

    outputs: Any
    stride: Any
    bias: Any
    scale: Any
    softcap: Any


class _Sums(NamedTuple):
    """Of a row's logits u: m = max u, mass = sum exp(u - m), best: the first place of m, total =
    sum u, fall = sum exp(u - m) (u - m).
    """

    top: Any
    mass: Any
    best: Any
    total: Any
    fall: Any


class _Slopes(NamedTuple):
    """What the second pass over a row of logits u takes from the first, t being the reference's
    logits.

    d objective / d u = of_p exp(u - top) - of_label onehot(label) - of_all - of_q q
    q = exp(t - their_top) / their_mass,  log q - log p = t - u + shift
    """

    label: Any
    top: Any
    of_p: Any
    of_label: Any
    of_all: Any
    of_q: Any
    their_top: Any
    their_mass: Any
    shift: Any


_NO_HEAD = _Head(None, None, None, None, None)


def triton_rows(work: ChunkTask, *, block: int | None = None) -> Tensor:
    """A `Backend` for a GPU; the elements of a row must lie beside each other.

    `block`: elements that are worked on at once, a power of 2; None: by the length of a row.
    """
    tokens, vocabulary = work.outputs_CV.shape
    stats_CM = work.outputs_CV.new_empty(tokens, COLUMNS, dtype=torch.float32)
    if not tokens:
        return stats_CM
    block = block or _block(vocabulary)
    in_one_block = vocabulary <= block
    gradient_CV, reference = work.gradient_CV, work.reference
    with torch.cuda.device_of(work.outputs_CV):  # type: ignore[no-untyped-call]
        _row[(tokens,)](
            _head(work),
            _NO_HEAD if reference is None else _head(reference),
            work.labels_C.contiguous(),
            work.coefficients_C.contiguous(),
            None if reference is None else reference.coefficients_C.contiguous(),
            work.terms.label_smoothing or None,
            work.terms.z_loss,
            stats_CM,
            gradient_CV,
            None if gradient_CV is None else gradient_CV.stride(0),
            vocabulary,
            ENTROPY=work.terms.entropy,
            OVERLAPS=gradient_CV is not None and _overlaps(work.outputs_CV, gradient_CV),
            BLOCK=block,
            ONE_BLOCK=in_one_block,
            num_warps=_warps(block, in_one_block=in_one_block),
            # Said, as its default changes from one version of triton to the next.
            enable_fp_fusion=True,
        )
    return stats_CM


def _block(vocabulary: int) -> int:
    if vocabulary > _MOST_IN_ONE_BLOCK:
        return _BLOCK
    return 1 << (vocabulary - 1).bit_length()


def _warps(block: int, *, in_one_block: bool) -> int:
    return max(1, block // (_ELEMENTS_OF_A_WARP if in_one_block else _ELEMENTS_OF_A_WARP_IN_BLOCKS))


def _head(work: ChunkTask | ReferenceTask) -> _Head:
    return _Head(
        outputs=work.outputs_CV,
        stride=work.outputs_CV.stride(0),
        bias=None if work.bias_V is None else work.bias_V.contiguous(),
        scale=None if work.rule.scale == 1 else work.rule.scale,
        softcap=work.rule.softcap,
    )


def _overlaps(outputs_CV: Tensor, gradient_CV: Tensor) -> bool:
    """Whether an element of the gradient lies where another one of the outputs does."""
    outputs, gradient = outputs_CV.untyped_storage(), gradient_CV.untyped_storage()
    in_one_storage = outputs.data_ptr() == gradient.data_ptr()
    return in_one_storage and outputs_CV.element_size() != gradient_CV.element_size()


@triton.jit
def _row(
    head: tl.tuple,
    reference: tl.tuple,
    labels: tl.tensor,
    coefficients: tl.tensor,
    their_coefficients: tl.tensor,
    smoothing: tl.tensor,
    z_loss: tl.tensor,
    stats: tl.tensor,
    gradient: tl.tensor,
    gradient_stride: tl.tensor,
    vocabulary: tl.tensor,
    ENTROPY: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> None:
    """The row of one token; the equations are in `terms`."""
    token = tl.program_id(0).to(tl.int64)  # int64: a chunk may have more than 2^31 logits
    label, weight = tl.load(labels + token).to(tl.int32), tl.load(coefficients + token)
    label_logit = _logits(head, token, label, vocabulary)
    logits = _logits(head, token, tl.arange(0, BLOCK), vocabulary)
    ours = _sums(head, token, logits, vocabulary, smoothing is not None, ENTROPY, BLOCK, ONE_BLOCK)
    log_mass = tl.log(ours.mass)
    lse = ours.top + log_mass
    nll = log_mass + (ours.top - label_logit)
    loss, of_label, of_all = nll, weight, 0.0
    if smoothing is not None:
        smooth = log_mass + (ours.top - ours.total / vocabulary)
        loss = (1 - smoothing) * nll + smoothing * smooth
        of_label, of_all = (1 - smoothing) * weight, smoothing * weight / vocabulary
    objective = weight * (loss + z_loss * lse * lse)
    slope, of_q, shift, kl = weight * (1 + 2 * z_loss * lse), 0.0, 0.0, 0.0
    their_lse = 0.0
    their_logits, theirs = logits, ours
    if reference.outputs is not None:
        of_q = tl.load(their_coefficients + token)
        slope += of_q
        their_logits = _logits(reference, token, tl.arange(0, BLOCK), vocabulary)
        theirs = _sums(reference, token, their_logits, vocabulary, False, False, BLOCK, ONE_BLOCK)
        their_log_mass = tl.log(theirs.mass)
        their_lse = theirs.top + their_log_mass
        shift = (ours.top - theirs.top) + (log_mass - their_log_mass)
    if gradient is not None or reference.outputs is not None:
        slopes = _Slopes(
            label=label,
            top=ours.top,
            of_p=slope / ours.mass,
            of_label=of_label,
            of_all=of_all,
            of_q=of_q,
            their_top=theirs.top,
            their_mass=theirs.mass,
            shift=shift,
        )
        if gradient is not None:
            gradient += token * gradient_stride
        kl = _second_pass(
            head,
            reference,
            token,
            slopes,
            logits,
            their_logits,
            gradient,
            vocabulary,
            OVERLAPS,
            BLOCK,
            ONE_BLOCK,
        )
        objective += of_q * kl

    stats += token * _COLUMNS
    tl.store(stats + _OBJECTIVE, objective)
    tl.store(stats + _TOKENS, 1.0)
    tl.store(stats + _NLL, nll)
    tl.store(stats + _HITS, tl.where(ours.best == label, 1.0, 0.0))
    tl.store(stats + _Z, lse * lse)
    # - sum p log p with log p = (u - m) - log mass: nothing large is subtracted.
    tl.store(stats + _ENTROPY, log_mass - ours.fall / ours.mass if ENTROPY else 0.0)
    tl.store(stats + _KL, kl)
    tl.store(stats + _LSE, lse)
    tl.store(stats + _REFERENCE_LSE, their_lse)


@triton.jit
def _logits(
    head: tl.tuple, token: tl.tensor, places: tl.tensor, vocabulary: tl.tensor
) -> tl.tensor:
    """fp32 logits at these places of a token's row, _NOTHING behind its end."""
    is_there = places < vocabulary
    row = head.outputs + token * head.stride
    logits = tl.load(row + places, mask=is_there, other=0).to(tl.float32)
    if head.bias is not None:
        logits += tl.load(head.bias + places, mask=is_there, other=0).to(tl.float32)
    if head.scale is not None:
        logits *= head.scale
    if head.softcap is not None:
        logits = head.softcap * _tanh(logits / head.softcap)
    return tl.where(is_there, logits, _NOTHING)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh x to 2e-7 of its value (S.

    Moshier, Cephes, tanhf.c): 1 - 2 / (e^2x + 1) loses digits near 0.
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
    logits: tl.tensor,
    vocabulary: tl.tensor,
    TOTAL: tl.constexpr,
    FALL: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> tl.tuple:
    """The first pass: from the first block's logits on, `_Sums` of the row."""
    columns = tl.arange(0, BLOCK)
    top, mass, best = logits, tl.full([BLOCK], 1.0, tl.float32), columns
    total = tl.where(columns < vocabulary, logits, 0.0)
    fall = tl.zeros([BLOCK], tl.float32)
    if not ONE_BLOCK:
        for begin in range(BLOCK, vocabulary, BLOCK):
            places = begin + columns
            values = _logits(head, token, places, vocabulary)
            is_higher = values > top
            # The lower of the two relative to the higher: one exp, whichever it is.
            distance = -tl.abs(values - top)
            lower = tl.exp(distance)
            if TOTAL:
                total += tl.where(places < vocabulary, values, 0.0)
            if FALL:
                fall = tl.where(
                    is_higher, lower * (fall + distance * mass), fall + lower * distance
                )
            mass = tl.where(is_higher, lower * mass + 1, mass + lower)
            best = tl.where(is_higher, places, best)
            top = tl.maximum(top, values)
    row_top = tl.max(top, 0)
    share = tl.exp(top - row_top)
    row_fall = 0.0
    if FALL:
        row_fall = tl.sum(share * (fall + (top - row_top) * mass), 0)
    row_total = 0.0
    if TOTAL:
        row_total = tl.sum(total, 0)
    # Of equal maxima the first is the best, as in torch.
    row_best = tl.min(tl.where(top == row_top, best, vocabulary), 0)
    return _Sums(
        top=row_top,
        mass=tl.sum(share * mass, 0),
        best=row_best,
        total=row_total,
        fall=row_fall,
    )


@triton.jit
def _second_pass(
    head: tl.tuple,
    reference: tl.tuple,
    token: tl.tensor,
    slopes: tl.tuple,
    logits: tl.tensor,
    their_logits: tl.tensor,
    gradient: tl.tensor,
    vocabulary: tl.tensor,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Writes the row's gradient and returns its KL; the logits given are those of the first block.

    A gradient with elements of the outputs' size is written where the same element was read, and
    its value follows from that reading. A narrower one (OVERLAPS) lies in the first half of the
    row: its block b is where block b / 2 of the outputs is, which other threads may still be about
    to read. So all wait for each other between reading a block and writing it; then blocks up to b
    have been read by all when block b is written.
    """
    # In any case: each thread has read the label's logit, and in a short row several read the same
    # element.
    tl.debug_barrier()
    columns = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        parts = _finish(
            head, reference, slopes, columns, logits, their_logits, gradient, vocabulary
        )
    else:
        parts = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, vocabulary, BLOCK):
            places = begin + columns
            values = _logits(head, token, places, vocabulary)
            their_values = values
            if reference.outputs is not None:
                their_values = _logits(reference, token, places, vocabulary)
            if OVERLAPS:
                tl.debug_barrier()
            parts += _finish(
                head, reference, slopes, places, values, their_values, gradient, vocabulary
            )
    kl = 0.0
    if reference.outputs is not None:
        kl = tl.sum(parts, 0)
    return kl


@triton.jit
def _finish(
    head: tl.tuple,
    reference: tl.tuple,
    slopes: tl.tuple,
    places: tl.tensor,
    logits: tl.tensor,
    their_logits: tl.tensor,
    gradient: tl.tensor,
    vocabulary: tl.tensor,
) -> tl.tensor:
    """Writes the gradient of a block and returns its q (log q - log p)."""
    slope = slopes.of_p * tl.exp(logits - slopes.top) - slopes.of_all
    slope -= tl.where(places == slopes.label, slopes.of_label, 0.0)
    parts = tl.zeros_like(logits)
    if reference.outputs is not None:
        q = tl.exp(their_logits - slopes.their_top) / slopes.their_mass
        # Taken within the sum, where the terms are small, not as a difference of large sums.
        parts = q * ((their_logits - logits) + slopes.shift)
        slope -= slopes.of_q * q
    if head.softcap is not None:
        # d/dx cap tanh(x / cap) = 1 - (cap tanh(x / cap) / cap)^2
        capped = logits / head.softcap
        slope *= 1 - capped * capped
    if head.scale is not None:
        slope *= head.scale
    if gradient is not None:
        dtype = gradient.dtype.element_ty
        tl.store(gradient + places, slope.to(dtype), mask=places < vocabulary)
    return parts
