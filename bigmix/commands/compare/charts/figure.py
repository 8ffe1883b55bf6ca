"""Draws charts as a PNG with matplotlib."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigmix.commands.compare.charts.styles import Style, legend
from bigmix.commands.compare.charts.svg import (
    TEXT_PX,
    Area,
    Label,
    Mark,
    Scene,
    Shape,
    Stroke,
    outline,
)

DPI = 200
PX_PER_INCH = 95
PT_PER_PX = 72 / PX_PER_INCH
MAX_COLUMNS = 3
TITLE_PX, GAP_PX, MARGIN_PX = 30, 26, 16
# Fonts in order: each that is installed is used for the letters that those before it lack.
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "SimHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
_INK = {"ink": "#1b1f24", "soft": "#5b6470", "line": "#e3e6ea", "paper": "#ffffff"}


def draw_figure(
    scenes: Sequence[Scene],
    styles: Mapping[str, Style],
    path: Path,
    *,
    columns: int = MAX_COLUMNS,
    with_legend: bool,
) -> None:
    """Draw the scenes with their titles, at most `columns` side by side, and a legend below."""
    # Matplotlib takes a second to import, and no other command draws.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(scenes))
    lines = [scenes[start : start + columns] for start in range(0, len(scenes), columns)]
    cell = max(scene.width for scene in scenes) + GAP_PX
    width = columns * cell + 2 * MARGIN_PX
    heights = [max(scene.height for scene in line) + TITLE_PX + GAP_PX for line in lines]
    below = legend(styles if with_legend else {}, width - 2 * MARGIN_PX)
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
    with rc_context({"font.family": _families()}), warnings.catch_warnings():
        # Matplotlib warns of each letter; unknown_letters finds all of them at once.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for line, height in zip(lines, heights, strict=True):
            for index, scene in enumerate(line):
                _draw_scene(axes, scene, colours, (MARGIN_PX + index * cell, top))
            top += height
        _draw_scene(axes, below, colours, (MARGIN_PX, top - TITLE_PX))
        figure.savefig(path)


def unknown_letters(texts: Iterable[str]) -> str:
    """The letters of texts that are drawn as boxes, since no installed font has them: each once,
    in order.
    """
    letters = sorted({letter for text in texts for letter in text if ord(letter) > 127})
    if not letters:
        return ""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = set[int]()
    for family in _families():
        known |= set(get_font(findfont(FontProperties(family=[family]))).get_charmap())
    return "".join(letter for letter in letters if ord(letter) not in known)


def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [family for family in _FAMILIES if family in installed]


def _draw_scene(
    axes: Any, scene: Scene, colours: Mapping[str, str], at: tuple[float, float]
) -> None:
    x, y = at
    size = 1.1 * TEXT_PX * PT_PER_PX
    axes.text(
        x,
        y + 16,
        scene.title,
        fontsize=size,
        fontweight="bold",
        color=colours["ink"],
        parse_math=False,
    )
    for shape in scene.shapes:
        _draw(axes, shape, colours, (x, y + TITLE_PX))


def _draw(axes: Any, shape: Shape, colours: Mapping[str, str], at: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon

    colour = colours[shape.colour]
    if isinstance(shape, Label):
        _write(axes, shape, colour, at)
        return
    corners = outline(shape) if isinstance(shape, Mark) else shape.points
    placed = [(x + at[0], y + at[1]) for x, y in corners]
    artist: Any
    if isinstance(shape, Stroke):
        # Matplotlib scales the lengths of dashes by the width of the line.
        dash = (0, [part / shape.width for part in shape.dash]) if shape.dash else "solid"
        xs, ys = zip(*placed, strict=True)
        artist = Line2D(xs, ys, color=colour, linewidth=shape.width * PT_PER_PX, linestyle=dash)
    elif isinstance(shape, Area):
        artist = Polygon(placed, color=colour, alpha=0.13, linewidth=0)
    else:
        fill = colour if shape.is_filled else colours["paper"]
        artist = Polygon(
            placed, facecolor=fill, edgecolor=colour, linewidth=1.4 * PT_PER_PX, zorder=4
        )
    # plot and fill would measure every shape again to scale axes that are not shown.
    axes.add_artist(artist)


def _write(axes: Any, label: Label, colour: str, at: tuple[float, float]) -> None:
    from matplotlib.patheffects import withStroke

    axes.text(
        label.at[0] + at[0],
        label.at[1] + at[1],
        label.text,
        # Slightly smaller than on the page, since matplotlib's font is wider than most.
        fontsize=0.94 * TEXT_PX * PT_PER_PX,
        color=colour,
        ha={"start": "left", "middle": "center", "end": "right"}[label.anchor],
        fontweight="bold" if label.is_bold else "normal",
        # A white outline around letters, so that lines do not run through them.
        path_effects=[withStroke(linewidth=2.0, foreground="white")],
        # A name from a recipe may contain dollar signs, which would begin a formula.
        parse_math=False,
    )
