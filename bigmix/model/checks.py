"""Checks that models fit the prepared sources, and that packing and the loss are right on them.

The first is checked on configurations, before anything is built; the second on a built model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmix.data.shards.manifest import Manifest
from bigmix.errors import BadInput
from bigmix.loss.terms import GroupSums, LossTokens
from bigmix.model.causal_lm import ModelTensors, max_positions, read_config
from bigmix.model.engine import Evaluable
from bigmix.model.inputs import ReferenceModel
from bigmix.recipe import Recipe
from bigmix.text.tokenizer import fingerprint_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Configs:
    """The Hugging Face configurations of the model and of the reference, if there is one."""

    model: Any
    reference: Any | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A model that is evaluated without training, and the option that gave it."""

    named: str
    path: str
    config: Any


def read_configs(recipe: Recipe, manifest: Manifest) -> Configs:
    """The configurations of the models of a recipe, checked against the manifest of a source.

    Raises BadInput with every fault: no configuration, rows longer than a model's positions,
    sources prepared with another tokenizer, a reference with another vocabulary.
    """
    config = read_config(recipe.model.path, recipe.model.config)
    reference = None
    if recipe.reference is not None:
        reference = read_config(recipe.reference_path, None, key="reference.model")
    faults = [
        *_length_faults(recipe, config, "the model"),
        *_vocabulary_faults(manifest, config, "the model"),
        *_tokenizer_faults(
            recipe.model.tokenizer or recipe.model.path, manifest, "model.tokenizer"
        ),
    ]
    if reference is not None:
        faults += _reference_faults(recipe, manifest, config, reference)
    if faults:
        raise BadInput(*faults)
    return Configs(model=config, reference=reference)


def read_evaluated(
    recipe: Recipe, manifest: Manifest, tokenizer_folder: Path, paths: Mapping[str, str | None]
) -> dict[str, Evaluated]:
    """The models that options name, checked against the manifest of a held-out source.

    `paths` by option; an option without a path is left out. Raises BadInput with every fault: no
    configuration, rows longer than a model's positions, sources prepared with another tokenizer,
    models whose vocabularies differ.
    """
    models = {
        named: Evaluated(named=named, path=path, config=read_config(path, None, key=named))
        for named, path in paths.items()
        if path is not None
    }
    faults: list[str] = []
    for named, model in models.items():
        faults += _length_faults(recipe, model.config, f"{named} {model.path}")
        faults += _vocabulary_faults(manifest, model.config, f"{named} {model.path}")
        # A run whose sources have no tokenizer exports a model without one.
        if tokenizer_folder.is_dir() or _has_tokenizer(model.path):
            is_trained = model.path == recipe.model.path
            tokenizer = recipe.model.tokenizer if is_trained else None
            faults += _tokenizer_faults(tokenizer or model.path, manifest, named)
    sizes = {f"{named} {model.path}": model.config.vocab_size for named, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} has {size}" for where, size in sizes.items())
        faults.append(
            f"vocabularies differ: {listed}; a divergence needs the same one, give --base none or"
            " another base"
        )
    if faults:
        raise BadInput(*faults)
    return models


def _has_tokenizer(path: str) -> bool:
    return not Path(path).is_dir() or any(Path(path).glob("tokenizer*"))


def _reference_faults(
    recipe: Recipe, manifest: Manifest, config: Any, reference: Any
) -> Iterator[str]:
    path = recipe.reference_path
    yield from _length_faults(recipe, reference, "reference.model")
    if reference.vocab_size != config.vocab_size:
        yield (
            f"reference.model {path} has a vocabulary of {reference.vocab_size}, the model has"
            f" {config.vocab_size}; a divergence needs the same vocabulary, choose a reference of"
            " the same family"
        )
    if path != recipe.model.path:
        yield from _tokenizer_faults(path, manifest, "reference.model")


def _length_faults(recipe: Recipe, config: Any, named: str) -> Iterator[str]:
    longest = max_positions(config)
    if longest is not None and recipe.longest_row > longest:
        yield (
            f"sequence_length is {recipe.longest_row}, {named} has positions for {longest}; "
            f"set sequence_length={longest} or less, or choose a model with more"
        )


def _vocabulary_faults(manifest: Manifest, config: Any, named: str) -> Iterator[str]:
    needed = manifest.tokenizer.vocab_size
    if needed > config.vocab_size:
        yield (
            f"the sources are prepared with a vocabulary of {needed}, {named} has"
            f" {config.vocab_size}; prepare them with the model's tokenizer, or give the model that"
            " vocab_size"
        )


def _tokenizer_faults(path: str | None, manifest: Manifest, key: str) -> Iterator[str]:
    """A model from scratch has no tokenizer of its own: it learns the tokens of the sources."""
    if path is None:
        return
    fingerprint = fingerprint_of(path)
    if fingerprint != manifest.tokenizer.fingerprint:
        yield (
            f"the tokenizer of {path} ({fingerprint[:12]}) is not the one that the sources are"
            f" prepared with ({manifest.tokenizer.name}, {manifest.tokenizer.fingerprint[:12]});"
            f" prepare them again with `--tokenizer {path}`, or set {key} to the right one"
        )


_FIRST, _SECOND = 9, 14  # tokens of two documents in one row
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check_packing_isolation(engine: Evaluable, vocab_size: int, *, named: str = "model") -> None:
    """Check on two documents in one row that the second does not depend on the first, and that our
    loss is that of the model's own logits.

    A collective. Raises BadInput that names the fault: an attention backend that looks across
    documents, a layer with a state of its own, or logits made in a way that bigmix does not know.
    """
    ids_BT, positions_BT = _two_documents(vocab_size, engine.device)
    with engine.evaluating():
        hidden_BTD = engine.module.hidden(ids_BT, positions_BT)
        _check_isolation(hidden_BTD, engine.module.lm.config, named)
        _check_loss(engine, ids_BT, positions_BT, named)


def check_reference_model(reference: ReferenceModel, vocab_size: int, *, named: str) -> None:
    """Check the same isolation of documents in a reference; a collective.

    Raises BadInput where its attention looks across documents.
    """
    ids_BT, positions_BT = _two_documents(vocab_size, reference.engine.device)
    hidden_BTD = reference.engine.forward(ids_BT, positions_BT)
    _check_isolation(hidden_BTD, reference.model.lm.config, named)


def _two_documents(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and positions of two rows of two documents, with the same second document in both."""
    ids = torch.arange(2 * (_FIRST + _SECOND), device=device) * 7 % min(vocab_size, 997)
    ids_BT = ids.view(2, -1)
    ids_BT[1, _FIRST:] = ids_BT[0, _FIRST:]
    lengths = (torch.arange(n, device=device) for n in (_FIRST, _SECOND))
    return ids_BT, torch.cat(list(lengths)).expand(2, -1).contiguous()


def _check_isolation(hidden_BTD: Tensor, config: Any, named: str) -> None:
    one, other = hidden_BTD[:, _FIRST:].float()
    difference = float((one - other).abs().max() / one.abs().max())
    if difference > _TOLERANCE[hidden_BTD.dtype]:
        raise BadInput(
            f"{named}: {config.model_type} with attention {config._attn_implementation} looks"
            f" across documents in a packed row (hidden states differ by {difference:.1%}, at most"
            f" {_TOLERANCE[hidden_BTD.dtype]:.1%} is rounding); set model.attention=sdpa, or choose"
            " a model whose every layer is attention"
        )


def _check_loss(engine: Evaluable, ids_BT: Tensor, positions_BT: Tensor, named: str) -> None:
    """Compare the nll sum of the second document by our head with that by the model's logits."""
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
            f"{named}: the loss of {engine.module.lm.config.model_type} is {found:.4f} by bigmix"
            f" and {expected:.4f} by its own logits: it makes its logits in a way that bigmix does"
            " not know; choose another model"
        )
