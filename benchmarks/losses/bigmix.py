"""bigmix's own loss."""

import torch
from contestant import Contestant, Loss
from loss_case import IGNORE
from torch import Tensor

from bigmix.loss.backend import backend_of, choose_backend
from bigmix.loss.fused import mixed_loss
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import tokens_of_labels


def loss_with(chunk_bytes: int | None) -> Loss:
    """The loss with a bound on the logits of a chunk; None: by the formula."""

    def loss(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
        backend = backend_of(choose_backend("auto", hidden_TD.device).value)
        coefficients_G = (labels_T != IGNORE).sum().float().reciprocal().reshape(1)
        tokens = tokens_of_labels(labels_T, coefficients_G)
        options = LossBackendOptions(backend=backend, chunk_bytes=chunk_bytes)
        objective, _ = mixed_loss(hidden_TD, head_VD, None, tokens, options=options)
        assert isinstance(objective, torch.Tensor)
        return objective

    return loss


CONTESTANT = Contestant(
    loss=loss_with(None), note="sums of each source; masked tokens skipped; fp32 sums"
)
