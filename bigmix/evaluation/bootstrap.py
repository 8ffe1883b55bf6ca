"""Bootstrap intervals: how much sums over documents would vary with other documents (Efron, 1979).

Letters: D documents, K numbers of each, R resamples.
"""

import math
from dataclasses import dataclass

import numpy as np

from bigmix.types import Floats

RESAMPLES = 1000
_DRAWS = 1 << 20  # documents drawn at a time, to bound memory


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
    """Sums [R, K] over D documents drawn with replacement, for each of RESAMPLES resamples.

    All K sums of a resample are of the same documents. The same key gives the same draws.
    """
    num_documents, num_columns = numbers_DK.shape
    sums_RK = np.zeros((RESAMPLES, num_columns))
    if not num_documents:
        return sums_RK
    draws = np.random.default_rng(key)
    most = max(1, _DRAWS // num_documents)
    for first in range(0, RESAMPLES, most):
        count = min(most, RESAMPLES - first)
        drawn_RD = draws.integers(0, num_documents, (count, num_documents))
        drawn_RD += np.arange(count)[:, None] * num_documents
        times_RD = np.bincount(drawn_RD.ravel(), minlength=count * num_documents)
        # As floats: numpy multiplies integers with floats without BLAS, which is slow.
        times_RD = times_RD.reshape(count, num_documents).astype(np.float64)
        sums_RK[first : first + count] = times_RD @ numbers_DK
    return sums_RK


def interval(values_R: Floats) -> tuple[float, float]:
    """The ends of the middle 95 % of the values, leaving out those that are not a number, as 0 / 0
    is; not a number themselves where no value is left.
    """
    known = values_R[~np.isnan(values_R)]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)
