"""What an implementation of the loss is: one function, and what to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden [T, D], head [V, D] and labels [T] go in, the mean over the tokens in the loss comes out.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One implementation.

    loss: with the settings that its own trainer uses; what it gains with others stands in `note`
    note: a few words on what it does and does not do
    compiles: whether its first call of a size compiles; that call is then not measured
    """

    loss: Loss
    note: str
    compiles: bool = False
