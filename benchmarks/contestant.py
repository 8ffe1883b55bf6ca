"""What a contestant of the loss benchmark is: one function, and what to know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The mean over the tokens in the loss, from hidden [T, D], head [V, D] and labels [T]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One implementation.

    loss: with the settings that its own trainer uses; `note` says what it gains with others
    note: what it does and does not do, in short
    compiles: whether its first call with a size compiles; that call is then not measured
    """

    loss: Loss
    note: str
    compiles: bool = False
