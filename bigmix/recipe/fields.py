"""The types of settings: numbers as people write them, paths, names, and the marks that say how a
setting behaves.
"""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt
from pydantic_core import PydanticCustomError

_MULTIPLES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_HUMAN_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)\s*([kmgbt]?)", re.I)


def number(value: Any) -> Any:
    """Any value but true and false, which Python would take for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number")
    return value


def whole_number(value: Any) -> Any:
    """A count as people write it: 200M, 512K, 2e6 or 1_000 become whole numbers; other values pass
    unchanged.
    """
    value = number(value)
    if isinstance(value, str) and (match := _HUMAN_NUMBER.fullmatch(value.strip())):
        value = float(match[1].replace("_", "")) * _MULTIPLES[match[2].lower()]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def place(value: Any) -> Any:
    """A path as people write it: one that begins with ~/ is in the home folder, which no shell puts
    into KEY=~/PATH.
    """
    return (
        str(Path(value).expanduser())
        if isinstance(value, str) and value.startswith("~/")
        else value
    )


# In addition to the bounds of a number: a truth value is not one.
A_NUMBER = BeforeValidator(number)
Positive = Annotated[float, Field(gt=0), A_NUMBER]
NonNegative = Annotated[float, Field(ge=0), A_NUMBER]
# A file, a folder, or a name elsewhere.
PathOrUrl = Annotated[str, Field(min_length=1), BeforeValidator(place)]
Count = Annotated[PositiveInt, BeforeValidator(whole_number)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(whole_number)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
SchedulePoint = tuple[CountOrZero, NonNegative]


class AtResume(Enum):
    """What a setting may do when a run is resumed; one without a mark may change and is reported,
    since it decides what is learned from there on.
    """

    FREE = "changes speed, memory or what is written, never what is learned"
    FREE_WITHOUT_CONTROLLERS = "free, unless shares are decided on what is evaluated"
    FIXED = "decides what the state of a run is: a run with another value is another run"


class Rows(Enum):
    """Whether other rows are drawn once a setting changes; without a mark those of a source or a
    group do, and no others.
    """

    MOVE = "other rows are drawn"
    STAY = "the same rows are drawn"


class BeforeFirstStep(Enum):
    """Whether a setting matters before the first step; one without a mark does."""

    IGNORED = "two runs that differ in it find the same numbers before their first step"


class Settings(BaseModel):
    """A table of settings: unknown keys are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
