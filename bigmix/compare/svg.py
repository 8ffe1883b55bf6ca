"""A panel goes in, an inline SVG comes out: no script, no outside file; a point shows its numbers when pointed at."""

from collections.abc import Iterator
from html import escape

from bigmix.compare.chart import Curve, Panel, Point, base_label, end_label, short, spread, ticks

WIDTH, HEIGHT = 460, 300
LEFT, TOP, BOTTOM = 46, 14, 42
LETTER = 7.2  # width of a letter of a label, so that the longest finds its place
LABEL_GAP = 15


def draw_svg(panel: Panel) -> str:
    """The panel as an `<svg>` element; its colours of text and lines come from the page's style."""
    return "\n".join(_Frame(panel).draw())


class _Frame:
    """The panel on its canvas: the ranges of the data against those of the drawing."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel
        letters = max(len(end_label(curve)) for curve in panel.curves)
        self.right = WIDTH - max(60.0, letters * LETTER + 14)
        self.bottom = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        low, high = self.panel.x_range
        return LEFT + (value - low) / (high - low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high = self.panel.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - TOP)

    def draw(self) -> Iterator[str]:
        title = escape(self.panel.title)
        yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        yield from self._axes()
        for curve in self.panel.curves:
            yield from self._band(curve)
        for curve in self.panel.curves:
            yield self._line(curve)
        yield from self._end_labels()
        # Last, so that a tip lies over all curves.
        for curve in self.panel.curves:
            yield from (self._point(curve, point) for point in curve.points)
        yield "</svg>"

    def _axes(self) -> Iterator[str]:
        for value in ticks(*self.panel.y_range, 5):
            y = self.y(value)
            yield f'<line class="grid" x1="{LEFT}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        yield f'<line class="axis" x1="{LEFT}" x2="{self.right:.1f}" y1="{self.bottom}" y2="{self.bottom}"/>'
        for value in ticks(*self.panel.x_range, 4):
            x = self.x(value)
            yield f'<text class="tick" x="{x:.1f}" y="{self.bottom + 17}" text-anchor="middle">{short(value)}</text>'
        middle = (LEFT + self.right) / 2
        yield (
            f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(self.panel.x_label)}</text>"
        )
        y = self.y(self.panel.base_y)
        yield f'<line class="base" x1="{LEFT}" x2="{self.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'

    def _band(self, curve: Curve) -> Iterator[str]:
        known = [
            (p.x, p.low, p.high) for p in curve.points if p.low is not None and p.high is not None
        ]
        if known:
            upper = [f"{self.x(x):.1f},{self.y(high):.1f}" for x, _, high in known]
            lower = [f"{self.x(x):.1f},{self.y(low):.1f}" for x, low, _ in reversed(known)]
            yield f'<polygon points="{" ".join(upper + lower)}" fill="{curve.colour}" opacity=".15"/>'

    def _line(self, curve: Curve) -> str:
        points = " ".join(f"{self.x(p.x):.1f},{self.y(p.y):.1f}" for p in curve.points)
        dash = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        return f'<polyline class="curve" points="{points}" stroke="{curve.colour}"{dash}/>'

    def _end_labels(self) -> Iterator[str]:
        wanted = [self.y(curve.points[-1].y) for curve in self.panel.curves]
        places = spread([*wanted, self.y(self.panel.base_y)], LABEL_GAP, TOP, self.bottom)
        x = self.right + 8
        for curve, y in zip(self.panel.curves, places, strict=False):
            yield (
                f'<text class="end" x="{x:.1f}" y="{y + 4:.1f}" fill="{curve.colour}">'
                f"{escape(end_label(curve))}</text>"
            )
        yield f'<text class="tick" x="{x:.1f}" y="{places[-1] + 4:.1f}">{base_label(self.panel)}</text>'

    def _point(self, curve: Curve, point: Point) -> str:
        x, y = self.x(point.x), self.y(point.y)
        anchor, shift = ("start", 8) if x < WIDTH / 2 else ("end", -8)
        # Above the point, or below it where the top of the canvas is near.
        tip_y = y - 22 if y > 50 else y + 18
        lines = (f"{curve.name} {point.y:.3f}", f"step {point.step:,}, {short(point.x)}")
        tips = "".join(
            f'<text class="tip" x="{x + shift:.1f}" y="{tip_y + 14 * index:.1f}" text-anchor="{anchor}">'
            f"{escape(line)}</text>"
            for index, line in enumerate(lines)
        )
        return (
            f'<g class="point" tabindex="0"><circle class="reach" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>{tips}</g>'
        )
