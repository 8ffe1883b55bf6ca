"""The records that travel between the parts. Letters: B rows, T positions of a row, S sources, N loss tokens, P parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORE = -100  # the label of a position whose prediction is not in the loss

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowId:
    """Which row of a source: `row` counts inside the shard."""

    source: str
    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`sequence_length` tokens packed from documents of one source.

    `labels_T[t]` is the token that position t must predict, IGNORE where none is. Positions restart in each part;
    what follows the last part is padding and a part of its own. `documents_P` says which document of its shard a part
    is from.
    """

    id: RowId
    ids_T: Ints
    positions_T: Ints
    labels_T: Ints
    starts_P: Ints
    documents_P: Ints
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The rows of one forward pass, with the loss tokens singled out.

    `kept_N` are the flat positions (row * T + position) whose prediction is in the loss, `labels_N` what they must
    predict, `groups_N` the index of the sum that each of them goes to: its source while training.
    """

    ids_BT: Ints
    positions_BT: Ints
    kept_N: Ints
    labels_N: Ints
    groups_N: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank trains in one step.

    `rows` counts over all ranks; `tokens`, `loss_tokens` and `squares`, the sum over parts of their squared lengths,
    are this rank's own.
    """

    step: int
    micro_batches: tuple[MicroBatch, ...]
    row_ids: tuple[RowId, ...]
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    loss_tokens: Mapping[str, int]
    squares: int
