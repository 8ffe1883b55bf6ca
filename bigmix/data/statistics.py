"""Columns of documents go in, counts that add up over parts of a source come out."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

LENGTH_BINS = 32
LOSS_BINS = 10
TURN_BINS = 33

Ints = npt.NDArray[np.int64]


class Statistics(BaseModel):
    """What the documents of a source are like; two of them add up to that of both.

    Bin k of `documents_by_length` and `tokens_by_length` is for documents of 2^k to 2^(k+1) - 1 tokens. For chats, bin
    k of `documents_by_loss` is for those with k to k + 1 tenths of their tokens in the loss, the last bin with its upper
    end, and bin k of `documents_by_turns` for those with k turns, the last bin for more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents_by_length: tuple[int, ...] = (0,) * LENGTH_BINS
    tokens_by_length: tuple[int, ...] = (0,) * LENGTH_BINS
    documents_by_loss: tuple[int, ...] = (0,) * LOSS_BINS
    documents_by_turns: tuple[int, ...] = (0,) * TURN_BINS
    characters: int = 0
    text_bytes: int = 0

    def length_of_half(self) -> str:
        """What at least half of the documents have: with the middle one in the bin of 256 to 511, "less than 512"."""
        half = (sum(self.documents_by_length) + 1) // 2
        up_to = list(accumulate(self.documents_by_length))
        return f"less than {2 << bisect_left(up_to, half):,}"

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            documents_by_length=_sum(self.documents_by_length, other.documents_by_length),
            tokens_by_length=_sum(self.tokens_by_length, other.tokens_by_length),
            documents_by_loss=_sum(self.documents_by_loss, other.documents_by_loss),
            documents_by_turns=_sum(self.documents_by_turns, other.documents_by_turns),
            characters=self.characters + other.characters,
            text_bytes=self.text_bytes + other.text_bytes,
        )


def statistics_of(
    *, tokens: Ints, loss_tokens: Ints | None, turns: Ints, characters: Ints, text_bytes: Ints
) -> Statistics:
    """The counts of some documents, by columns with one entry a document; `loss_tokens` is None for texts."""
    # frexp gives the exponent exactly: 2^k to 2^(k+1) - 1 have k + 1.
    bins = np.frexp(tokens.astype(np.float64))[1] - 1
    by_loss, by_turns = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if loss_tokens is not None:
        by_loss = np.minimum(LOSS_BINS * loss_tokens // tokens, LOSS_BINS - 1)
        by_turns = np.minimum(turns, TURN_BINS - 1)
    return Statistics(
        documents_by_length=_counted(bins, LENGTH_BINS),
        tokens_by_length=tuple(
            np.bincount(bins, tokens, minlength=LENGTH_BINS).astype(np.int64).tolist()
        ),
        documents_by_loss=_counted(by_loss, LOSS_BINS),
        documents_by_turns=_counted(by_turns, TURN_BINS),
        characters=int(characters.sum()),
        text_bytes=int(text_bytes.sum()),
    )


def _counted(bins: npt.NDArray[np.integer], size: int) -> tuple[int, ...]:
    return tuple(np.bincount(bins, minlength=size).tolist())


def _sum(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))
