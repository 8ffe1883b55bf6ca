"""The marks on the fields of a recipe (see `fields`), looked up by dotted key."""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bigmix.recipe.fields import AtResume, BeforeFirstStep, Rows
from bigmix.recipe.models import Recipe
from bigmix.recipe.sections import Group, Source

_Mark = TypeVar("_Mark", bound=Enum)


def at_resume(key: str) -> AtResume | None:
    """What a setting may do when a run is resumed."""
    return _mark(key, AtResume)


def moves_rows(key: str) -> bool:
    """Whether other rows are drawn once a setting has another value."""
    mark = _mark(key, Rows)
    if mark is not None:
        return mark is Rows.MOVE
    return any(table in (Source, Group) for table, _ in _fields(key))


def matters_before_first_step(key: str) -> bool:
    """Whether a setting changes what a run finds before its first step."""
    return _mark(key, BeforeFirstStep) is not BeforeFirstStep.IGNORED


def _mark(key: str, kind: type[_Mark]) -> _Mark | None:
    """The mark of the innermost field on the way to a setting that has one."""
    for _, field in reversed(_fields(key)):
        for mark in field.metadata:
            if isinstance(mark, kind):
                return mark
    return None


def _fields(key: str) -> Sequence[tuple[type[BaseModel], FieldInfo]]:
    """The fields on the way to a setting, outermost first, each with its table.

    Names of sources may have dots, and what is inside a value that is not a table has no field.
    """
    return _walk([Recipe], key.split("."))


def _walk(
    tables: Sequence[type[BaseModel]], parts: Sequence[str]
) -> Sequence[tuple[type[BaseModel], FieldInfo]]:
    for table in tables:
        field = table.model_fields.get(parts[0]) if parts else None
        if field is None:
            continue
        own, rest = [(table, field)], parts[1:]
        inner = list(tables_in(field.annotation))
        if not rest or not inner:
            return own
        # Of a table by name, the name takes one part or more.
        begins = range(1, len(rest) + 1) if _is_by_name(field.annotation) else range(1)
        tries = (_walk(inner, rest[begin:]) for begin in begins)
        return [*own, *next((found for found in tries if found), [])]
    return []


def _is_by_name(annotation: Any) -> bool:
    """Whether an annotation is dict[str, Table], such as that of `sources`."""
    return any(
        getattr(part, "__origin__", part) is dict for part in (annotation, *get_args(annotation))
    )


def tables_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside an annotation such as dict[str, Source]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from tables_in(part)
