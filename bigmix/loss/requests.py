"""What the loss is asked for, what a backend is given for one chunk of tokens, and what it gives
back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates

OBJECTIVE = 0  # the column before the statistics: a token's part of the objective
# After the objective and one column for each Statistic, in its order; the last two are
# log-normalisers.
LSE = 7
REFERENCE_LSE = 8
COLUMNS = 9
HeadGradient = Literal["auto", "accumulate", "recompute"]


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
    """One chunk of tokens.

    outputs_CV: the head's outputs before bias and rule; a backend may overwrite them
    gradient_CV: where d objective / d outputs goes, None where it is not wanted; it may lie in the
        storage of
        outputs_CV, row in row and begin at begin, with elements of the same size or half of it
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
"""Fills the gradient and returns for each token, fp32 [C, COLUMNS]: its part of the objective, its
statistics, its log-normaliser and, where it has a reference, the reference's.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossBackendOptions:
    """How the loss is computed; it changes memory and speed, and results by rounding alone.

    `chunk_bytes` bounds the logits of a chunk; None: by the formula in `chunks`. `head_gradient`:
    accumulate adds up the products of chunks in fp32; recompute makes the logits a second time, by
    blocks of the vocabulary, and needs no fp32 copy; auto is accumulate where the device's product
    of the hidden states' dtype can give fp32, else recompute.
    """

    backend: Backend
    chunk_bytes: int | None = None
    head_gradient: HeadGradient = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRequest:
    """All that is asked for beside the tensors that gradients flow to; `wanted`: those of hidden
    states, head and bias.
    """

    tokens: LossTokens
    rule: LogitRule
    terms: LossTerms
    reference: ReferenceStates | None
    options: LossBackendOptions
    wanted: tuple[bool, bool, bool]

    @property
    def anchored(self) -> int:
        """How many tokens have a reference; they are the first."""
        return 0 if self.reference is None else len(self.reference.coefficients_K)
