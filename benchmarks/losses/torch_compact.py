"""torch's own chunked loss (2.13 and later), sums in the weights' dtype: its leanest setting."""

from contestant import Contestant
from torch import Tensor, nn
from torch.nn import functional


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Gradients in forward, chunk by chunk."""
    options = nn.LinearCrossEntropyOptions(acc_policy="compact")
    return functional.linear_cross_entropy(hidden_TD, head_VD, labels_T, options=options)


CONTESTANT = Contestant(loss=loss, note="chunks; no skipping; no fp32 sums")
