"""Opens the behaviour probe of a recipe: whether there is one, and its prompts.

Nothing here imports torch or tokenizers, so that faults are reported at once.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.prompts import BehaviourPrompt, read_prompts, spread
from bigmix.recipe.sections import Behaviour

_TEMPLATE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"  # of a tokenizer's folder


@dataclass(frozen=True, kw_only=True, slots=True)
class BehaviourInputs:
    """The probe of a recipe: its settings, its prompts, and the folder or hub name of the tokenizer
    in whose chat template they are put to the model.
    """

    settings: Behaviour
    prompts: Sequence[BehaviourPrompt]
    tokenizer: str


def open_behaviour(settings: Behaviour, tokenizer: str | None) -> BehaviourInputs | None:
    """The probe for a model with this tokenizer, a folder or a hub name; None where behaviour is
    not measured.

    Raises BadInput with the faults of the prompts, and where only a model without a chat template
    is left to measure.
    """
    if settings.when == "off" or tokenizer is None:
        return None
    if not has_chat_template(tokenizer):
        if settings.when == "auto":
            return None
        raise BadInput(
            f"behaviour.when is {settings.when}, and no chat template is in the tokenizer of"
            f" {tokenizer}; give a chat model, or set behaviour=auto, which measures chat models"
            " only"
        )
    prompts = read_prompts(settings.prompts, settings.languages)
    return BehaviourInputs(
        settings=settings, prompts=spread(prompts, settings.num_prompts), tokenizer=tokenizer
    )


def has_chat_template(tokenizer: str) -> bool:
    """Whether the tokenizer in a folder or of a hub name has a chat template; False where its files
    cannot be read.
    """
    if _text_of(tokenizer, _TEMPLATE):
        return True
    try:
        found = json.loads(_text_of(tokenizer, _CONFIG) or "{}").get("chat_template")
    except (ValueError, AttributeError):
        return False
    # Some have several, by name; the tokenizer takes the one that is called default.
    if isinstance(found, list):
        return any(isinstance(each, dict) and each.get("name") == "default" for each in found)
    return bool(found)


def _text_of(tokenizer: str, file: str) -> str | None:
    """The text of a file of a tokenizer; None where it has none."""
    path = Path(tokenizer) / file if Path(tokenizer).exists() else _fetched(tokenizer, file)
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


@lru_cache  # all runs of a sweep ask for the same
def _fetched(name: str, file: str) -> Path | None:
    try:
        return Path(hf_hub_download(name, file))
    # Whether there is such a model at all is checked with its configuration.
    except (OSError, ValueError, EntryNotFoundError):
        return None
