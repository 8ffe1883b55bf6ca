"""Cut Cross-Entropy: its kernel on a GPU, its torch.compile form elsewhere."""

from contestant import Contestant
from cut_cross_entropy import linear_cross_entropy
from torch import Tensor


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """With its default threshold, below which a gradient is dropped."""
    impl = "cce" if hidden_TD.is_cuda else "torch_compile"
    result: Tensor = linear_cross_entropy(hidden_TD, head_VD, labels_T, impl=impl)
    return result


CONTESTANT = Contestant(loss=loss, note="masked tokens skipped; on a CPU all logits", compiles=True)
