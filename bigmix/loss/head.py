"""The language model head as the module that computes the loss.

ZeRO-3 gathers a module's weights when its forward is entered, so the head's weight is gathered once
per micro-batch, last of all, and freed before the body's backward.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bigmix.loss.fused import mixed_loss
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LogitRule, LossTerms, LossTokens, ReferenceStates


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSettings:
    """What a MixedHead has besides its weights: the objective, and how it is computed."""

    rule: LogitRule
    terms: LossTerms
    options: LossBackendOptions


class MixedHead(nn.Linear):
    """A linear head that gives logits when called with hidden states, and the loss when given loss
    tokens too.
    """

    settings: HeadSettings

    def forward(
        self,
        hidden: Tensor,
        tokens: LossTokens | None = None,
        reference: ReferenceStates | None = None,
    ) -> Any:
        """Logits [..., V] of hidden [..., D]; with `tokens`, the objective and the sums that
        `mixed_loss` gives for hidden [T, D].
        """
        if tokens is None:
            return super().forward(hidden)
        return mixed_loss(
            hidden,
            self.weight,
            self.bias,
            tokens,
            rule=self.settings.rule,
            terms=self.settings.terms,
            reference=reference,
            options=self.settings.options,
        )


def make_mixed(head: nn.Linear, settings: HeadSettings) -> None:
    """Turn a model's own head into a MixedHead in place: its parameters, their names and whether
    they are tied to the embedding stay as they are.
    """
    head.__class__ = MixedHead
    assert isinstance(head, MixedHead)
    head.settings = settings
