"""Sums over each document of a held-out source go in, its measures come out, each with its 95 %
interval over documents.

With sums over documents, and counts of the loss tokens n_d:

    loss = sum_d nll_d / sum_d n_d        forgetting = loss - loss of the base on the same documents

and so for all: one division at the end, so that long documents weigh as much as their tokens. An
interval is that of the same quotient when whole documents are drawn again. Letters: D documents, M
sums, R resamples.
"""

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bigmix.errors import BadInput
from bigmix.evaluation.bootstrap import Estimate, interval, resampled_sums
from bigmix.files import atomic_write
from bigmix.seeding import key_of
from bigmix.types import Floats, Ints

BASELINE = "held-out-base.npz"
_VERSION = 1
_Measure: TypeAlias = "Callable[[Floats], Floats]"  # of sums [M], or of those of resamples [R, M]


class Sum(IntEnum):
    """The columns of what is summed over a document; WORDS is 1 where its last word was predicted,
    right or wrong.
    """

    TOKENS = 0
    NLL = 1
    HITS = 2
    KL = 3
    WORDS = 4
    WORD_HITS = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentSums:
    """Sums over the loss tokens of each document; `ids_D2` are its shard and its place in it, in
    growing order.

    `has_kl`: whether the column KL was measured.
    """

    ids_D2: Ints
    sums_DM: Floats
    has_kl: bool

    @property
    def loss(self) -> float:
        """Nats per loss token; not a number where there is none."""
        tokens, nll = self.sums_DM.sum(axis=0)[[Sum.TOKENS, Sum.NLL]].tolist()
        return nll / tokens if tokens else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """What was measured on a held-out source; None is what was not.

    loss, forgetting, kl_to_base: nats per loss token. token_accuracy: of loss tokens.
    last_word_accuracy: of `last_words` documents, those whose last word is predicted.
    """

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    token_accuracy: Estimate
    last_word_accuracy: Estimate | None
    kl_to_base: Estimate | None
    forgetting: Estimate | None
    tokens: int
    documents: int
    last_words: int


class Baseline:
    """What forgetting is measured from: the first result of each source, in a run that of step 0.

    The losses are part of a run's state; the sums of documents, which intervals need too, are kept
    in a file beside.
    """

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self._sums: dict[str, DocumentSums] = {}

    def take(self, name: str, sums: DocumentSums) -> None:
        """Keep the first result of a source; those that come later change nothing."""
        if name not in self.losses:
            self.losses[name], self._sums[name] = sums.loss, sums

    def take_over(self, other: "Baseline") -> None:
        """Measure from what another one measures from."""
        self.losses, self._sums = dict(other.losses), dict(other._sums)

    def copy(self) -> "Baseline":
        """One that takes in no more when this one does."""
        copied = Baseline()
        copied.take_over(self)
        return copied

    def sums(self, name: str, like: DocumentSums) -> Floats | None:
        """The base's sums over the documents of another result; None where they are not known, or
        are of others.
        """
        found = self._sums.get(name)
        # The file may be of another run in the same folder, the losses are never.
        if found is None or found.loss != self.losses[name]:
            return None
        return found.sums_DM if np.array_equal(found.ids_D2, like.ids_D2) else None

    def resume(self, losses: Mapping[str, float]) -> None:
        """Go on from the losses of an earlier part of a run."""
        self.losses = dict(losses)

    def put_back(self, content: bytes | None) -> None:
        """Take in what `content` gave, or nothing where that is lost.

        Raises BadInput where it is of another version or damaged.
        """
        if content is not None:
            self._sums = _parsed(content)

    def content(self) -> bytes:
        """The sums of documents as the bytes of a file."""
        arrays = {"version": np.array(_VERSION)}
        for name, sums in self._sums.items():
            arrays |= {f"{name}/ids": sums.ids_D2, f"{name}/sums": sums.sums_DM}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Keep them with the run."""
        with atomic_write(folder / BASELINE) as temporary:
            temporary.write_bytes(self.content())


def read_baseline(folder: Path) -> bytes | None:
    """The file that `write` left in a run's folder; None where there is none."""
    path = folder / BASELINE
    return path.read_bytes() if path.is_file() else None


def _parsed(content: bytes) -> dict[str, DocumentSums]:
    try:
        with np.load(io.BytesIO(content)) as arrays:
            if int(arrays["version"]) != _VERSION:
                raise ValueError(f"its version is {arrays['version']}, known is {_VERSION}")
            names = [key.removesuffix("/ids") for key in arrays.files if key.endswith("/ids")]
            return {
                name: DocumentSums(
                    ids_D2=arrays[f"{name}/ids"], sums_DM=arrays[f"{name}/sums"], has_kl=False
                )
                for name in names
            }
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{BASELINE} in the run's folder is not as it was written ({error}); restore it from a"
            " copy, or delete it: forgetting is then told without intervals"
        ) from error


def summarise(
    name: str, sums: DocumentSums, *, tokens_per_byte: float, base: Baseline | None
) -> HeldOutResult:
    """The measures of a source; `tokens_per_byte` are the loss tokens of a byte of the text behind
    them.
    """
    base_DM = None if base is None else base.sums(name, sums)
    # Of the same draws: forgetting is a difference on the same documents, which moves less than
    # either loss.
    both_DM = sums.sums_DM if base_DM is None else np.hstack([sums.sums_DM, base_DM])
    totals_M = both_DM.sum(axis=0)
    resampled_RM = resampled_sums(both_DM, key_of("interval", name))

    def estimate(measure: "_Measure") -> Estimate:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = float(measure(totals_M))
            # One document says nothing of how others would differ, and its interval would be a
            # point.
            low, high = (
                interval(measure(resampled_RM)) if len(both_DM) > 1 else (math.nan, math.nan)
            )
        return Estimate(value=value, low=low, high=high)

    loss, words = _ratio(Sum.NLL, Sum.TOKENS), _ratio(Sum.WORD_HITS, Sum.WORDS)
    bits = tokens_per_byte / math.log(2)
    forgetting = None
    if base is not None:
        change = Estimate(value=math.nan)
        if base_DM is not None:
            change = estimate(lambda sums_xM: loss(sums_xM) - loss(sums_xM[..., len(Sum) :]))
        forgetting = Estimate(value=sums.loss - base.losses[name], low=change.low, high=change.high)
    return HeldOutResult(
        loss=estimate(loss),
        perplexity=estimate(lambda sums_xM: np.exp(loss(sums_xM))),
        bits_per_byte=estimate(lambda sums_xM: loss(sums_xM) * bits),
        token_accuracy=estimate(_ratio(Sum.HITS, Sum.TOKENS)),
        last_word_accuracy=estimate(words) if totals_M[Sum.WORDS] else None,
        kl_to_base=estimate(_ratio(Sum.KL, Sum.TOKENS)) if sums.has_kl else None,
        forgetting=forgetting,
        tokens=int(totals_M[Sum.TOKENS]),
        documents=len(sums.ids_D2),
        last_words=int(totals_M[Sum.WORDS]),
    )


def _ratio(above: Sum, below: Sum) -> "_Measure":
    return lambda sums_xM: sums_xM[..., above] / sums_xM[..., below]
