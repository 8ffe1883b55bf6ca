"""The language model head as the module that computes the loss.

ZeRO-3 gathers a module's weights when its forward is entered, so the head's weight is gathered once per micro-batch,
last of all, and freed before the body's backward.
"""

from typing import Any

from torch import Tensor, nn

from bigmix.loss.cross_entropy import LogitRule, LossTokens, mixed_cross_entropy


class MixedHead(nn.Linear):
    """A linear head that gives logits when called with hidden states, and the loss when given loss tokens too."""

    rule: LogitRule
    chunk_bytes: int

    def forward(self, hidden: Tensor, tokens: LossTokens | None = None) -> Any:
        """Logits [..., V] of hidden [..., D]; with `tokens`, objective and nll sums [G] of hidden [N, D]."""
        if tokens is None:
            return super().forward(hidden)
        return mixed_cross_entropy(
            hidden, self.weight, self.bias, tokens, rule=self.rule, chunk_bytes=self.chunk_bytes
        )


def make_mixed(head: nn.Linear, rule: LogitRule, chunk_bytes: int) -> None:
    """Turn a model's own head into a MixedHead in place: same parameters, same names, ties untouched."""
    head.__class__ = MixedHead
    assert isinstance(head, MixedHead)
    head.rule = rule
    head.chunk_bytes = chunk_bytes
