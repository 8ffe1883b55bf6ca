"""One run, from an opened recipe to an exported model.

`bigmix.train` is a name of the Python API as well (docs/api.md), so the package can be called. A
function of that name in `bigmix/__init__.py` would be lost: Python puts a package in its parent
under its name as soon as anything in it is imported.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bigmix.recipe import Recipe


class _CallablePackage(ModuleType):
    def __call__(self, recipe: "Recipe", *, num_ranks: int = 1, num_restarts: int = 3) -> Path:
        """`bigmix.commands.api.train`."""
        train = import_module("bigmix.commands.api").train
        folder: Path = train(recipe, num_ranks=num_ranks, num_restarts=num_restarts)
        return folder


sys.modules[__name__].__class__ = _CallablePackage
