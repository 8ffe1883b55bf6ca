"""The measures of a held-out source from sums over its documents, each with its 95 % interval.

With nll_d the sum over the n_d loss tokens of document d:

    loss = sum_d nll_d / sum_d n_d        forgetting = loss - loss of the base on the same documents

and likewise for the others: one division at the end, so that a document counts by its tokens. An
interval is that of the same quotient over whole documents that are drawn with replacement. Letters:
D documents, M sums, R resamples.
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
from bigmix.evaluation.behaviour.baseline import BaseAnswers, parse_base_answers
from bigmix.evaluation.bootstrap import Estimate, interval, resampled_sums
from bigmix.files import atomic_write
from bigmix.seeding import key_of
from bigmix.types import Floats, Ints

BASELINE = "held-out-base.npz"
_VERSION = 1
_Measure: TypeAlias = "Callable[[Floats], Floats]"  # of sums [M], or of those of resamples [R, M]


class Sum(IntEnum):
    """The columns of the sums over a document; WORDS is 1 where its last word was predicted, right
    or wrong.
    """

    TOKENS = 0
    NLL = 1
    HITS = 2
    KL = 3
    WORDS = 4
    WORD_HITS = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DocumentSums:
    """Sums over the loss tokens of each document; `ids_D2` are the shard and the number of the
    document in it, in ascending order.

    `has_kl`: whether the column KL was measured.
    """

    ids_D2: Ints
    sums_DM: Floats
    has_kl: bool

    @property
    def loss(self) -> float:
        """Nats per loss token; not a number where there are no loss tokens."""
        num_tokens, nll = self.sums_DM.sum(axis=0)[[Sum.TOKENS, Sum.NLL]].tolist()
        return nll / num_tokens if num_tokens else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """The measures of a held-out source; None where something was not measured.

    loss, forgetting and kl_to_base are in nats per loss token, token_accuracy is of loss tokens,
    last_word_accuracy of `num_last_words` documents: those whose last word is predicted.
    """

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    token_accuracy: Estimate
    last_word_accuracy: Estimate | None
    kl_to_base: Estimate | None
    forgetting: Estimate | None
    num_tokens: int
    num_documents: int
    num_last_words: int


class Baseline:
    """What forgetting is measured from: the first result of each source, in a run that of step 0,
    and the answers of the base, None where behaviour is not compared with them.

    The losses are part of a run's state, as is the fingerprint of the answers. The sums over
    documents, which intervals need as well, and the answers are kept in files of the run's folder.
    """

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self.answers: BaseAnswers | None = None
        self._sums: dict[str, DocumentSums] = {}
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str | None:
        """That of the base's answers; None where there have never been any."""
        return self._fingerprint if self.answers is None else self.answers.fingerprint

    def take(self, name: str, sums: DocumentSums) -> None:
        """Keep the first result of a source; later ones change nothing."""
        if name not in self.losses:
            self.losses[name], self._sums[name] = sums.loss, sums

    def take_over(self, other: "Baseline") -> None:
        """Replace the results by those of another baseline."""
        self.losses, self._sums = dict(other.losses), dict(other._sums)
        self.answers, self._fingerprint = other.answers, other._fingerprint

    def copy(self) -> "Baseline":
        """An independent copy: it does not change when this one takes another result."""
        copied = Baseline()
        copied.take_over(self)
        return copied

    def sums(self, name: str, like: DocumentSums) -> Floats | None:
        """The base's sums over the documents of another result; None where they are unknown or of
        other documents.
        """
        found = self._sums.get(name)
        # The file may be that of another run in the same folder; the losses never are.
        if found is None or found.loss != self.losses[name]:
            return None
        return found.sums_DM if np.array_equal(found.ids_D2, like.ids_D2) else None

    def resume(self, losses: Mapping[str, float], fingerprint: str | None = None) -> None:
        """Continue from the losses of an earlier part of a run, and from its answers, which have
        this fingerprint; None: it had none.
        """
        self.losses, self._fingerprint = dict(losses), fingerprint

    def put_back(self, content: bytes | None) -> None:
        """Restore the sums over documents from the bytes that `content` returned; None restores
        nothing.

        Raises BadInput where they are of another version or damaged.
        """
        if content is not None:
            self._sums = _parsed(content)

    def put_back_answers(self, content: bytes | None) -> None:
        """Restore the answers from the bytes that `read_base_answers` returned; nothing where there
        are none, or where there were none in the earlier part of the run.

        Raises BadInput where they are damaged, or are not those of that part.
        """
        if content is not None and self._fingerprint is not None:
            self.answers = parse_base_answers(content, self._fingerprint)

    def content(self) -> bytes:
        """The sums over documents as the bytes of a file."""
        arrays = {"version": np.array(_VERSION)}
        for name, sums in self._sums.items():
            arrays |= {f"{name}/ids": sums.ids_D2, f"{name}/sums": sums.sums_DM}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Write `content` to its file in the folder of a run."""
        with atomic_write(folder / BASELINE) as temporary:
            temporary.write_bytes(self.content())


def read_baseline(folder: Path) -> bytes | None:
    """The bytes of the file that `write` left in a run's folder; None where there is none."""
    path = folder / BASELINE
    return path.read_bytes() if path.is_file() else None


def _parsed(content: bytes) -> dict[str, DocumentSums]:
    try:
        with np.load(io.BytesIO(content)) as arrays:
            if int(arrays["version"]) != _VERSION:
                raise ValueError(f"its version is {arrays['version']}, must be {_VERSION}")
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
            " copy, or delete it: forgetting is then reported without intervals"
        ) from error


def summarise(
    name: str, sums: DocumentSums, *, tokens_per_byte: float, base: Baseline | None
) -> HeldOutResult:
    """The measures of a source; `tokens_per_byte` is the number of loss tokens for a byte of the
    text that they encode.
    """
    base_DM = None if base is None else base.sums(name, sums)
    # Both on the same draws: forgetting is a difference on the same documents, which varies less
    # than either loss.
    both_DM = sums.sums_DM if base_DM is None else np.hstack([sums.sums_DM, base_DM])
    totals_M = both_DM.sum(axis=0)
    resampled_RM = resampled_sums(both_DM, key_of("interval", name))

    def estimate(measure: "_Measure") -> Estimate:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            value = float(measure(totals_M))
            # One document says nothing about how others would differ; its interval would be a
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
        num_tokens=int(totals_M[Sum.TOKENS]),
        num_documents=len(sums.ids_D2),
        num_last_words=int(totals_M[Sum.WORDS]),
    )


def _ratio(above: Sum, below: Sum) -> "_Measure":
    return lambda sums_xM: sums_xM[..., above] / sums_xM[..., below]
