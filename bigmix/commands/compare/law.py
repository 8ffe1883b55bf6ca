"""Forgetting at some shares of replay goes in; out comes the law that fits it, with what it
predicts of points left out.

    forgetting(p) = forgetting(0) (1 + B p)^-alpha

p is replay's part of all rows that were trained, task and replay together; with one objective per
source and no loss_share of its own it is replay's weight in the gradient as well. forgetting(0) is
what was measured one-way and is not fitted. The form is that of Bethune et al., "Scaling laws for
forgetting during finetuning with pretraining data injection" (2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigmix.commands.compare.measures import FORGETTING, Spread
from bigmix.commands.compare.points import RunPoint

# Relative spread below which no point counts as better known: a tiny spread of three seeds is
# chance.
_LEAST_SPREAD = 0.02
_B_GRID = np.geomspace(1e-2, 1e6, 161)
_REFINEMENTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LawPoint:
    """Forgetting at a share, in nats/token, and its standard error relative to it."""

    share: float
    forgetting: float
    relative_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """The law with its constants."""

    at_zero: float
    B: float
    alpha: float

    def predict(self, share: float) -> float:
        """Forgetting at a share, in nats/token."""
        return float(self.at_zero * (1 + self.B * share) ** -self.alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A point beside what the law says of it when it is fitted without it; `error` is relative to
    the measured value.
    """

    share: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """0.1 where the law says 10 % too much."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The law fitted to all shares; what it says of each one when fitted to the others, and of the
    larger ones when fitted to the two smallest. `passed_over` are shares without a positive
    forgetting, which has no logarithm.
    """

    law: Law
    points: Sequence[LawPoint]
    leave_one_out: Sequence[Prediction]
    from_smallest: Sequence[Prediction]
    passed_over: Sequence[float]


def fit_source(points: Sequence[RunPoint], source: str) -> Fit | str:
    """The law over the points of a line, or a sentence that says why there is none."""
    known = [
        (point.share, spread)
        for point in points
        if point.share is not None and (spread := point.source(source, FORGETTING)) is not None
    ]
    usable = [
        LawPoint(share=share, forgetting=spread.mean, relative_error=error)
        for (share, spread), error in zip(
            known, _relative_errors([s for _, s in known]), strict=True
        )
        if spread.mean > 0
    ]
    passed_over = [share for share, spread in known if spread.mean <= 0]
    zero = [point for point in usable if point.share == 0]
    above = sorted((point for point in usable if point.share > 0), key=lambda point: point.share)
    if not zero or len(above) < 2:
        return (
            f"No law is fitted on {source}: it takes one-way training that forgets and two or more"
            f" shares of replay that forget as well, and there are {len(zero)} and {len(above)}."
        )
    at_zero = zero[0].forgetting
    return Fit(
        law=fit_law(at_zero, above),
        points=[zero[0], *above],
        leave_one_out=_leave_one_out(at_zero, above),
        from_smallest=_predict(at_zero, above[:2], above[2:]),
        passed_over=passed_over,
    )


def _relative_errors(spreads: Sequence[Spread]) -> list[float]:
    """Standard errors over seeds relative to the mean; what has one seed counts as the least
    certain of the others.
    """
    known = [
        (
            spread.deviation / len(spread.values) ** 0.5 / abs(spread.mean)
            if spread.deviation is not None and spread.mean
            else None
        )
        for spread in spreads
    ]
    least_certain = max((error for error in known if error is not None), default=0.0)
    return [least_certain if error is None else error for error in known]


def _leave_one_out(at_zero: float, above: Sequence[LawPoint]) -> list[Prediction]:
    if len(above) < 3:
        return []
    pairs = [([p for p in above if p is not out], [out]) for out in above]
    return [found for kept, left in pairs for found in _predict(at_zero, kept, left)]


def _predict(
    at_zero: float, known: Sequence[LawPoint], others: Sequence[LawPoint]
) -> list[Prediction]:
    law = fit_law(at_zero, known)
    return [
        Prediction(share=p.share, measured=p.forgetting, predicted=law.predict(p.share))
        for p in others
    ]


def fit_law(at_zero: float, above: Sequence[LawPoint]) -> Law:
    """Least squares on the logarithm, each point weighted by its spread; for a given B, alpha has a
    closed form.
    """
    shares_P = np.array([point.share for point in above])
    drops_P = np.log(at_zero / np.array([point.forgetting for point in above]))
    errors_P = np.maximum([point.relative_error for point in above], _LEAST_SPREAD)
    weights_P = errors_P**-2.0
    grid = _B_GRID
    for _ in range(_REFINEMENTS):
        losses = _losses(grid, shares_P, drops_P, weights_P)
        best = int(np.argmin(losses))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        chosen, grid = grid[best], np.geomspace(low, high, 21)
    return Law(
        at_zero=at_zero,
        B=float(chosen),
        alpha=float(_alphas(np.array([chosen]), shares_P, drops_P, weights_P)[0]),
    )


Array = NDArray[np.float64]


def _alphas(grid_B: Array, shares_P: Array, drops_P: Array, weights_P: Array) -> Array:
    logs_BP = np.log1p(grid_B[:, None] * shares_P)
    alphas: Array = (logs_BP * drops_P * weights_P).sum(1) / (logs_BP**2 * weights_P).sum(1)
    return alphas


def _losses(grid_B: Array, shares_P: Array, drops_P: Array, weights_P: Array) -> Array:
    alphas_B = _alphas(grid_B, shares_P, drops_P, weights_P)
    misses_BP = drops_P - alphas_B[:, None] * np.log1p(grid_B[:, None] * shares_P)
    losses: Array = (misses_BP**2 * weights_P).sum(1)
    return losses
