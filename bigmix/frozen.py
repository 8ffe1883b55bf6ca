"""A path goes in, a frozen model on its engine comes out, sharded as the recipe says and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmix.engine import Frozen, sharded_construction
from bigmix.model import FrozenModel, choose_attention, load
from bigmix.recipe import Recipe
from bigmix.reference import Anchor
from bigmix.soundness import check_frozen_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a frozen model is, its configuration, and what it is called in messages."""

    path: str | None
    config: Any
    named: str


def open_frozen(
    origin: Origin,
    recipe: Recipe,
    keys: Mapping[str, Any],
    *,
    dtype: str,
    device: torch.device,
    weights: Mapping[str, float] | None = None,
) -> Anchor:
    """A model that is never trained, in this precision; a collective.

    `weights` are those of its divergence in the objective, by source. Raises BadInput where packing would mean something
    else on it.
    """
    model = FrozenModel(
        load(
            origin.config,
            origin.path,
            dtype=dtype,
            attention=choose_attention(recipe.model.attention, origin.config, device, dtype).value,
            seed=recipe.seed,
            construction=sharded_construction(keys),
        )
    )
    anchor = Anchor(model=model, engine=Frozen(model, keys, device), weights=weights or {})
    check_frozen_model(anchor, origin.config.vocab_size, device, named=origin.named)
    return anchor
