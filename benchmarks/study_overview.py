"""A table and a picture of the studies of several tasks over replay's share."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from study_summary import Study
from table import Table

from bigmix.commands.compare.charts.axes import HEIGHT, LEFT, WIDTH, range_of, share_axes
from bigmix.commands.compare.charts.figure import draw_figure
from bigmix.commands.compare.charts.styles import Style
from bigmix.commands.compare.charts.svg import Mark, Scene, Shape, Stroke

_LOOKS = (
    ("#c2500a", "circle"),
    ("#0072b2", "square"),
    ("#1b8077", "triangle"),
    ("#a03c7c", "diamond"),
    ("#7a5a00", "wedge"),
)
_SMALLEST = 0.01  # share


def overview(studies: Sequence[Study]) -> Table:
    """A row for each task: what one-way training forgets, which part of that is left at each share,
    and how much the task loss rises at 25 %.
    """
    shares = sorted({share for study in studies for share in study.line() if share})
    return Table(
        heading=(
            "All tasks: forgetting one-way in nats/token, what each share leaves of it, task loss"
            " above one-way's"
        ),
        columns=("task", "one-way", *(f"{share:.0%}" for share in shares), "task loss, 25%"),
        rows=[_row(study, shares) for study in studies],
    )


def _row(study: Study, shares: Sequence[float]) -> Sequence[str]:
    left = {share: part for share, part, _ in _left(study)}
    rises = {share: rise for share, rise, _ in _rises(study)}
    one_way = study.forgetting(study.line()[0.0])["mean"]
    return (
        study.task,
        f"{one_way:.3f}",
        *(f"{left[share]:.0%}" if share in left else "-" for share in shares),
        f"{rises[0.25]:+.3f}" if 0.25 in rises else "-",
    )


# The share, the mean, and the standard deviation over seeds, which is 0 for one seed.
_Measured = tuple[float, float, float]


def _left(study: Study) -> Iterator[_Measured]:
    """Which part of the forgetting of one-way training is left at each share."""
    one_way = study.forgetting(study.line()[0.0])["mean"]
    for share, point in study.line().items():
        found = study.forgetting(point)
        yield share, found["mean"] / one_way, (found["deviation"] or 0.0) / one_way


def _rises(study: Study) -> Iterator[_Measured]:
    """How much the task loss is above that of one-way training at each share."""
    one_way = study.loss(study.line()[0.0])["mean"]
    for share, point in study.line().items():
        found = study.loss(point)
        yield share, found["mean"] - one_way, found["deviation"] or 0.0


def draw_overview(studies: Sequence[Study], path: Path) -> None:
    """Two charts side by side: what is left of forgetting, and what that costs the task."""
    styles = {
        study.task: Style(
            key=f"t{index}",
            light=colour,
            dark=colour,
            shape=shape,
            dash=(),
            label=study.task,
            name=study.task,
        )
        for index, (study, (colour, shape)) in enumerate(zip(studies, cycle(_LOOKS), strict=False))
    }
    left = [[(share, 100 * part, 100 * d) for share, part, d in _left(study)] for study in studies]
    costs = [list(_rises(study)) for study in studies]
    named = list(styles.values())
    scenes = [
        _scene("forgetting, % of one-way training's", left, named),
        _scene("task loss above one-way training's, nats/token", costs, named),
    ]
    draw_figure(scenes, styles, path, with_legend=True)


def _scene(title: str, curves: Sequence[Sequence[_Measured]], styles: Sequence[Style]) -> Scene:
    heights = [height + sign * d for curve in curves for _, height, d in curve for sign in (-1, 1)]
    shares = sorted({share for curve in curves for share, _, _ in curve})
    low, high = range_of([0.0, *heights])
    axes = share_axes(_SMALLEST, shares[-1], (low if min(heights) < 0 else 0.0, high))
    ticks = [(share, f"{share:.0%}") for share in shares]
    shapes: list[Shape] = [*axes.frame(x_label="replay's share of the rows", x_ticks=ticks)]
    zero = axes.y(0.0)
    shapes.append(Stroke(points=[(LEFT, zero), (axes.right, zero)], colour="soft"))
    for curve, style in zip(curves, styles, strict=True):
        points = [(axes.x(share), axes.y(height)) for share, height, _ in curve]
        shapes.append(Stroke(points=points, colour=style.key, width=1.6))
        for (x, y), (_, height, deviation) in zip(points, curve, strict=True):
            ends = [(x, axes.y(height + sign * deviation)) for sign in (-1, 1)]
            shapes.append(Stroke(points=ends, colour=style.key, width=1.4))
            shapes.append(Mark(at=(x, y), shape=style.shape, colour=style.key, size=4.5))
    return Scene(title=title, width=WIDTH, height=HEIGHT, shapes=shapes)
