"""Axes on a canvas, round ticks, and places for labels so that they do not collide.

Letters: C candidate boxes, N boxes that are taken; 4 and 2 are coordinates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.commands.compare.charts.svg import TEXT_PX, XY, Label, Shape, Stroke, width_of
from bigmix.terminal import short
from bigmix.types import Floats

LINE_PX = 15  # between two labels
WIDTH, HEIGHT = 420, 300
LEFT, TOP, BOTTOM = 46, 14, 42

Box = tuple[float, float, float, float]  # left, top, right, bottom
Range = tuple[float, float]


def _identity(value: float) -> float:
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
    """How data is mapped onto the canvas.

    `bend` is applied to x first, such as a logarithm for a logarithmic axis.
    """

    x_range: Range
    y_range: Range
    right: float
    bottom: float
    bend: Callable[[float], float] = _identity

    def x(self, value: float) -> float:
        """The pixel of a value on the horizontal axis."""
        low, high = (self.bend(end) for end in self.x_range)
        return LEFT + (self.bend(value) - low) / (high - low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        """The pixel of a value on the vertical axis."""
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - TOP)

    def frame(self, *, x_label: str, x_ticks: Sequence[tuple[float, str]]) -> Iterator[Shape]:
        """The grid, the ticks and the label of x; the title of a chart says what y is."""
        for value in ticks(*self.y_range, 5):
            y = self.y(value)
            yield Stroke(points=[(LEFT, y), (self.right, y)], colour="line")
            yield Label(at=(LEFT - 7, y + 4), text=f"{value:.3g}".replace("-", "−"), anchor="end")
        yield Stroke(points=[(LEFT, self.bottom), (self.right, self.bottom)], colour="soft")
        taken = -math.inf
        for value, text in x_ticks:
            x, half = self.x(value), width_of(text) / 2
            if x - half > taken + 4:
                yield Label(at=(x, self.bottom + 17), text=text, anchor="middle")
                taken = x + half
        middle = (LEFT + self.right) / 2
        yield Label(at=(middle, self.bottom + 36), text=x_label, anchor="middle")


def share_axes(smallest: float, largest: float, y_range: Range) -> Axes:
    """Axes for values over replay's share. x is logarithmic from about the smallest share on and
    linear below it, so that 0 is on the axis too.
    """
    return Axes(
        x_range=(0.0, largest),
        y_range=y_range,
        right=WIDTH - 16,
        bottom=HEIGHT - BOTTOM,
        bend=lambda share: math.log1p(2 * share / smallest),
    )


def range_of(values: Sequence[float], margin: float = 0.06) -> Range:
    """The range of the values, wider by `margin` times itself on either side."""
    low, high = min(values), max(values)
    space = margin * (high - low) or 0.5
    return low - space, high + space


def number_ticks(low: float, high: float, count: int = 4) -> list[tuple[float, str]]:
    """About `count` round numbers from low to high, with their labels."""
    return [(value, short(value, billion="B")) for value in ticks(low, high, count)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high: 0.1, 0.2, 0.25 or 0.5 times a power of ten
    apart.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions of labels near the wanted ones, at least `gap` apart, and within low..high where
    there is room for all.

    >>> spread([10.0, 11.0], 4.0, 0.0, 100.0)
    [10.0, 14.0]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = dict.fromkeys(order, 0.0)
    floor = low
    for index in order:
        placed[index] = max(wanted[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return [placed[index] for index in range(len(wanted))]


def place_labels(
    labels: Sequence[tuple[XY, float]], obstacles: Sequence[Box], bounds: Box
) -> list[XY]:
    """The left end of the base line of each label: next to its point, where it covers as little as
    possible of other labels and of obstacles.

    A label is given as the position of its point and its width.
    """
    taken_N4 = np.array([*obstacles]).reshape(-1, 4)
    bounds_N4 = np.array([bounds])
    placed = []
    for at, width in labels:
        boxes_C4 = np.array([*_around(at, width)])
        area = width * (TEXT_PX + 2)
        outside_C = area - _common(boxes_C4, bounds_N4).sum(1)
        # The area outside of the canvas counts 20 times; of equal candidates the first one wins.
        costs_C = _common(boxes_C4, taken_N4).sum(1) + 20 * outside_C + np.arange(len(boxes_C4))
        box_4 = boxes_C4[int(np.argmin(costs_C))]
        taken_N4 = np.vstack([taken_N4, box_4])
        placed.append((float(box_4[0]), float(box_4[3]) - 3))
    return placed


def _around(at: XY, width: float) -> Iterator[Box]:
    """Candidate boxes around a point, the preferred ones first: near before far, right before
    left.
    """
    x, y = at
    for away in (8, 18, 30):
        for right, down in ((1, 0), (1, -1), (1, 1), (-1, 0), (-1, -1), (-1, 1), (0, -1), (0, 1)):
            # A label straight above or below its point is centred.
            left = x - width / 2 if right == 0 else x + away if right > 0 else x - away - width
            middle = y + down * (away + (4 if right == 0 else 0))
            yield left, middle - TEXT_PX / 2 - 1, left + width, middle + TEXT_PX / 2 + 1


def _common(ones_C4: Floats, others_N4: Floats) -> Floats:
    """The area that each of the candidates shares with each of the others [C, N]."""
    low_CN2 = np.maximum(ones_C4[:, None, :2], others_N4[None, :, :2])
    high_CN2 = np.minimum(ones_C4[:, None, 2:], others_N4[None, :, 2:])
    shared: Floats = np.maximum(high_CN2 - low_CN2, 0.0).prod(2)
    return shared
