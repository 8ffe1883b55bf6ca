"""The words of the loss: what is asked for goes in as records, sums over tokens come out as one.

Letters, in all of `bigmix.loss`: T positions, N loss tokens, K loss tokens with a reference, D
hidden size, V vocabulary, G groups (sources while training, documents in an evaluation), C tokens
of a chunk, M statistics.

With u = logits of a loss token i with label y, p = softmax(u), q = softmax of the reference's
logits:

    nll_i     = lse_i - u_y                        lse_i = log sum_v exp(u_v)
    smooth_i  = lse_i - mean_v u_v                 (label smoothing: Szegedy et al., 2016)
    z_i       = lse_i^2                            (z-loss: Chowdhery et al., "PaLM", 2022)
    kl_i      = sum_v q_v (log q_v - log p_v)      (forward KL to a frozen reference)
    objective = sum_i c_i ((1 - eps) nll_i + eps smooth_i + z_loss z_i)  +  sum_{i < K} k_i kl_i
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from bigmix.types import IGNORE


class Statistic(IntEnum):
    """The columns of what is summed over the tokens of a group."""

    TOKENS = 0
    NLL = 1
    HITS = 2
    Z = 3
    ENTROPY = 4
    KL = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitRule:
    """How an architecture turns the head's output x into logits: softcap * tanh(scale * x /
    softcap), cap optional.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """What the objective holds beside the nll, and what is measured beside it.

    `label_smoothing` is eps in [0, 1), `z_loss` the coefficient of lse^2; with `entropy` the
    entropy of p is summed.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTokens:
    """The tokens in the loss; no other position costs anything.

    positions_N: where in the flat hidden states each stands, no place twice; None where token i
    stands at i labels_N: the token to predict, int64 groups_N: below `num_groups`, int64: which
    sums it adds to coefficients_N: its weight in the objective, fp32
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
    """A frozen model to stay near to, on the first K of the loss tokens.

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
    """Sums over the loss tokens of each group [G], fp32.

    tokens: how many; nll: in nats; hits: where the label is the likeliest token; z: lse^2; entropy:
    of the model's distribution, in nats, 0 where it was not asked for; kl: to the reference, in
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
        """The columns by their names."""
        return cls(
            tokens_G=sums_GM[:, Statistic.TOKENS],
            nll_G=sums_GM[:, Statistic.NLL],
            hits_G=sums_GM[:, Statistic.HITS],
            z_G=sums_GM[:, Statistic.Z],
            entropy_G=sums_GM[:, Statistic.ENTROPY],
            kl_G=sums_GM[:, Statistic.KL],
        )


def tokens_of_labels(
    labels_T: Tensor, coefficients_G: Tensor, groups_T: Tensor | None = None
) -> LossTokens:
    """The loss tokens of labels [T] with IGNORE where no loss is taken, weighted by their group's
    coefficient [G].

    This waits for the device, which must count them; the training step knows the places beforehand.
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
