"""Types that cross the boundaries of rooms."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IGNORE = -100  # the label of a position whose prediction is not in the loss

Ints = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]
Weighing = Literal["token", "square_root", "document"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A setting that was left to us: what it became, and why, for the header."""

    value: str
    reason: str
