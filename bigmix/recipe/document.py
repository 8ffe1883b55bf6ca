"""Writes docs/recipe.md: every setting with its type, default and meaning."""

import sys
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bigmix.recipe.models import Recipe
from bigmix.recipe.sections import (
    Behaviour,
    Budget,
    Cache,
    Checkpoint,
    Evaluate,
    Group,
    HealthSettings,
    HeldOut,
    Loss,
    ModelSettings,
    Reference,
    Source,
    Sweep,
    Train,
)
from bigmix.recipe.shares import Controller
from bigmix.recipe.task import Task

_TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("", Recipe),
    ("model", ModelSettings),
    ("sources.NAME", Source),
    ("groups.NAME", Group),
    ("sources.NAME.share", Controller),
    ("loss", Loss),
    ("reference", Reference),
    ("held_out.NAME", HeldOut),
    ("tasks.NAME", Task),
    ("budget", Budget),
    ("train", Train),
    ("evaluate", Evaluate),
    ("behaviour", Behaviour),
    ("checkpoint", Checkpoint),
    ("health", HealthSettings),
    ("cache", Cache),
    ("sweep", Sweep),
)
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_HEAD = """\
# The recipe

A run is one YAML file. Unknown keys are refused with the nearest known one, and all faults are
reported at once. Any setting can be changed on the command line:
`train.steps=100 sources.web.share=0.2 budget.task_tokens=null`. Counts may be written `200M`,
`512K` (1K is 1000) or `2e6`. `bigmix recipe show RECIPE` prints a recipe with all its defaults,
`bigmix recipe schema` a JSON schema for editors.

This page is made from the code by `make docs`.
"""


def document() -> str:
    """The page, in Markdown."""
    return _HEAD + "".join(_section(prefix, model) for prefix, model in _TABLES)


def _section(prefix: str, model: type[BaseModel]) -> str:
    title = f"`{prefix}`" if prefix else "Top level"
    intro = cleandoc(model.__doc__ or "")
    return (
        f"\n## {title}\n\n{intro}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
        + "".join(_rows(model))
    )


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        words = (field.description or _tables_meaning(field)).split()
        meaning = " ".join(words).replace("|", "\\|")
        yield f"| `{name}` | {_type(field)} | {_default(field)} | {meaning} |\n"


def _tables_meaning(field: FieldInfo) -> str:
    return "a table, see below" if isinstance(field.annotation, type) else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value: Any = field.default
    if value is None or isinstance(value, BaseModel):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _type(field: FieldInfo) -> str:
    text = _name(field.annotation)
    return text.replace("|", "\\|")


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return "list"
    if origin is dict:
        return "table"
    if arguments:
        members = [_name(a) for a in arguments if a is not type(None) and _is_type(a)]
        return " | ".join(dict.fromkeys(members))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return _PLAIN[annotation]


def _is_type(argument: Any) -> bool:
    """Whether an argument of an annotation is a type, and not a constraint on one."""
    return isinstance(argument, type) or get_origin(argument) is not None


if __name__ == "__main__":
    sys.stdout.write(document())
