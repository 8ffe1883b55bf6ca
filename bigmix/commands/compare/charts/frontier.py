"""Frontiers: charts of each loss and score of a task against what was forgotten."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.charts.axes import (
    BOTTOM,
    TOP,
    WIDTH,
    Axes,
    Box,
    number_ticks,
    place_labels,
    range_of,
)
from bigmix.commands.compare.charts.styles import Style, styles_of
from bigmix.commands.compare.charts.svg import (
    TEXT_PX,
    XY,
    Label,
    Mark,
    Scene,
    Shape,
    Stroke,
    width_of,
)
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.measures import BEHAVIOUR, FORGETTING, LOSS, Better, Spread
from bigmix.commands.compare.points import RunPoint

HEIGHT = 330
_FAR_PX = 14  # from here on a label has a line to its point, since others may be nearer to it
LEAST_POINTS = 3  # any two points are on one line


@dataclass(frozen=True, kw_only=True, slots=True)
class Spot:
    """A point on a frontier.

    It is dominated where another point is at least as good in both the task and forgetting, and
    better in one of them.
    """

    point: RunPoint
    task: Spread
    forgetting: Spread
    is_dominated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """All points by one measure of a task and by what they forgot of the source `replay`, or of
    behaviour.
    """

    title: str
    x_label: str
    better: Better
    replay: str
    spots: Sequence[Spot]


def frontiers(comparison: Comparison) -> list[Frontier]:
    """Frontiers for the loss of each task source and for each score of each task, where three
    points or more have it: against forgetting of the judged source, and of behaviour.
    """
    forgotten = [name for name in (comparison.judged, BEHAVIOUR) if name is not None]
    found = [
        _frontier(comparison.points, replay, measured)
        for measured in _measured(comparison)
        for replay in forgotten
    ]
    return [frontier for frontier in found if len(frontier.spots) >= LEAST_POINTS]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """One measure of a task for each point, by the name of the point."""

    title: str
    x_label: str
    better: Better
    spreads: Mapping[str, Spread | None]


def _measured(comparison: Comparison) -> Iterator[_Measured]:
    for source in comparison.tasks:
        yield _Measured(
            title=source,
            x_label="task loss, nats/token",
            better="lower",
            spreads={point.name: point.source(source, LOSS) for point in comparison.points},
        )
    for task, scores in comparison.scores.items():
        for score in scores:
            label = score.replace("_", " ")
            yield _Measured(
                title=f"{task}, {label}",
                x_label=label,
                better="higher",
                spreads={point.name: point.task(task, score) for point in comparison.points},
            )


def _frontier(points: Sequence[RunPoint], replay: str, measured: _Measured) -> Frontier:
    known = [
        (point, task, lost)
        for point in points
        if (task := measured.spreads[point.name]) is not None
        and (lost := _forgotten(point, replay)) is not None
    ]
    sign = 1.0 if measured.better == "lower" else -1.0
    costs = [(sign * task.mean, lost.mean) for _, task, lost in known]
    spots = [
        Spot(point=point, task=task, forgetting=lost, is_dominated=_is_dominated(cost, costs))
        for (point, task, lost), cost in zip(known, costs, strict=True)
    ]
    return Frontier(
        title=f"{measured.title} against forgetting of {replay}",
        x_label=measured.x_label,
        better=measured.better,
        replay=replay,
        spots=spots,
    )


def _forgotten(point: RunPoint, replay: str) -> Spread | None:
    return point.behaviour(FORGETTING) if replay == BEHAVIOUR else point.source(replay, FORGETTING)


def _is_dominated(cost: XY, others: Sequence[XY]) -> bool:
    """Whether another point costs no more in both; a cost is a value of which lower is better."""
    return any(o[0] <= cost[0] and o[1] <= cost[1] and o != cost for o in others)


def frontier_scene(comparison: Comparison, frontier: Frontier) -> Scene:
    """Marks with their intervals and names. Points of a line over the share are joined, and
    dominated points are hollow.
    """
    styles = styles_of(comparison)
    spots = {spot.point.name: spot for spot in frontier.spots}
    axes = Axes(
        x_range=range_of([v for spot in frontier.spots for v in _values(spot.task)], margin=0.12),
        y_range=range_of([v for spot in frontier.spots for v in _values(spot.forgetting)]),
        right=WIDTH - 12,
        bottom=HEIGHT - BOTTOM,
    )
    shapes: list[Shape] = [
        *axes.frame(x_label=frontier.x_label, x_ticks=number_ticks(*axes.x_range)),
        _better(axes, frontier),
    ]
    for line in comparison.arrangement.lines:
        joined = [spots[point.name] for point in line.points if point.name in spots]
        if len(joined) > 1:
            style = styles[joined[-1].point.name]
            shapes.append(
                Stroke(
                    points=[_at(axes, s) for s in joined], colour="soft", width=1.3, dash=style.dash
                )
            )
    for spot in frontier.spots:
        shapes += _bars(axes, spot, styles[spot.point.name].key)
    shapes += _labels(axes, frontier, styles)
    shapes += [_mark(axes, spot, styles[spot.point.name]) for spot in frontier.spots]
    return Scene(title=frontier.title, width=WIDTH, height=HEIGHT, shapes=shapes)


def _values(spread: Spread) -> tuple[float, ...]:
    return (spread.mean, *(spread.interval or ()))


def _at(axes: Axes, spot: Spot) -> XY:
    return axes.x(spot.task.mean), axes.y(spot.forgetting.mean)


def _better(axes: Axes, frontier: Frontier) -> Label:
    """A note in the corner of the better values."""
    if frontier.better == "lower":
        return Label(at=(axes.x(axes.x_range[0]) + 4, axes.bottom - 6), text="↙ better")
    return Label(at=(axes.right - 2, axes.bottom - 6), text="better ↘", anchor="end")


def _bars(axes: Axes, spot: Spot, colour: str) -> Iterator[Stroke]:
    x, y = _at(axes, spot)
    if spot.task.interval:
        ends = [axes.x(end) for end in spot.task.interval]
        yield Stroke(points=[(ends[0], y), (ends[1], y)], colour=colour)
    if spot.forgetting.interval:
        ends = [axes.y(end) for end in spot.forgetting.interval]
        yield Stroke(points=[(x, ends[0]), (x, ends[1])], colour=colour)


def _labels(axes: Axes, frontier: Frontier, styles: Mapping[str, Style]) -> Iterator[Shape]:
    """Labels next to their points, with a thin line where they are far from them. Those of points
    that are not dominated are placed first.
    """
    spots = sorted(frontier.spots, key=lambda spot: spot.is_dominated)
    texts = [styles[spot.point.name].label for spot in spots]
    widths = [
        width_of(text, is_bold=not spot.is_dominated)
        for text, spot in zip(texts, spots, strict=True)
    ]
    points = [_at(axes, spot) for spot in spots]
    bounds = (axes.x(axes.x_range[0]), TOP - 8.0, float(WIDTH), axes.bottom)
    obstacles = [*_obstacles(axes, frontier), _box_of_better(axes, frontier)]
    places = place_labels([*zip(points, widths, strict=True)], obstacles, bounds)
    colours = [styles[spot.point.name].key for spot in spots]
    for at, (x, y), width, colour in zip(points, places, widths, colours, strict=True):
        end = _nearest(at, (x, y - TEXT_PX, x + width, y + 2))
        if math.dist(end, at) > _FAR_PX:
            yield Stroke(points=[at, end], colour=colour, width=0.7)
    for place, text, colour, spot in zip(places, texts, colours, spots, strict=True):
        yield Label(at=place, text=text, colour=colour, is_bold=not spot.is_dominated)


def _nearest(at: XY, box: Box) -> XY:
    """The position in a box that is nearest to a point."""
    left, top, right, bottom = box
    return min(max(at[0], left), right), min(max(at[1], top), bottom)


def _obstacles(axes: Axes, frontier: Frontier) -> Iterator[Box]:
    for spot in frontier.spots:
        x, y = _at(axes, spot)
        yield x - 6, y - 6, x + 6, y + 6
        for stroke in _bars(axes, spot, "soft"):
            (left, top), (right, bottom) = stroke.points
            yield left - 1, min(top, bottom) - 1, right + 1, max(top, bottom) + 1


def _box_of_better(axes: Axes, frontier: Frontier) -> Box:
    left = axes.x(axes.x_range[0]) if frontier.better == "lower" else axes.right - 64
    return left, axes.bottom - 20, left + 64, axes.bottom


def _mark(axes: Axes, spot: Spot, style: Style) -> Mark:
    return Mark(
        at=_at(axes, spot),
        shape=style.shape,
        colour=style.key,
        is_filled=not spot.is_dominated,
        size=4.5,
        tip=(
            spot.point.name,
            f"task {spot.task.mean:.3f}, forgetting {spot.forgetting.mean:.3f}",
            *(("dominated by another point",) if spot.is_dominated else ()),
        ),
    )
