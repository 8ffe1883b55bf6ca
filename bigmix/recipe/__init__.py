"""The recipe: one YAML file that says what is trained, on what, and how."""

from bigmix.recipe.load import differences, from_plain, load_recipe, plain, to_yaml
from bigmix.recipe.models import Recipe, Source

__all__ = ["Recipe", "Source", "differences", "from_plain", "load_recipe", "plain", "to_yaml"]
