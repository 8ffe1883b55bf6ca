"""A recipe, a manifest and a model's configuration go in; what does not fit together is refused before the model is built."""

from collections.abc import Iterator
from typing import Any

from bigmix.data.manifest import Manifest
from bigmix.data.tokenizer import fingerprint_of
from bigmix.errors import BadInput
from bigmix.model import max_positions
from bigmix.recipe import Recipe


def check_config(recipe: Recipe, manifest: Manifest, config: Any) -> None:
    """Raises BadInput where rows are longer than the model's positions, or tokens are not the model's."""
    faults = [
        *_length_faults(recipe, config),
        *_vocabulary_faults(manifest, config),
        *_tokenizer_faults(recipe, manifest),
    ]
    if faults:
        raise BadInput(*faults)


def _length_faults(recipe: Recipe, config: Any) -> Iterator[str]:
    longest = max_positions(config)
    if longest is not None and recipe.longest_row > longest:
        yield (
            f"sequence_length is {recipe.longest_row}, the model has positions for {longest}; "
            f"set sequence_length={longest} or less, or choose a model with more"
        )


def _vocabulary_faults(manifest: Manifest, config: Any) -> Iterator[str]:
    needed = manifest.tokenizer.vocab_size
    if needed > config.vocab_size:
        yield (
            f"the sources are prepared with a vocabulary of {needed}, the model has {config.vocab_size}; "
            "prepare them with the model's tokenizer, or give the model that vocab_size"
        )


def _tokenizer_faults(recipe: Recipe, manifest: Manifest) -> Iterator[str]:
    """A model from scratch has no tokenizer of its own: it learns whatever the sources speak."""
    path = recipe.model.tokenizer or recipe.model.path
    if path is None:
        return
    fingerprint = fingerprint_of(path)
    if fingerprint != manifest.tokenizer.fingerprint:
        yield (
            f"the tokenizer of {path} ({fingerprint[:12]}) is not the one that the sources are prepared with "
            f"({manifest.tokenizer.name}, {manifest.tokenizer.fingerprint[:12]}); prepare them again with "
            f"`--tokenizer {path}`, or set model.tokenizer to the right one"
        )
