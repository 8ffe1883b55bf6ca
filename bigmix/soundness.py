"""A built model goes in; it is refused where packing or the loss would silently mean something else on it."""

from typing import Any

import torch
from torch import Tensor

from bigmix.errors import BadInput
from bigmix.loss.terms import GroupSums, LossTokens
from bigmix.model.causal_lm import ModelTensors
from bigmix.model.engine import Evaluable
from bigmix.reference import Anchor

_FIRST, _SECOND = 9, 14  # tokens of two documents in one row
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_model(engine: Evaluable, vocabulary: int, *, named: str = "model") -> None:
    """Run two documents in one row and see that the second knows nothing of the first, and that our loss is the model's.

    A collective. Raises BadInput naming what is wrong: an attention backend that looks across documents, a layer with a
    state of its own, logits that are made in a way that bigmix does not know.
    """
    ids_BT, positions_BT = _two_documents(vocabulary, engine.device)
    with engine.evaluating():
        hidden_BTD = engine.module.hidden(ids_BT, positions_BT)
        _check_isolation(hidden_BTD, engine.module.lm.config, named)
        _check_loss(engine, ids_BT, positions_BT, named)


def check_reference_model(anchor: Anchor, vocabulary: int, *, named: str) -> None:
    """The same of a frozen model: documents of one row must not see each other in it either. A collective."""
    ids_BT, positions_BT = _two_documents(vocabulary, anchor.engine.device)
    hidden_BTD = anchor.engine.forward(ids_BT, positions_BT)
    _check_isolation(hidden_BTD, anchor.model.lm.config, named)


def _two_documents(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and positions of two rows of two documents each, of which the second ones are the same."""
    ids = torch.arange(2 * (_FIRST + _SECOND), device=device) * 7 % min(vocabulary, 997)
    ids_BT = ids.view(2, -1)
    ids_BT[1, _FIRST:] = ids_BT[0, _FIRST:]
    lengths = (torch.arange(n, device=device) for n in (_FIRST, _SECOND))
    return ids_BT, torch.cat(list(lengths)).expand(2, -1).contiguous()


def _check_isolation(hidden_BTD: Tensor, config: Any, named: str) -> None:
    one, other = hidden_BTD[:, _FIRST:].float()
    difference = float((one - other).abs().max() / one.abs().max())
    if difference > _TOLERANCE[hidden_BTD.dtype]:
        raise BadInput(
            f"{named}: {config.model_type} with attention {config._attn_implementation} looks across documents in a packed row "
            f"(hidden states differ by {difference:.1%}, at most {_TOLERANCE[hidden_BTD.dtype]:.1%} is rounding); "
            "set model.attention=sdpa, or choose a model whose every layer is attention"
        )


def _check_loss(engine: Evaluable, ids_BT: Tensor, positions_BT: Tensor, named: str) -> None:
    """The nll sum of the second document by our head against the model's own logits."""
    own = ids_BT[:1, _FIRST:]
    logits_TV = engine.module.lm(input_ids=own).logits[0, :-1].float()
    expected = float(torch.nn.functional.cross_entropy(logits_TV, own[0, 1:], reduction="sum"))
    tokens = LossTokens(
        positions_N=torch.arange(_FIRST, _FIRST + _SECOND - 1, device=engine.device),
        labels_N=own[0, 1:],
        groups_N=torch.zeros_like(own[0, 1:]),
        coefficients_N=torch.zeros(_SECOND - 1, device=engine.device),
        num_groups=1,
    )
    _, sums_GM = engine.forward(
        ModelTensors(ids_BT=ids_BT, positions_BT=positions_BT, tokens=tokens)
    )
    found = float(GroupSums.of(sums_GM).nll_G[0])
    if abs(found - expected) > _TOLERANCE[engine.module.lm.dtype] * abs(expected):
        raise BadInput(
            f"{named}: the loss of {engine.module.lm.config.model_type} is {found:.4f} by bigmix and {expected:.4f} by its own "
            "logits: it makes its logits in a way that bigmix does not know; choose another model"
        )
