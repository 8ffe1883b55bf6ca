"""The terms of the objective: their values, their slopes, and the statistics that a run logs.

A new term is a field of `LossTerms`, its value in `token_losses` and its slope in `logit_slopes`;
where something is measured of it, it is also a `Statistic` with a key in `METRIC_KEYS` and a column
of `dense_loss`. Outside of this file it needs a setting of the same name in `bigmix.recipe` and its
lines in the two kernels; everything else follows from what is here.

Letters, in all of `bigmix.loss`: T token positions of a micro-batch, N loss tokens, K loss tokens
with a reference, D hidden size, V vocabulary, G groups (sources while training, documents in an
evaluation), C tokens of a chunk, B tokens (or vocabulary entries) of a block, M statistics.

With u = logits of a loss token i with label y, p = softmax(u), q = softmax of the reference's
logits, c its coefficient and k that of its divergence:

    nll_i     = lse_i - u_y                        lse_i = log sum_v exp(u_v)
    smooth_i  = lse_i - mean_v u_v                 (label smoothing: Szegedy et al., 2016)
    z_i       = lse_i^2                            (z-loss: Chowdhery et al., "PaLM", 2022)
    kl_i      = sum_v q_v (log q_v - log p_v)      (forward KL to a frozen reference)
    objective = sum_i c_i ((1 - eps) nll_i + eps smooth_i + z_loss z_i)  +  sum_{i < K} k_i kl_i

    d objective / d u_v = (c (1 + 2 z_loss lse) + k) p_v - c (1 - eps) [v = y] - c eps / V - k q_v
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bigmix.types import IGNORE


class Statistic(IntEnum):
    """What is summed over the tokens of a group; the values are the columns of the sums."""

    TOKENS = 0
    NLL = 1
    HITS = 2
    Z = 3
    ENTROPY = 4
    KL = 5


METRIC_KEYS: Mapping[Statistic, str] = {
    Statistic.NLL: "loss",
    Statistic.HITS: "accuracy",
    Statistic.Z: "z",
    Statistic.ENTROPY: "entropy",
    Statistic.KL: "kl",
}
"""KEY/SOURCE in metrics.jsonl is the mean of the statistic over the source's loss tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitRule:
    """How an architecture turns its head's outputs x into logits: softcap * tanh(scale * x /
    softcap), or scale * x where it has no cap.
    """

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, outputs: Tensor) -> Tensor:
        """The logits of outputs, their bias included, in a form that autograd can go through."""
        scaled = outputs * self.scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()


@dataclass(frozen=True, kw_only=True, slots=True)
class TermInfo:
    """What a run shows of a field of `LossTerms` that is not at its default.

    title: its name in the header of the run; None where it is not part of the objective
    statistic: what is logged of it
    """

    title: str | None = None
    statistic: Statistic | None = None


def _shows(title: str | None = None, statistic: Statistic | None = None) -> dict[str, TermInfo]:
    return {"info": TermInfo(title=title, statistic=statistic)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """What the objective holds besides the nll, and what is measured besides it.

    label_smoothing: eps, in [0, 1)
    z_loss: the coefficient of lse^2
    entropy: whether the entropy of p is summed
    """

    label_smoothing: float = field(default=0.0, metadata=_shows("label smoothing"))
    z_loss: float = field(default=0.0, metadata=_shows("z-loss", Statistic.Z))
    entropy: bool = field(default=False, metadata=_shows(statistic=Statistic.ENTROPY))


def terms_of(settings: Mapping[str, Any]) -> LossTerms:
    """The terms that a recipe's `loss` settings ask for; each has the name of its setting.

    The other settings of `loss` are about how the loss is computed.
    """
    return LossTerms(**{term.name: settings[term.name] for term in fields(LossTerms)})


def shown_terms(terms: LossTerms) -> dict[str, float]:
    """The terms of the objective that are not at their default, by their titles."""
    return {info.title: value for info, value in _changed(terms) if info.title is not None}


def logged_statistics(terms: LossTerms, *, has_reference: bool) -> dict[str, Statistic]:
    """The statistics that are logged of a source, by their keys in metrics.jsonl.

    `has_reference`: whether the source has a divergence from a reference in the objective.
    """
    found = [Statistic.NLL, Statistic.HITS]
    found += [info.statistic for info, _ in _changed(terms) if info.statistic is not None]
    if has_reference:
        found.append(Statistic.KL)
    return {METRIC_KEYS[statistic]: statistic for statistic in found}


def _changed(terms: LossTerms) -> Iterator[tuple[TermInfo, float]]:
    """The terms that are not at their default, and their values."""
    for term in fields(terms):
        value = getattr(terms, term.name)
        if value != term.default:
            yield term.metadata["info"], value


def token_losses(logits_NV: Tensor, nll_N: Tensor, lse_N: Tensor, terms: LossTerms) -> Tensor:
    """What each token has in the objective before its coefficient, without its divergence."""
    losses_N = nll_N
    if terms.label_smoothing:
        smooth_N = lse_N - logits_NV.mean(1)
        losses_N = (1 - terms.label_smoothing) * nll_N + terms.label_smoothing * smooth_N
    return losses_N + terms.z_loss * lse_N.square()


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitSlopes:
    """What each token's gradient follows from, given p and q:

    d objective / d u_v = of_p p_v - of_label [v = y] - of_all - k q_v

    `of_all_N` is None where it is 0, without label smoothing.
    """

    of_p_N: Tensor
    of_label_N: Tensor
    of_all_N: Tensor | None


def logit_slopes(
    coefficients_N: Tensor,
    lse_N: Tensor,
    terms: LossTerms,
    *,
    vocabulary_size: int,
    reference_coefficients_K: Tensor | None,
) -> LogitSlopes:
    """The slopes of `token_losses` and of the divergence, which the first K tokens have."""
    eps = terms.label_smoothing
    of_p_N = coefficients_N * (1 + 2 * terms.z_loss * lse_N)
    if reference_coefficients_K is not None:
        of_p_N[: len(reference_coefficients_K)] += reference_coefficients_K
    return LogitSlopes(
        of_p_N=of_p_N,
        of_label_N=(1 - eps) * coefficients_N,
        of_all_N=coefficients_N * (eps / vocabulary_size) if eps else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLoss:
    """The objective of each loss token, to be differentiated, and its statistics [N, Statistic]."""

    objective_N: Tensor
    statistics_NM: Tensor


def dense_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    coefficients_N: Tensor,
    terms: LossTerms,
    *,
    reference_logits_KV: Tensor | None = None,
    reference_coefficients_K: Tensor | None = None,
) -> DenseLoss:
    """The equations above over whole logits, in their dtype: what the kernels are checked against.

    Autograd derives from it the gradient that the kernels and `logit_slopes` have by hand. The
    reference is on the first K tokens.
    """
    log_p_NV = logits_NV.log_softmax(1)
    lse_N = logits_NV.logsumexp(1)
    nll_N = -log_p_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
    objective_N = coefficients_N.to(nll_N.dtype) * token_losses(logits_NV, nll_N, lse_N, terms)
    kl_N = torch.zeros_like(nll_N)
    if reference_logits_KV is not None and reference_coefficients_K is not None:
        log_q_KV = reference_logits_KV.log_softmax(1)
        kl_K = (log_q_KV.exp() * (log_q_KV - log_p_NV[: len(log_q_KV)])).sum(1)
        without = (0, len(nll_N) - len(kl_K))
        kl_N = functional.pad(kl_K, without).to(nll_N.dtype)
        objective_N = objective_N + functional.pad(reference_coefficients_K, without) * kl_N
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1) if terms.entropy else torch.zeros_like(nll_N)
    statistics = {
        Statistic.TOKENS: torch.ones_like(nll_N),
        Statistic.NLL: nll_N,
        Statistic.HITS: (logits_NV.argmax(1) == labels_N).to(nll_N.dtype),
        Statistic.Z: lse_N.square(),
        Statistic.ENTROPY: entropy_N,
        Statistic.KL: kl_N,
    }
    columns = [statistics[statistic] for statistic in Statistic]
    return DenseLoss(objective_N=objective_N, statistics_NM=torch.stack(columns, 1).detach())


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """The tokens in the loss; no other position costs anything.

    positions_N: the position of each among the flat hidden states, none twice; None where token i
        is at position i
    labels_N: the token to predict, int64
    groups_N: the group whose sums it adds to, below `num_groups`, int64
    coefficients_N: its weight in the objective, fp32
    """

    positions_N: Tensor | None
    labels_N: Tensor
    groups_N: Tensor
    coefficients_N: Tensor
    num_groups: int

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStates:
    """A frozen model that the first K of the loss tokens stay near to.

    hidden_KD: its final hidden states at these tokens, [K, D of the reference]
    head_VD, bias_V, rule: its head
    coefficients_K: the weight of each token's KL in the objective, fp32
    """

    hidden_KD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    rule: LogitRule
    coefficients_K: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSums:
    """Sums over the loss tokens of each group [G], fp32: a field for each `Statistic`.

    tokens: how many; nll: in nats; hits: tokens whose label is the likeliest; z: lse^2; entropy: of
    the model's distribution, in nats, 0 where the terms do not ask for it; kl: to the reference, in
    nats.
    """

    tokens_G: Tensor
    nll_G: Tensor
    hits_G: Tensor
    z_G: Tensor
    entropy_G: Tensor
    kl_G: Tensor

    @classmethod
    def of(cls, sums_GM: Tensor) -> "GroupSums":
        """The columns of `sums_GM` by the names of their statistics."""
        return cls(**{f"{found.name.lower()}_G": sums_GM[:, found] for found in Statistic})


def tokens_of_labels(
    labels_T: Tensor, coefficients_G: Tensor, groups_T: Tensor | None = None
) -> LossTokens:
    """The loss tokens of labels [T] with IGNORE where no loss is taken, weighted by their group's
    coefficient [G]; without `groups_T` all are in group 0.

    This waits for the device, which must count them; the training step knows the positions
    beforehand.
    """
    positions_N = (labels_T != IGNORE).nonzero().squeeze(1)
    groups_N = torch.zeros_like(positions_N) if groups_T is None else groups_T[positions_N].long()
    return LossTokens(
        positions_N=positions_N,
        labels_N=labels_T[positions_N],
        groups_N=groups_N,
        coefficients_N=coefficients_G.float()[groups_N],
        num_groups=len(coefficients_G),
    )
