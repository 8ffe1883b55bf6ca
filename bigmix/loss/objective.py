"""Counts of a whole step go in, the weight of one loss token of each source comes out.

With nll_i the negative log-likelihood of loss token i and N_s the loss tokens of source s in the
step, over all ranks and micro-batches, the step minimises

    per_source:  sum_s lambda_s * (sum over i of s of nll_i) / N_s
    per_token:   sum_i w_s(i) nll_i / sum_i w_s(i),   w_s = loss share / share

so that under per_source a source's share is its weight in the gradient, whatever the masks and the
packing. Where chosen sources stay near a reference model, either has beside it sum_s kappa_s * (sum
over i of s of KL_i) / N_s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Objective = Literal["per_source", "per_token"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWeights:
    """The weights of a step, by source.

    `token`: the coefficient of one loss token's nll; `gradient`: the source's part of the
    objective, sum over its loss tokens of `token`.
    """

    token: dict[str, float]
    gradient: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShares:
    """Normalised shares of the rows and of the gradient in one step, by source."""

    rows: Mapping[str, float]
    loss: Mapping[str, float]


def weigh(
    objective: Objective,
    shares: StepShares,
    rows: Mapping[str, int],
    loss_tokens: Mapping[str, int],
    weight_sums: Mapping[str, float] | None = None,
) -> StepWeights:
    """The weight of a loss token of each source, from the counts of the whole step.

    `weight_sums`: the sum of the weights that the loss tokens of a source have among themselves,
    where they have some; they take the place of the counts N_s under per_source, and under
    per_token there are none.
    """
    if objective == "per_token":
        return per_token(shares.rows, shares.loss, loss_tokens)
    lambdas = source_weights(shares.rows, shares.loss, rows, sum(rows.values()))
    return per_source(lambdas, loss_tokens if weight_sums is None else weight_sums)


def source_weights(
    shares: Mapping[str, float],
    loss_shares: Mapping[str, float],
    rows: Mapping[str, int],
    rows_per_step: int,
) -> dict[str, float]:
    """lambda_s of a step: the loss share, and for a source that is not surely in every step its
    catching up.

    A source that is in some steps only weighs loss_share / (share * rows per step) there for each
    row, so that over the run its part of the gradient is its loss share: with share 0.25 of 2 rows
    it is in every second step, with twice the weight.
    """
    surely = surely_from(shares)
    weights = {}
    for name, loss_share in loss_shares.items():
        due = shares[name] * rows_per_step
        weights[name] = loss_share if due >= surely or due == 0 else loss_share * rows[name] / due
    return weights


def surely_from(shares: Mapping[str, float]) -> int:
    """Rows that a source is due in a step, from which on it has one in each: its rows are within
    one of its share.

    Of two sources one has what the other leaves, and both have a row in each step that they are due
    one in; of more, a source that comes early in one step may have none in the next.
    """
    return 1 if sum(share > 0 for share in shares.values()) <= 2 else 2


def divergence_weights(
    kl_weights: Mapping[str, float],
    shares: StepShares,
    rows: Mapping[str, int],
    loss_tokens: Mapping[str, int],
) -> dict[str, float]:
    """The coefficient of one loss token's KL: kappa_s / N_s, 0 for sources without a kappa.

    A source that is not due in every step catches up as it does in `source_weights`.
    """
    given = {name: kl_weights.get(name, 0.0) for name in rows}
    due = source_weights(shares.rows, given, rows, sum(rows.values()))
    return per_source(due, loss_tokens).token


def per_source(lambdas: Mapping[str, float], loss_tokens: Mapping[str, float]) -> StepWeights:
    """lambda_s / N_s; a source without a loss token in the step has no part in it."""
    token = {n: lambdas[n] / count if count else 0.0 for n, count in loss_tokens.items()}
    gradient = {n: lambdas[n] if count else 0.0 for n, count in loss_tokens.items()}
    return StepWeights(token=token, gradient=gradient)


def per_token(
    shares: Mapping[str, float], loss_shares: Mapping[str, float], loss_tokens: Mapping[str, int]
) -> StepWeights:
    """w_s / sum over all loss tokens of w; where every loss share is its share that is one over
    their number.
    """
    weights = {n: loss_shares[n] / shares[n] if shares[n] else 0.0 for n in loss_tokens}
    total = sum(weights[n] * count for n, count in loss_tokens.items())
    token = {n: weights[n] / total if total else 0.0 for n in loss_tokens}
    gradient = {n: token[n] * count for n, count in loss_tokens.items()}
    return StepWeights(token=token, gradient=gradient)
