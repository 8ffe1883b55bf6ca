"""The record of an implementation of the loss: one function, and what to know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From hidden states [T, D], head [V, D] and labels [T], the mean nll of the tokens in the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One implementation.

    loss: with the settings that its own trainer uses; `note` has what it gains with others
    note: a few words on what it does and does not do
    compiles: whether its first call of a size compiles; that call is then not measured
    """

    loss: Loss
    note: str
    compiles: bool = False
