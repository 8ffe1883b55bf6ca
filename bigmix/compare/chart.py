"""A comparison goes in; out come panels of curves, which figure.py and svg.py draw alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bigmix.compare.judge import Comparison
from bigmix.compare.read import BASE, Evaluation, Run

# Okabe and Ito's colours, told apart by colour-blind readers: warm for one-way, cool for two-way.
_WARM = ("#d55e00", "#e69f00", "#cc79a7")
_COOL = ("#0072b2", "#009e73", "#56b4e9")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
MAX_NAME = 16  # letters


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One evaluation; x is task tokens, or steps where no task is trained. `low` and `high` bound y."""

    x: float
    y: float
    low: float | None
    high: float | None
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One run in one panel. `dash` holds lengths of strokes and gaps; empty: a solid line."""

    name: str
    colour: str
    dash: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One source. The base stands at `base_y`; `x_range` and `y_range` are what the axes show."""

    title: str
    y_label: str
    x_label: str
    curves: Sequence[Curve]
    base_y: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]


def panels(comparison: Comparison) -> list[Panel]:
    """Forgetting of each replay source, on one scale, then the held-out loss of each task source."""
    by_tokens = any(run.final.task_tokens for run in comparison.runs)
    curves = {
        source: _curves(comparison, source, by_tokens=by_tokens) for source in comparison.roles
    }
    forgotten = [curve for source in comparison.replays for curve in curves[source]]
    last_x = max(_x(run.final, by_tokens=by_tokens) for run in comparison.runs)
    drawn = []
    for source in [*comparison.replays, *comparison.tasks]:
        is_task = comparison.roles[source] == "task"
        base_y = comparison.base[source].loss if is_task else 0.0
        panel = Panel(
            title=f"{source}: {'held-out loss (task)' if is_task else 'forgetting'}",
            y_label="nats/token",
            x_label="task tokens trained" if by_tokens else "steps",
            curves=curves[source],
            base_y=base_y,
            x_range=(0.0, last_x),
            y_range=_y_range(curves[source] if is_task else forgotten, base_y),
        )
        drawn.append(panel)
    return drawn


def _curves(comparison: Comparison, source: str, *, by_tokens: bool) -> list[Curve]:
    is_task = comparison.roles[source] == "task"
    curves = []
    for run, (colour, dash) in zip(comparison.runs, _styles(comparison.runs), strict=True):
        points = _points(run, source, is_task=is_task, by_tokens=by_tokens)
        if points:
            curves.append(Curve(name=run.name, colour=colour, dash=dash, points=points))
    return curves


def _y_range(curves: Sequence[Curve], base_y: float) -> tuple[float, float]:
    """Over points, intervals and the base, with a margin of 6 %."""
    points = [point for curve in curves for point in curve.points]
    known = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    low, high = min(base_y, *known), max(base_y, *known)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _styles(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Colour by kind of run; further runs of a kind have dashes too, for readers who see no colour."""
    counts = {"one-way": 0, "two-way": 0}
    styles = []
    for run in runs:
        colours, index = _WARM if run.kind == "one-way" else _COOL, counts[run.kind]
        counts[run.kind] += 1
        styles.append((colours[index % len(colours)], _DASHES[index % len(_DASHES)]))
    return styles


def _points(run: Run, source: str, *, is_task: bool, by_tokens: bool) -> list[Point]:
    if source not in run.first.sources:
        return []
    # An interval is drawn on losses only: that of a difference is narrower, as both losses are of the same tokens.
    start = 0.0 if is_task else run.first.sources[source].loss
    return [
        Point(
            x=_x(evaluation, by_tokens=by_tokens),
            y=result.loss - start,
            low=result.interval[0] if is_task and result.interval else None,
            high=result.interval[1] if is_task and result.interval else None,
            step=evaluation.step,
        )
        for evaluation in run.evaluations
        if (result := evaluation.sources.get(source))
    ]


def _x(evaluation: Evaluation, *, by_tokens: bool) -> float:
    return float(evaluation.task_tokens if by_tokens else evaluation.step)


def end_label(curve: Curve) -> str:
    """What stands at a curve's end: name and last value; of a long name both ends, as runs differ in either."""
    name = curve.name
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME // 2]}…{name[-(MAX_NAME // 2 - 1) :]}"
    return f"{name} {curve.points[-1].y:.2f}"


def base_label(panel: Panel) -> str:
    """What stands at the line of the base."""
    return BASE if panel.base_y == 0 else f"{BASE} {panel.base_y:.2f}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high: 0.1, 0.2, 0.25 or 0.5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's label: 2500000 becomes 2.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions of labels near the wanted ones, at least `gap` apart and, where they fit, inside low..high.

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
