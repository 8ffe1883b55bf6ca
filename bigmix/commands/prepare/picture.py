"""Draws the statistics of a prepared source: the lengths of documents, and how much of each chat is
learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.data.shards.manifest import LOSS_BINS, TURN_BINS, Manifest, Statistics
from bigmix.errors import BadInput
from bigmix.terminal import short_binary

INK, GREY, FAINT, BLUE = "#1b1f24", "#6b7280", "#e6e8eb", "#3b6fb6"
PANEL_INCHES = (4.8, 3.0)
DPI = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class _Panel:
    """A bar chart of shares that add up to 100 %, with the label of its axis."""

    title: str
    axis: str
    labels: Sequence[str]
    counts: Sequence[int]


def draw(manifest: Manifest, *, title: str, path: Path) -> None:
    """Write the picture of a source as PNG.

    Raises BadInput where its manifest has no statistics.
    """
    if manifest.statistics is None:
        raise BadInput(f"{title} has no statistics to draw; prepare the source again")
    # Matplotlib takes a second to import, and most calls of `bigmix prepare` draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(manifest.kind == "chat", manifest.statistics)
    num_lines = len(panels) // 2
    size = (2 * PANEL_INCHES[0], num_lines * PANEL_INCHES[1] + 0.5)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    figure.suptitle(
        f"{title}: {counts}", x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    for place, panel in enumerate(panels, 1):
        _bars(figure.add_subplot(num_lines, 2, place), panel)
    figure.savefig(path)


def _panels(is_chat: bool, found: Statistics) -> Sequence[_Panel]:
    by_length = found.documents_by_length
    low, high = _used(by_length)
    names = [short_binary(1 << k) for k in range(low, high)]
    axis = "tokens of the document, from"
    panels = [
        _Panel(title="documents", axis=axis, labels=names, counts=by_length[low:high]),
        _Panel(title="tokens", axis=axis, labels=names, counts=found.tokens_by_length[low:high]),
    ]
    if is_chat:
        tenths = [f"{100 * k // LOSS_BINS}" for k in range(LOSS_BINS)]
        end = _used(found.documents_by_turns)[1]
        turns = [f"{k}+" if k == TURN_BINS - 1 else f"{k}" for k in range(1, end)]
        axis = "% of the tokens that are learned, from"
        panels += [
            _Panel(title="chats", axis=axis, labels=tenths, counts=found.documents_by_loss),
            _Panel(
                title="chats", axis="turns", labels=turns, counts=found.documents_by_turns[1:end]
            ),
        ]
    return panels


def _used(counts: Sequence[int]) -> tuple[int, int]:
    """The first bin that is not empty, and the one after the last."""
    filled = [k for k, count in enumerate(counts) if count]
    return filled[0], filled[-1] + 1


def _bars(axes: Any, panel: _Panel) -> None:
    shares = [100 * count / sum(panel.counts) for count in panel.counts]
    places = range(len(shares))
    axes.bar(places, shares, width=0.86, color=BLUE)
    step = -(-len(shares) // 16)
    axes.set_xticks(places[::step], panel.labels[::step])
    margin = max(0, 6 - len(shares)) / 2  # a few bars are in the middle, no wider than others
    axes.set_xlim(-0.7 - margin, len(shares) - 0.3 + margin)
    axes.set_ylabel(f"% of the {panel.title}", fontsize=9, color=INK)
    axes.set_xlabel(panel.axis, fontsize=9, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=8.5, length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
