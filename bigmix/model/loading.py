"""A path goes in, a model that is not trained comes out on its engine, sharded as the recipe says
and checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LossTerms
from bigmix.model.causal_lm import InferenceLM, build, choose_attention, load
from bigmix.model.checks import check_packing_isolation, check_reference_model
from bigmix.model.engine import InferenceEngine, sharded_construction
from bigmix.model.inputs import ReferenceModel
from bigmix.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Where a model is, its configuration, and the setting or option that names it."""

    path: str | None
    config: Any
    named: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePlacement:
    """The engine's settings, the precision and the device that models are made for."""

    keys: Mapping[str, Any]
    dtype: str
    device: torch.device


def open_reference(
    origin: ModelSource,
    recipe: Recipe,
    place: DevicePlacement,
    weights: Mapping[str, float] | None = None,
) -> ReferenceModel:
    """A model that others are held against; a collective.

    `weights` are those of its divergence in the objective, by source. Raises BadInput where packing
    would mean something else on it.
    """
    model = InferenceLM(
        load(
            origin.config,
            origin.path,
            dtype=place.dtype,
            attention=_attention(origin, recipe, place),
            seed=recipe.seed,
            construction=sharded_construction(place.keys),
        )
    )
    engine = InferenceEngine(model, place.keys, place.device)
    reference = ReferenceModel(model=model, engine=engine, weights=weights or {})
    check_reference_model(reference, origin.config.vocab_size, named=origin.named)
    return reference


def open_evaluated(
    origin: ModelSource, recipe: Recipe, place: DevicePlacement, options: LossBackendOptions
) -> InferenceEngine:
    """A model that is evaluated and never trained: no optimizer, no gradient; a collective.

    Raises BadInput where packing or the loss would mean something else on it.
    """
    model = build(
        origin.config,
        origin.path,
        dtype=place.dtype,
        attention=_attention(origin, recipe, place),
        activation_checkpointing=False,
        terms=LossTerms(),
        options=options,
        seed=recipe.seed,
        construction=sharded_construction(place.keys),
    )
    engine = InferenceEngine(model.requires_grad_(False), place.keys, place.device)
    check_packing_isolation(engine, origin.config.vocab_size, named=origin.named)
    return engine


def _attention(origin: ModelSource, recipe: Recipe, place: DevicePlacement) -> str:
    wish = recipe.model.attention
    return choose_attention(wish, origin.config, place.device, place.dtype).value
