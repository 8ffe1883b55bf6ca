"""Trains a causal language model on a mixture, so that it learns a task and keeps its knowledge.

What is named here is the public Python API, which docs/api.md describes. Each name is imported when
it is first used, so that `import bigmix` takes milliseconds and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigmix.commands.api import (
        TrainingBatch,
        TrainingBatches,
        TrainingPlan,
        batches,
        compare,
        plan,
        run_training,
    )
    from bigmix.errors import BadInput, BigmixError, Interrupted
    from bigmix.loss.fused import mixed_loss
    from bigmix.loss.terms import GroupSums, tokens_of_labels
    from bigmix.recipe import Recipe, load_recipe
    from bigmix.recipe import to_yaml as recipe_to_yaml

__version__ = "0.1.0"

__all__ = [
    "BadInput",
    "BigmixError",
    "GroupSums",
    "Interrupted",
    "Recipe",
    "TrainingBatch",
    "TrainingBatches",
    "TrainingPlan",
    "__version__",
    "batches",
    "compare",
    "load_recipe",
    "mixed_loss",
    "plan",
    "recipe_to_yaml",
    "run_training",
    "tokens_of_labels",
]

# Where each name is defined, and its name there. None may be the name of a room: Python puts a
# package in its parent under its name as soon as anything in it is imported.
_DEFINED_IN = {
    "BadInput": ("bigmix.errors", "BadInput"),
    "BigmixError": ("bigmix.errors", "BigmixError"),
    "GroupSums": ("bigmix.loss.terms", "GroupSums"),
    "Interrupted": ("bigmix.errors", "Interrupted"),
    "Recipe": ("bigmix.recipe", "Recipe"),
    "TrainingBatch": ("bigmix.commands.api", "TrainingBatch"),
    "TrainingBatches": ("bigmix.commands.api", "TrainingBatches"),
    "TrainingPlan": ("bigmix.commands.api", "TrainingPlan"),
    "batches": ("bigmix.commands.api", "batches"),
    "compare": ("bigmix.commands.api", "compare"),
    "load_recipe": ("bigmix.recipe", "load_recipe"),
    "mixed_loss": ("bigmix.loss.fused", "mixed_loss"),
    "plan": ("bigmix.commands.api", "plan"),
    "recipe_to_yaml": ("bigmix.recipe", "to_yaml"),
    "run_training": ("bigmix.commands.api", "run_training"),
    "tokens_of_labels": ("bigmix.loss.terms", "tokens_of_labels"),
}

# Type checkers know the names from the imports above; a function that answers to any name would
# hide misspelt ones from them.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a name of the API on first use (PEP 562)."""
        if name not in _DEFINED_IN:
            raise AttributeError(f"module 'bigmix' has no attribute {name!r}")
        module, defined_as = _DEFINED_IN[name]
        found = getattr(import_module(module), defined_as)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
