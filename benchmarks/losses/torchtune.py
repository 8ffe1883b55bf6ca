"""torchtune's loss over chunks of outputs: all logits are kept for backward."""

from contestant import Contestant
from torch import Tensor
from torchtune.modules.loss import CEWithChunkedOutputLoss

_chunked = CEWithChunkedOutputLoss()


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """With 8 chunks, the head applied to each, as in its transformer and its recipes."""
    chunks = [
        part_1CD @ head_VD.T
        for part_1CD in hidden_TD.unsqueeze(0).chunk(_chunked.num_output_chunks, 1)
    ]
    result: Tensor = _chunked(chunks, labels_T.unsqueeze(0))
    return result


CONTESTANT = Contestant(loss=loss, note="all logits in the weights' dtype")
