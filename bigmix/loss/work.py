"""What a backend is given for one chunk of tokens, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from bigmix.loss.terms import LogitRule, Terms

OBJECTIVE = 0  # the column before the statistics: a token's part of the objective
COLUMNS = 7  # the objective and one for each Statistic, in its order


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceWork:
    """The reference's part of a chunk: the outputs of its head [C, V] before bias and rule, and coefficients [C]."""

    outputs_CV: Tensor
    bias_V: Tensor | None
    rule: LogitRule
    coefficients_C: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkWork:
    """One chunk of tokens.

    outputs_CV: the head's outputs before bias and rule; a backend may overwrite them
    gradient_CV: where d objective / d outputs goes, None where it is not wanted; it may lie in the storage of
        outputs_CV, row in row and begin at begin, with elements of the same size or half of it
    """

    outputs_CV: Tensor
    gradient_CV: Tensor | None
    bias_V: Tensor | None
    labels_C: Tensor
    coefficients_C: Tensor
    rule: LogitRule
    terms: Terms
    reference: ReferenceWork | None


Backend: TypeAlias = Callable[[ChunkWork], Tensor]
"""Fills the gradient and returns for each token its part of the objective and its statistics, fp32 [C, COLUMNS]."""
