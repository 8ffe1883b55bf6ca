"""The shapes that charts are made of, and how they are drawn as SVG for the page.

Lengths are in pixels of the canvas; y grows downwards. A colour is the name of a custom property of
the page. An SVG has no script and loads no file; a mark shows its numbers under the pointer.
figure.py draws the same shapes as a PNG.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, TypeAlias

XY: TypeAlias = tuple[float, float]
TextAnchor = Literal["start", "middle", "end"]
TEXT_PX = 12
_LETTER_PX, _BOLD_LETTER_PX = 6.9, 7.9  # the mean width of a letter in a wide font
_WIDE_LETTER_PX = TEXT_PX + 0.5  # the width of a Chinese, Japanese or Korean letter


@dataclass(frozen=True, kw_only=True, slots=True)
class Stroke:
    """A line through points; `dash` has the lengths of strokes and gaps."""

    points: Sequence[XY]
    colour: str
    width: float = 1.0
    dash: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """A lightly tinted region."""

    points: Sequence[XY]
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A text; `at` is on its base line."""

    at: XY
    text: str
    colour: str = "soft"
    anchor: TextAnchor = "start"
    is_bold: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A data point; `tip` has the lines shown under the pointer, and is empty for a mark that has
    none.
    """

    at: XY
    shape: str
    colour: str
    is_filled: bool = True
    size: float = 4.0
    tip: Sequence[str] = ()


Shape: TypeAlias = Stroke | Area | Label | Mark


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture with its title."""

    title: str
    width: float
    height: float
    shapes: Sequence[Shape] = field(default_factory=list)


def outline(mark: Mark) -> list[XY]:
    """The corners of a mark; a circle is a polygon with many."""
    corners, turn, stretch = _SHAPES[mark.shape]
    x, y = mark.at
    return [
        (
            x + stretch * mark.size * math.sin(2 * math.pi * index / corners + turn),
            y - stretch * mark.size * math.cos(2 * math.pi * index / corners + turn),
        )
        for index in range(corners)
    ]


# The number of corners, the turn and the size of each; all look equally large.
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
    """About how wide a text is, more rather than less."""
    num_wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    letter_px = _BOLD_LETTER_PX if is_bold else _LETTER_PX
    return letter_px * (len(text) - num_wide) + _WIDE_LETTER_PX * num_wide


def draw_svg(scene: Scene) -> str:
    """The scene as an `<svg>` element, whose colours are those of the page's style."""
    size = f"{scene.width:g} {scene.height:g}"
    shapes = "\n".join(part for shape in scene.shapes for part in _draw(shape, scene))
    return (
        f'<svg viewBox="0 0 {size}" role="img"'
        f' aria-label="{escape(scene.title)}">\n{shapes}\n</svg>'
    )


def mark_svg(mark: Mark) -> str:
    """A single mark, as in the legend."""
    return f'<svg class="mark" viewBox="-7 -7 14 14" aria-hidden="true">{_polygon(mark)}</svg>'


def _draw(shape: Shape, scene: Scene) -> Iterator[str]:
    if isinstance(shape, Stroke):
        dash = (
            f' stroke-dasharray="{" ".join(f"{part:g}" for part in shape.dash)}"'
            if shape.dash
            else ""
        )
        yield (
            f'<polyline points="{_points(shape.points)}" style="stroke:var(--{shape.colour})"'
            f' stroke-width="{shape.width:g}"{dash}/>'
        )
    elif isinstance(shape, Area):
        yield (
            f'<polygon points="{_points(shape.points)}" style="fill:var(--{shape.colour})"'
            ' opacity=".13"/>'
        )
    elif isinstance(shape, Label):
        yield _text(shape)
    else:
        yield from _mark(shape, scene)


def _points(points: Sequence[XY]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(label: Label) -> str:
    x, y = label.at
    bold = ' font-weight="600"' if label.is_bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{label.anchor}"'
        f' style="fill:var(--{label.colour})"{bold}>{escape(label.text)}</text>'
    )


def _polygon(mark: Mark) -> str:
    fill = mark.colour if mark.is_filled else "paper"
    return (
        f'<polygon class="dot" points="{_points(outline(mark))}" '
        f'style="fill:var(--{fill});stroke:var(--{mark.colour})"/>'
    )


def _mark(mark: Mark, scene: Scene) -> Iterator[str]:
    if not mark.tip:
        yield _polygon(mark)
        return
    x, y = mark.at
    width = max(width_of(line) for line in mark.tip)
    # Right of the mark, or left of it where there is no room; above it, or below it near the top of
    # the canvas.
    left = x + 9 if x + 9 + width < scene.width else max(x - 9 - width, 0)
    top = y - 8 - 14 * len(mark.tip) if y > 16 + 14 * len(mark.tip) else y + 10
    tips = "".join(
        f'<text class="tip" x="{left:.1f}" y="{top + 14 * (index + 1):.1f}">{escape(line)}</text>'
        for index, line in enumerate(mark.tip)
    )
    label = escape(", ".join(mark.tip))
    yield (
        f'<g class="point" tabindex="0" role="img" aria-label="{label}"><circle class="reach"'
        f' cx="{x:.1f}" cy="{y:.1f}" r="9"/>{_polygon(mark)}{tips}</g>'
    )
