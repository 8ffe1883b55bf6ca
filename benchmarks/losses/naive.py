"""The loss as it is usually written first: all logits, then torch's cross-entropy in fp32."""

from contestant import Contestant
from torch import Tensor
from torch.nn import functional


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """All logits at once."""
    return functional.cross_entropy((hidden_TD @ head_VD.T).float(), labels_T)


CONTESTANT = Contestant(loss=loss, note="all logits")
