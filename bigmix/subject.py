"""A model on its engine goes in, what an evaluation asks of it comes out: the sums of a micro-batch."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigmix.engine import Engine
from bigmix.loss.mixed import mixed_loss
from bigmix.loss.work import Computing
from bigmix.model import ModelTensors, whole_reference
from bigmix.reference import Anchor


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model that is evaluated: `lm` as transformers made it, its weights may be shards.

    `sums` gives those of each group of a micro-batch [G, Statistic]; a collective, and without gradient.
    """

    lm: Any
    device: torch.device
    sums: Callable[[ModelTensors], Tensor]


def trained_subject(engine: Engine) -> Subject:
    """The model in training; to be asked inside `engine.evaluating()`."""

    def sums(batch: ModelTensors) -> Tensor:
        return engine.forward(batch)[1]

    return Subject(lm=engine.module.lm, device=engine.device, sums=sums)


def frozen_subject(anchor: Anchor, computing: Computing, device: torch.device) -> Subject:
    """A model that is not trained."""

    def sums(batch: ModelTensors) -> Tensor:
        model, engine = anchor.model, anchor.engine
        hidden_BTD = engine.forward(batch.ids_BT, batch.positions_BT)
        reference = nullcontext() if batch.reference is None else whole_reference(batch.reference)
        with torch.no_grad(), engine.gathered(model.head) as head, reference as given:
            _, sums_GM = mixed_loss(
                hidden_BTD.flatten(0, 1),
                head.weight,
                head.bias,
                batch.tokens,
                rule=model.rule,
                reference=given,
                computing=computing,
            )
        return sums_GM

    return Subject(lm=anchor.model.lm, device=device, sums=sums)
