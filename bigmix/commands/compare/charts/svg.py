"""Shapes on a canvas: what the charts are made of, so that svg.py and figure.py draw the same picture.

Lengths are in pixels of the canvas, y grows downwards. A colour is the name of one of the page's custom properties.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

XY: TypeAlias = tuple[float, float]
Anchor = Literal["start", "middle", "end"]
TEXT_PX = 12
_LETTER_PX, _BOLD_LETTER_PX = 6.9, 7.9  # mean width of a letter in a wide font
_WIDE_LETTER_PX = TEXT_PX + 0.5  # of a Chinese, Japanese or Korean one


@dataclass(frozen=True, kw_only=True, slots=True)
class Stroke:
    """A line through points; `dash` holds lengths of strokes and gaps."""

    points: Sequence[XY]
    colour: str
    width: float = 1.0
    dash: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """A region in a thin tint."""

    points: Sequence[XY]
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """A text on its base line."""

    at: XY
    text: str
    colour: str = "soft"
    anchor: Anchor = "start"
    is_bold: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A data point; `tip` is what it says when it is pointed at, empty for one that is only looked at."""

    at: XY
    shape: str
    colour: str
    is_filled: bool = True
    size: float = 4.0
    tip: Sequence[str] = ()


Shape: TypeAlias = Stroke | Area | Words | Mark


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture with its title."""

    title: str
    width: float
    height: float
    shapes: Sequence[Shape] = field(default_factory=list)


def outline(mark: Mark) -> list[XY]:
    """The corners of a mark; a circle is one with many."""
    corners, turn, stretch = _SHAPES[mark.shape]
    x, y = mark.at
    return [
        (
            x + stretch * mark.size * math.sin(2 * math.pi * index / corners + turn),
            y - stretch * mark.size * math.cos(2 * math.pi * index / corners + turn),
        )
        for index in range(corners)
    ]


# Corners, turn and size of each: all look equally large.
_SHAPES = {
    "circle": (24, 0.0, 1.0),
    "diamond": (4, 0.0, 1.3),
    "square": (4, math.pi / 4, 1.25),
    "triangle": (3, 0.0, 1.4),
    "wedge": (3, math.pi, 1.4),
    "hexagon": (6, 0.0, 1.15),
    "pointer": (3, math.pi / 2, 1.4),
    "pentagon": (5, 0.0, 1.2),
}
REMEDY_SHAPES = tuple(_SHAPES)[1:]


def width_of(text: str, *, is_bold: bool = False) -> float:
    """About how wide a text is, rather too much than too little."""
    num_wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    letter_px = _BOLD_LETTER_PX if is_bold else _LETTER_PX
    return letter_px * (len(text) - num_wide) + _WIDE_LETTER_PX * num_wide
