"""A scene goes in, an inline SVG comes out: no script, no outside file; a mark shows its numbers when pointed at."""

from collections.abc import Iterator, Sequence
from html import escape

from bigmix.commands.compare.charts.svg import (
    XY,
    Area,
    Mark,
    Scene,
    Shape,
    Stroke,
    Words,
    outline,
    width_of,
)


def draw_svg(scene: Scene) -> str:
    """The scene as an `<svg>` element; its colours come from the page's style."""
    size = f"{scene.width:g} {scene.height:g}"
    shapes = "\n".join(part for shape in scene.shapes for part in _draw(shape, scene))
    return f'<svg viewBox="0 0 {size}" role="img" aria-label="{escape(scene.title)}">\n{shapes}\n</svg>'


def mark_svg(mark: Mark) -> str:
    """A mark alone, as it stands in the legend."""
    return f'<svg class="mark" viewBox="-7 -7 14 14" aria-hidden="true">{_polygon(mark)}</svg>'


def _draw(shape: Shape, scene: Scene) -> Iterator[str]:
    if isinstance(shape, Stroke):
        dash = f' stroke-dasharray="{" ".join(f"{part:g}" for part in shape.dash)}"' if shape.dash else ""  # fmt: skip
        yield f'<polyline points="{_points(shape.points)}" style="stroke:var(--{shape.colour})" stroke-width="{shape.width:g}"{dash}/>'
    elif isinstance(shape, Area):
        yield f'<polygon points="{_points(shape.points)}" style="fill:var(--{shape.colour})" opacity=".13"/>'
    elif isinstance(shape, Words):
        yield _words(shape)
    else:
        yield from _mark(shape, scene)


def _points(points: Sequence[XY]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _words(words: Words) -> str:
    x, y = words.at
    bold = ' font-weight="600"' if words.is_bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{words.anchor}" style="fill:var(--{words.colour})"{bold}>'
        f"{escape(words.text)}</text>"
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
    # Beside the point where there is room for the text; above it, or below it where the top of the canvas is near.
    left = x + 9 if x + 9 + width < scene.width else max(x - 9 - width, 0)
    top = y - 8 - 14 * len(mark.tip) if y > 16 + 14 * len(mark.tip) else y + 10
    tips = "".join(
        f'<text class="tip" x="{left:.1f}" y="{top + 14 * (index + 1):.1f}">{escape(line)}</text>'
        for index, line in enumerate(mark.tip)
    )
    says = escape(", ".join(mark.tip))
    yield (
        f'<g class="point" tabindex="0" role="img" aria-label="{says}"><circle class="reach" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
        f"{_polygon(mark)}{tips}</g>"
    )
