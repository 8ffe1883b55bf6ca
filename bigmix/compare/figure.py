"""Panels go in, figure.png comes out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmix.compare.chart import Curve, Panel, base_label, end_label, short, spread

DPI = 200
PANEL_INCHES = (4.4, 3.4)
MAX_COLUMNS = 3
INK, GREY = "#1b1f24", "#6b7280"


def draw_figure(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels side by side, three in a line at most; each curve is named at its end."""
    # Matplotlib takes a second to import, and no other command draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_columns = min(MAX_COLUMNS, len(panels)) or 1
    num_lines = -(-len(panels) // num_columns) or 1
    size = (PANEL_INCHES[0] * num_columns, PANEL_INCHES[1] * num_lines)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(num_lines, num_columns, place), panel)
    figure.savefig(path)


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(panel.x_label, fontsize=9, color=INK)
    axes.set_ylabel(panel.y_label, fontsize=9, color=INK)
    axes.set_xlim(*panel.x_range)
    axes.set_ylim(*panel.y_range)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8.5, color=GREY)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=4)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.axhline(panel.base_y, color=GREY, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    for curve in panel.curves:
        _draw_curve(axes, curve)
    _label_ends(axes, panel)


def _draw_curve(axes: Any, curve: Curve) -> None:
    x, y = [p.x for p in curve.points], [p.y for p in curve.points]
    dash = (0, tuple(float(part) / 2 for part in curve.dash.split())) if curve.dash else "solid"
    axes.plot(
        x,
        y,
        color=curve.colour,
        linewidth=1.9,
        linestyle=dash,
        clip_on=False,
        solid_capstyle="round",
    )
    axes.scatter(x[-1:], y[-1:], s=20, color=curve.colour, zorder=4, clip_on=False)
    known = [(p.x, p.low, p.high) for p in curve.points if p.low is not None]
    if known:
        axes.fill_between(*zip(*known, strict=True), color=curve.colour, alpha=0.15, linewidth=0)


def _label_ends(axes: Any, panel: Panel) -> None:
    """Names at the right, moved apart; a label is 5.5 % of the panel high."""
    low, high = panel.y_range
    ends = [curve.points[-1].y for curve in panel.curves]
    texts = [end_label(curve) for curve in panel.curves]
    colours = [curve.colour for curve in panel.curves]
    places = spread([*ends, panel.base_y], 0.065 * (high - low), low, high)
    for text, colour, place in zip(
        [*texts, base_label(panel)], [*colours, GREY], places, strict=True
    ):
        axes.annotate(
            text,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colour,
            annotation_clip=False,
        )
