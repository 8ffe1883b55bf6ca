"""Numbers of documents go in, how much their sums would move with other documents comes out
(bootstrap: Efron, 1979).

Letters: D documents, K numbers of each, R resamples.
"""

import math
from dataclasses import dataclass

import numpy as np

from bigmix.types import Floats

RESAMPLES = 1000
_DRAWS = 1 << 20  # of documents at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A measured value and the ends of its 95 % interval; an end that is not known is NaN."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends; None where one of them is not known."""
        is_unknown = math.isnan(self.low) or math.isnan(self.high)
        return None if is_unknown else (self.low, self.high)


def resampled_sums(numbers_DK: Floats, key: int) -> Floats:
    """The sums over as many documents, drawn with replacement, in each of RESAMPLES resamples [R,
    K].

    The same for the same key; all K numbers of a resample are of the same documents.
    """
    documents, columns = numbers_DK.shape
    sums_RK = np.zeros((RESAMPLES, columns))
    if not documents:
        return sums_RK
    draws = np.random.default_rng(key)
    rows = max(1, _DRAWS // documents)
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        drawn_RD = draws.integers(0, documents, (count, documents))
        drawn_RD += np.arange(count)[:, None] * documents
        times_RD = np.bincount(drawn_RD.ravel(), minlength=count * documents)
        # A product of whole numbers with floats is not a BLAS call.
        times_RD = times_RD.reshape(count, documents).astype(np.float64)
        sums_RK[first : first + count] = times_RD @ numbers_DK
    return sums_RK


def interval(values_R: Floats) -> tuple[float, float]:
    """The points that 95 % of the values lie between; values that are no number, as 0 / 0, are left
    out.
    """
    known = values_R[~np.isnan(values_R)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)
