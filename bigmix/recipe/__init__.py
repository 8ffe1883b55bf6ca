"""The recipe: one YAML file that says what is trained, on what, and how."""

from bigmix.recipe.load import Loaded, differences, from_plain, load, load_recipe, plain, to_yaml
from bigmix.recipe.models import Recipe
from bigmix.recipe.sections import Group, HeldOut, Source
from bigmix.recipe.sweep import SweepRun

__all__ = [
    "Group",
    "HeldOut",
    "Loaded",
    "Recipe",
    "Source",
    "SweepRun",
    "differences",
    "from_plain",
    "load",
    "load_recipe",
    "plain",
    "to_yaml",
]
