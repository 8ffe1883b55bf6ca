"""A micro-batch goes in, the weight of the loss tokens of each of its parts comes out: what counts alike in the loss.

A document with n loss tokens weighs n^(1 - e) beside others of its source, each of its tokens n^-e: with e = 0 all tokens
count alike, with e = 1 all documents do, with e = 1/2 a document weighs the square root of its length (square averaging:
Chen et al., "InternVL 2.5", 2024). A text that is split over rows counts as a document in each of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bigmix.data.records import MicroBatch

Weighing = Literal["token", "square_root", "document"]
EXPONENTS: Mapping[Weighing, float] = {"token": 0.0, "square_root": 0.5, "document": 1.0}

Floats = npt.NDArray[np.floating[Any]]


def part_weights(micro_batch: MicroBatch, exponents_S: Sequence[float]) -> Floats:
    """The weight of a loss token of each part [P]; 1 in parts without one."""
    counts_P = np.maximum(micro_batch.loss_tokens_P, 1).astype(np.float64)
    weights_P: Floats = counts_P ** -np.asarray(exponents_S)[micro_batch.groups_P]
    return weights_P


def masses(micro_batch: MicroBatch, weights_P: Floats, sources: int) -> Floats:
    """The weights of the loss tokens of each source, added up [S]."""
    sums_P = weights_P * micro_batch.loss_tokens_P
    return np.bincount(micro_batch.groups_P, sums_P, minlength=sources).astype(np.float64)
