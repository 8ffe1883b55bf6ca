"""Opens models that are not trained: on an engine as a recipe says, or whole in one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.logging import disable_progress_bar

from bigmix.errors import BadInput
from bigmix.loss.requests import LossBackendOptions
from bigmix.loss.terms import LossTerms
from bigmix.model.causal_lm import DTYPES, InferenceLM, MixedLM, choose_attention, load
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
    """The DeepSpeed configuration, the precision (bf16 or fp32) and the device of models."""

    keys: Mapping[str, Any]
    dtype: str
    device: torch.device


def open_inference(
    source: ModelSource,
    recipe: Recipe,
    placement: DevicePlacement,
    wrap: Callable[[Any], nn.Module],
) -> InferenceEngine:
    """A model on its engine, without optimizer and gradients; a collective.

    `wrap` makes the module that the engine runs of the language model. Under ZeRO-3 no rank holds
    the whole model at any time. Raises BadInput where transformers refuses to make it.
    """
    lm = load(
        source.config,
        source.path,
        dtype=placement.dtype,
        attention=choose_attention(
            recipe.model.attention, source.config, placement.device, placement.dtype
        ).value,
        seed=recipe.seed,
        construction=sharded_construction(placement.keys),
    )
    return InferenceEngine(wrap(lm).requires_grad_(False), placement.keys, placement.device)


def open_reference(
    source: ModelSource,
    recipe: Recipe,
    placement: DevicePlacement,
    weights: Mapping[str, float] | None = None,
) -> ReferenceModel:
    """A model that divergences are measured to; a collective.

    `weights` are those of its divergence in the objective, by source. Raises BadInput where packed
    documents would see each other in it.
    """
    engine = open_inference(source, recipe, placement, InferenceLM)
    reference = ReferenceModel(model=engine.module, engine=engine, weights=weights or {})
    check_reference_model(reference, source.config.vocab_size, named=source.named)
    return reference


def open_evaluated(
    source: ModelSource, recipe: Recipe, placement: DevicePlacement, options: LossBackendOptions
) -> InferenceEngine:
    """A model whose forward is the loss, to be evaluated; a collective.

    Raises BadInput where packed documents would see each other in it, or where its own logits give
    another loss.
    """
    engine = open_inference(source, recipe, placement, lambda lm: MixedLM(lm, LossTerms(), options))
    check_packing_isolation(engine, source.config.vocab_size, named=source.named)
    return engine


def open_whole(path: str | Path, *, dtype: str, device: torch.device) -> Any:
    """A language model of transformers, whole on one device and in evaluation mode, as any other
    program would load it: transformers chooses the attention, and no recipe is needed.

    `dtype` is bf16, fp32, or auto for the precision that it is stored in. Raises BadInput where
    there is no such model.
    """
    disable_progress_bar()  # its updates would fill one line of a log
    try:
        lm = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype, dtype))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the model {path} cannot be loaded ({' '.join(str(error).split())}); give the folder"
            " or the hub name of a causal language model, such as RUN/export"
        ) from error
    return lm.to(device).eval()
