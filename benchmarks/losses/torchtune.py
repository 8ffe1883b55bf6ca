"""torchtune's loss over chunks of outputs: the head is applied chunk by chunk, all logits stay for
backward.
"""

from contestant import Contestant
from torch import Tensor
from torchtune.modules.loss import CEWithChunkedOutputLoss

_chunked = CEWithChunkedOutputLoss()


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """As its transformer and its recipes do it, with 8 chunks."""
    chunks = [
        part_1CD @ head_VD.T
        for part_1CD in hidden_TD.unsqueeze(0).chunk(_chunked.num_output_chunks, 1)
    ]
    result: Tensor = _chunked(chunks, labels_T.unsqueeze(0))
    return result


CONTESTANT = Contestant(loss=loss, note="all logits in the weights' dtype")
