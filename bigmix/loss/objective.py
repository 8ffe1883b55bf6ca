"""The objective of a step: from the counts of the whole step, the weight of each source's tokens.

With nll_i the negative log-likelihood of loss token i and N_s the loss tokens of source s in the
step, over all ranks and micro-batches, the step minimises

    per_source:  sum_s lambda_s * (sum over i of s of nll_i) / N_s
    per_token:   sum_i w_s(i) nll_i / sum_i w_s(i),   w_s = loss share / share

so that under per_source a source's loss share is its weight in the gradient, whatever the masks and
the packing. Where some sources stay near a reference model, either one has in addition
sum_s kappa_s * (sum over i of s of KL_i) / N_s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Objective = Literal["per_source", "per_token"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWeights:
    """The weights of a step, by source.

    token: the coefficient of one loss token's nll
    gradient: the source's weight in the objective, the sum of `token` over its loss tokens
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
    num_rows: Mapping[str, int],
    num_loss_tokens: Mapping[str, int],
    weight_sums: Mapping[str, float] | None = None,
) -> StepWeights:
    """The weight of a loss token of each source, from the counts of the whole step.

    `weight_sums`: the sum of the weights that the loss tokens of a source have among themselves,
    where they have some; under per_source they take the place of the counts N_s, and under
    per_token there are none.
    """
    if objective == "per_token":
        return per_token(shares.rows, shares.loss, num_loss_tokens)
    lambdas = source_weights(shares.rows, shares.loss, num_rows, sum(num_rows.values()))
    return per_source(lambdas, num_loss_tokens if weight_sums is None else weight_sums)


def source_weights(
    shares: Mapping[str, float],
    loss_shares: Mapping[str, float],
    num_rows: Mapping[str, int],
    rows_per_step: int,
) -> dict[str, float]:
    """lambda_s of a step: the loss share; a source that may miss steps weighs more in the others.

    Such a source weighs loss_share / (share * rows per step) for each of its rows in the step, so
    that over the run its part of the gradient is its loss share: with share 0.25 of 2 rows it is in
    every second step, with twice the weight.
    """
    due_in_every_step = min_rows_for_every_step(shares)
    weights = {}
    for name, loss_share in loss_shares.items():
        due = shares[name] * rows_per_step
        weighs_its_share = due >= due_in_every_step or due == 0
        weights[name] = loss_share if weighs_its_share else loss_share * num_rows[name] / due
    return weights


def min_rows_for_every_step(shares: Mapping[str, float]) -> int:
    """How many rows of a step a source must be due to have one in every step.

    It is due share * rows per step, and its rows are within one of its share at any point of the
    run. Of two sources one has the rows that the other leaves, and each has a row in every step
    that it is due one in; of more, a source whose row comes early in one step may have none in the
    next.
    """
    return 1 if sum(share > 0 for share in shares.values()) <= 2 else 2


def divergence_weights(
    kl_weights: Mapping[str, float],
    shares: StepShares,
    num_rows: Mapping[str, int],
    num_loss_tokens: Mapping[str, int],
) -> dict[str, float]:
    """The coefficient of one loss token's KL: kappa_s / N_s, 0 for sources without a kappa.

    A source that may miss steps weighs more in the others, as in `source_weights`.
    """
    kappas = {name: kl_weights.get(name, 0.0) for name in num_rows}
    weights = source_weights(shares.rows, kappas, num_rows, sum(num_rows.values()))
    return per_source(weights, num_loss_tokens).token


def per_source(lambdas: Mapping[str, float], num_loss_tokens: Mapping[str, float]) -> StepWeights:
    """lambda_s / N_s; a source without a loss token in the step weighs nothing in it."""
    token = {n: lambdas[n] / count if count else 0.0 for n, count in num_loss_tokens.items()}
    gradient = {n: lambdas[n] if count else 0.0 for n, count in num_loss_tokens.items()}
    return StepWeights(token=token, gradient=gradient)


def per_token(
    shares: Mapping[str, float],
    loss_shares: Mapping[str, float],
    num_loss_tokens: Mapping[str, int],
) -> StepWeights:
    """w_s / sum over all loss tokens of w; where every loss share is its share, that is one over
    the number of loss tokens.
    """
    weights = {n: loss_shares[n] / shares[n] if shares[n] else 0.0 for n in num_loss_tokens}
    total = sum(weights[n] * count for n, count in num_loss_tokens.items())
    token = {n: weights[n] / total if total else 0.0 for n in num_loss_tokens}
    gradient = {n: token[n] * count for n, count in num_loss_tokens.items()}
    return StepWeights(token=token, gradient=gradient)
