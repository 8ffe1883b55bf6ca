"""A path goes in, a model that is not trained comes out on its engine, sharded as the recipe says
and checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmix.loss.requests import Computing
from bigmix.loss.terms import Terms
from bigmix.model.causal_lm import FrozenModel, build, choose_attention, load
from bigmix.model.checks import check_model, check_reference_model
from bigmix.model.engine import Frozen, sharded_construction
from bigmix.model.inputs import Anchor
from bigmix.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a model is, its configuration, and the setting or option that names it."""

    path: str | None
    config: Any
    named: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The engine's settings, the precision and the device that models are made for."""

    keys: Mapping[str, Any]
    dtype: str
    device: torch.device


def open_anchor(
    origin: Origin, recipe: Recipe, place: Place, weights: Mapping[str, float] | None = None
) -> Anchor:
    """A model that others are held against; a collective.

    `weights` are those of its divergence in the objective, by source. Raises BadInput where packing
    would mean something else on it.
    """
    model = FrozenModel(
        load(
            origin.config,
            origin.path,
            dtype=place.dtype,
            attention=_attention(origin, recipe, place),
            seed=recipe.seed,
            construction=sharded_construction(place.keys),
        )
    )
    engine = Frozen(model, place.keys, place.device)
    anchor = Anchor(model=model, engine=engine, weights=weights or {})
    check_reference_model(anchor, origin.config.vocab_size, named=origin.named)
    return anchor


def open_evaluated(origin: Origin, recipe: Recipe, place: Place, computing: Computing) -> Frozen:
    """A model that is evaluated and never trained: no optimizer, no gradient; a collective.

    Raises BadInput where packing or the loss would mean something else on it.
    """
    model = build(
        origin.config,
        origin.path,
        dtype=place.dtype,
        attention=_attention(origin, recipe, place),
        activation_checkpointing=False,
        terms=Terms(),
        computing=computing,
        seed=recipe.seed,
        construction=sharded_construction(place.keys),
    )
    engine = Frozen(model.requires_grad_(False), place.keys, place.device)
    check_model(engine, origin.config.vocab_size, named=origin.named)
    return engine


def _attention(origin: Origin, recipe: Recipe, place: Place) -> str:
    wish = recipe.model.attention
    return choose_attention(wish, origin.config, place.device, place.dtype).value
