"""TRL's chunked log-probabilities, called as its supervised trainer does."""

from contestant import Contestant
from loss_case import IGNORE
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

_VOCABULARY_CHUNK = 32768  # its trainer's


def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Masked tokens are dropped beforehand where it uses Triton; elsewhere they are scored for
    nothing.
    """
    kept_T = labels_T != IGNORE
    count = kept_T.sum().clamp(min=1)
    if hidden_TD.is_cuda:
        hidden_TD, labels_T = hidden_TD[kept_T], labels_T[kept_T]
        kept_T = labels_T != IGNORE
    log_p_T = ChunkedLogProbFunction.apply(
        hidden_TD,
        head_VD,
        None,
        labels_T.clamp(min=0),
        1.0,
        _VOCABULARY_CHUNK,
        None,
        1.0,
        ("log_probs",),
    )[0]
    return -log_p_T.masked_fill(~kept_T, 0).sum() / count


CONTESTANT = Contestant(loss=loss, note="vocabulary blocks; 4 products; fp32 sums")
