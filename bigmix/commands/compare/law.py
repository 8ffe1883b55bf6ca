"""Fits a law of forgetting over replay's share, and predicts points that were left out of the fit.

    forgetting(p) = forgetting(0) (1 + B p)^-alpha

p is replay's part of all rows that were trained, task and replay together; with the objective
`per_source` and no `loss_share` it is also replay's weight in the gradient. forgetting(0) is what
was measured of one-way training and is not fitted. The form is that of Bethune et al., "Scaling
laws for forgetting during finetuning with pretraining data injection" (2025).

Letters: P points, B values of the constant B.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.commands.compare.measures import FORGETTING, Spread
from bigmix.commands.compare.points import RunPoint
from bigmix.types import Floats

# A point with a smaller relative spread has no larger weight: a tiny spread of three seeds is
# chance.
_LEAST_SPREAD = 0.02
_B_GRID = np.geomspace(1e-2, 1e6, 161)
_REFINEMENTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LawPoint:
    """Forgetting at a share, in nats/token, and its standard error relative to that."""

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
    """A measured point and what the law predicts there when it is fitted without that point."""

    share: float
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the measured value: 0.1 where the prediction is 10 % too large."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The law fitted to all shares; the predictions of each one by a fit to the others, and of the
    larger ones by a fit to the two smallest.

    `passed_over` are the shares without a positive forgetting, of which there is no logarithm.
    """

    law: Law
    points: Sequence[LawPoint]
    leave_one_out: Sequence[Prediction]
    from_smallest: Sequence[Prediction]
    passed_over: Sequence[float]


def fit_source(points: Sequence[RunPoint], source: str) -> Fit | str:
    """The law over the points of a line, or a sentence with the reason why there is none."""
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
            f"No law is fitted on {source}: a fit needs a one-way point and two or more shares of"
            f" replay, all of which forgot something, and there are {len(zero)} and {len(above)}."
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
    """Standard errors over seeds relative to the mean; a point with one seed gets the largest of
    the others.
    """
    known = [
        (
            spread.deviation / len(spread.values) ** 0.5 / abs(spread.mean)
            if spread.deviation is not None and spread.mean
            else None
        )
        for spread in spreads
    ]
    largest = max((error for error in known if error is not None), default=0.0)
    return [largest if error is None else error for error in known]


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
    """The law that minimises the squared error of log forgetting, each point weighted by the
    inverse square of its relative error. B is searched on a grid; alpha has a closed form for each.
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


def _alphas(grid_B: Floats, shares_P: Floats, drops_P: Floats, weights_P: Floats) -> Floats:
    logs_BP = np.log1p(grid_B[:, None] * shares_P)
    alphas: Floats = (logs_BP * drops_P * weights_P).sum(1) / (logs_BP**2 * weights_P).sum(1)
    return alphas


def _losses(grid_B: Floats, shares_P: Floats, drops_P: Floats, weights_P: Floats) -> Floats:
    alphas_B = _alphas(grid_B, shares_P, drops_P, weights_P)
    misses_BP = drops_P - alphas_B[:, None] * np.log1p(grid_B[:, None] * shares_P)
    losses: Floats = (misses_BP**2 * weights_P).sum(1)
    return losses
