"""The records that pass between the loss and its backends: a request, its chunks, their columns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates, Statistic

# The columns that a backend gives for each token: its part of the objective, one for each
# `Statistic` in its order, and two log-normalisers.
OBJECTIVE = 0
_FIRST_STATISTIC = 1
LSE = _FIRST_STATISTIC + len(Statistic)
REFERENCE_LSE = LSE + 1
NUM_COLUMNS = REFERENCE_LSE + 1
STATISTICS = slice(_FIRST_STATISTIC, LSE)

HeadGradient = Literal["auto", "accumulate", "recompute"]


def column_of(statistic: Statistic) -> int:
    """The column of a statistic among those that a backend gives."""
    return _FIRST_STATISTIC + statistic


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceTask:
    """The reference's part of a chunk: the outputs of its head [C, V] before bias and rule, and
    coefficients [C].
    """

    outputs_CV: Tensor
    bias_V: Tensor | None
    rule: LogitRule
    coefficients_C: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTask:
    """What a backend computes: one chunk of tokens.

    outputs_CV: the head's outputs before bias and rule; a backend may overwrite them
    gradient_CV: where d objective / d outputs goes, None where it is not wanted; it may lie in the
        storage of outputs_CV, each token's gradient from where its outputs begin, with elements of
        the same size or half of it
    """

    outputs_CV: Tensor
    gradient_CV: Tensor | None
    bias_V: Tensor | None
    labels_C: Tensor
    coefficients_C: Tensor
    rule: LogitRule
    terms: LossTerms
    reference: ReferenceTask | None


Backend: TypeAlias = Callable[[ChunkTask], Tensor]
"""Fills the gradient and returns for each token, fp32 [C, NUM_COLUMNS]: its part of the objective,
its statistics, its log-normaliser and, where it has a reference, the reference's.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBackendOptions:
    """How the loss is computed; it changes memory and speed, and results by rounding alone.

    chunk_bytes: bounds the logits of a chunk; None: by the formula in `chunks`
    head_gradient: accumulate adds up the products of chunks in fp32; recompute makes the logits a
        second time, by blocks of the vocabulary, and needs no fp32 copy; auto is accumulate where
        the device's product of the hidden states' dtype can give fp32, else recompute
    """

    backend: Backend
    chunk_bytes: int | None = None
    head_gradient: HeadGradient = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRequest:
    """All that the loss is given besides the tensors that gradients flow to.

    wanted: whether hidden states, head and bias each get a gradient
    """

    tokens: LossTokens
    rule: LogitRule
    terms: LossTerms
    reference: ReferenceStates | None
    options: LossBackendOptions
    wanted: tuple[bool, bool, bool]

    @property
    def num_reference_tokens(self) -> int:
        """How many tokens have a reference; they are the first."""
        return 0 if self.reference is None else len(self.reference.coefficients_K)
