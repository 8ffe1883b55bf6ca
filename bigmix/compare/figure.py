"""Scenes go in, a PNG comes out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigmix.compare.scene import TEXT_PX, Area, Mark, Scene, Shape, Stroke, Words, outline
from bigmix.compare.styles import Style, legend

DPI = 200
PX_PER_INCH = 95
MAX_COLUMNS = 3
TITLE_PX, GAP_PX, MARGIN_PX = 30, 26, 16
_INK = {"ink": "#1b1f24", "soft": "#5b6470", "line": "#e3e6ea", "paper": "#ffffff"}


def draw_figure(scenes: Sequence[Scene], styles: Mapping[str, Style], path: Path) -> None:
    """Draw the scenes side by side, three in a line at most, with their titles and a legend below."""
    # Matplotlib takes a second to import, and no other command draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(MAX_COLUMNS, len(scenes))
    lines = [scenes[start : start + columns] for start in range(0, len(scenes), columns)]
    cell = max(scene.width for scene in scenes) + GAP_PX
    width = columns * cell + 2 * MARGIN_PX
    heights = [max(scene.height for scene in line) + TITLE_PX + GAP_PX for line in lines]
    below = legend(styles, width - 2 * MARGIN_PX)
    size = (width, sum(heights) + below.height + 2 * MARGIN_PX)
    figure = Figure(
        figsize=(size[0] / PX_PER_INCH, size[1] / PX_PER_INCH), dpi=DPI, facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, size[0])
    axes.set_ylim(size[1], 0)
    colours = _INK | {style.key: style.light for style in styles.values()}
    top = float(MARGIN_PX)
    for line, height in zip(lines, heights, strict=True):
        for index, scene in enumerate(line):
            _draw_scene(axes, scene, colours, (MARGIN_PX + index * cell, top))
        top += height
    _draw_scene(axes, below, colours, (MARGIN_PX, top - TITLE_PX))
    figure.savefig(path)


def _draw_scene(axes: Any, scene: Scene, colours: Mapping[str, str], at: tuple[float, float]) -> None:  # fmt: skip
    x, y = at
    points = TEXT_PX / PX_PER_INCH * 72
    axes.text(
        x, y + 16, scene.title, fontsize=1.15 * points, fontweight="bold", color=colours["ink"]
    )
    for shape in scene.shapes:
        _draw(axes, shape, colours, (x, y + TITLE_PX))


def _draw(axes: Any, shape: Shape, colours: Mapping[str, str], at: tuple[float, float]) -> None:
    px = 72 / PX_PER_INCH  # points for a pixel of the canvas
    colour = colours[shape.colour]
    if isinstance(shape, Words):
        x, y = shape.at[0] + at[0], shape.at[1] + at[1]
        sides = {"start": "left", "middle": "center", "end": "right"}
        weight = "bold" if shape.is_bold else "normal"
        axes.text(x, y, shape.text, fontsize=TEXT_PX * px * 0.94, color=colour, ha=sides[shape.anchor], fontweight=weight)  # fmt: skip
        return
    corners = outline(shape) if isinstance(shape, Mark) else shape.points
    xs, ys = [x + at[0] for x, _ in corners], [y + at[1] for _, y in corners]
    if isinstance(shape, Stroke):
        # Matplotlib scales the lengths of dashes by the width of the line.
        dash = (0, [part / shape.width for part in shape.dash]) if shape.dash else "solid"
        axes.plot(xs, ys, color=colour, linewidth=shape.width * px, linestyle=dash)
    elif isinstance(shape, Area):
        axes.fill(xs, ys, color=colour, alpha=0.13, linewidth=0)
    else:
        fill = colour if shape.is_filled else colours["paper"]
        axes.fill(xs, ys, facecolor=fill, edgecolor=colour, linewidth=1.4 * px, zorder=4)
