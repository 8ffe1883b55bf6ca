"""Charts of what was forgotten and learned over the run, one for each source and each score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bigmix.commands.compare.charts.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LINE_PX,
    TOP,
    WIDTH,
    Axes,
    number_ticks,
    range_of,
    spread,
)
from bigmix.commands.compare.charts.styles import MAX_NAMED, Style, styles_of
from bigmix.commands.compare.charts.svg import Area, Label, Mark, Scene, Shape, Stroke, width_of
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.measures import (
    BEHAVIOUR,
    BEHAVIOUR_MEASURES,
    FORGETTING,
    INSTRUCTIONS,
    LOSS,
    SENTENCES,
    Evaluation,
    spread_of,
)
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import BASE
from bigmix.evaluation.bootstrap import Estimate
from bigmix.terminal import short

_DRAWN_OF_BEHAVIOUR = (FORGETTING, INSTRUCTIONS, SENTENCES)
Pick = Callable[[Evaluation], Estimate | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """The mean over seeds at one evaluation, after `step` steps.

    `low` and `high` are the lowest and the highest seed, or the interval of a single run.
    """

    x: float
    y: float
    low: float | None
    high: float | None
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One point of the comparison over the run."""

    style: Style
    dots: Sequence[Dot]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePanel:
    """The curves of one quantity; `base_y` is its value for the base, None where it is unknown.

    Panels that are on one scale have `is_on_common_scale`.
    """

    title: str
    curves: Sequence[Curve]
    base_y: float | None
    is_on_common_scale: bool = False


def is_over_tokens(comparison: Comparison) -> bool:
    """Whether the curves are drawn over task tokens and not over steps."""
    return any(run.task_tokens for run in comparison.runs)


def curve_scenes(comparison: Comparison) -> list[Scene]:
    """Behaviour, then the forgetting of each replay source, all on one scale, then the loss of each
    task source, then the scores of tasks.
    """
    by_tokens = is_over_tokens(comparison)
    panels = [panel for panel in _panels(comparison) if panel.curves]
    forgotten = [panel for panel in panels if panel.is_on_common_scale]
    together = range_of([v for panel in forgotten for v in _heights(panel)]) if forgotten else None
    last_x = max((d.x for p in panels for c in p.curves for d in c.dots), default=1.0)
    return [
        _scene(
            panel,
            x_range=(0.0, last_x),
            y_range=together if together and panel in forgotten else range_of(_heights(panel)),
            x_label="task tokens trained" if by_tokens else "steps",
        )
        for panel in panels
    ]


def _heights(panel: CurvePanel) -> list[float]:
    dots = [dot for curve in panel.curves for dot in curve.dots]
    known = [v for dot in dots for v in (dot.y, dot.low, dot.high) if v is not None]
    return [*known, *([] if panel.base_y is None else [panel.base_y])]


def _panels(comparison: Comparison) -> Iterator[CurvePanel]:
    for measure in BEHAVIOUR_MEASURES:
        if measure.key in _DRAWN_OF_BEHAVIOUR:
            base = comparison.base_behaviour.get(measure.key)
            yield CurvePanel(
                title=f"{BEHAVIOUR}: {measure.label}",
                curves=_curves(comparison, _of_behaviour(measure.key)),
                base_y=base.value if base else None,
            )
    for source in comparison.replays:
        yield CurvePanel(
            title=f"{source}: forgetting",
            curves=_curves(comparison, _of_source(source, FORGETTING)),
            base_y=0.0,
            is_on_common_scale=True,
        )
    for source in comparison.tasks:
        yield CurvePanel(
            title=f"{source}: held-out loss (task)",
            curves=_curves(comparison, _of_source(source, LOSS)),
            base_y=comparison.base[source][LOSS].value,
        )
    for task, scores in comparison.scores.items():
        for score in scores:
            base = comparison.base_tasks.get(task, {}).get(score)
            yield CurvePanel(
                title=f"{task}: {score.replace('_', ' ')}",
                curves=_curves(comparison, _of_task(task, score)),
                base_y=base.value if base else None,
            )


def _of_behaviour(measure: str) -> Pick:
    return lambda evaluation: evaluation.behaviour.get(measure)


def _of_source(source: str, measure: str) -> Pick:
    return lambda evaluation: evaluation.sources.get(source, {}).get(measure)


def _of_task(task: str, score: str) -> Pick:
    return lambda evaluation: evaluation.tasks.get(task, {}).get(score)


def _curves(comparison: Comparison, pick: Pick) -> list[Curve]:
    by_tokens = is_over_tokens(comparison)
    styles = styles_of(comparison)
    drawn = []
    for point in comparison.points:
        # A model that was evaluated outside of a run has no evaluations on the way.
        dots = [] if point.runs[0].model else list(_dots(point, pick, by_tokens=by_tokens))
        if len(comparison.points) > MAX_NAMED and len(point.runs) == 1:
            # Many wide bands on top of each other would hide the lines.
            dots = [replace(dot, low=None, high=None) for dot in dots]
        if len(dots) > 1:
            drawn.append(Curve(style=styles[point.name], dots=dots))
    return drawn


def _dots(point: RunPoint, pick: Pick, *, by_tokens: bool) -> Iterator[Dot]:
    for evaluations in point.shared_steps():
        found = [estimate for e in evaluations if (estimate := pick(e)) is not None]
        if len(found) < len(evaluations):
            continue
        value = spread_of(found)
        xs = [float((e.task_tokens or 0) if by_tokens else e.step) for e in evaluations]
        own = value.interval or (None, None)
        low, high = (min(value.values), max(value.values)) if len(found) > 1 else own
        yield Dot(x=sum(xs) / len(xs), y=value.mean, low=low, high=high, step=evaluations[0].step)


def _scene(
    panel: CurvePanel, *, x_range: tuple[float, float], y_range: tuple[float, float], x_label: str
) -> Scene:
    is_named = len(panel.curves) <= MAX_NAMED
    widest = (
        max(width_of(_end_label(curve), is_bold=True) for curve in panel.curves)
        if is_named
        else 0.0
    )
    right = WIDTH - max(40.0, widest + 12)
    axes = Axes(x_range=x_range, y_range=y_range, right=right, bottom=HEIGHT - BOTTOM)
    shapes: list[Shape] = [*axes.frame(x_label=x_label, x_ticks=number_ticks(*x_range))]
    if panel.base_y is not None:
        y = axes.y(panel.base_y)
        shapes.append(Stroke(points=[(LEFT, y), (right, y)], colour="soft", dash=(3, 3)))
    shapes += [shape for curve in panel.curves for shape in _band(axes, curve)]
    shapes += [_line(axes, curve) for curve in panel.curves]
    shapes += _ends(axes, panel) if is_named else _base_label(axes, panel)
    # Marks come last, so that a tip is drawn over all curves.
    shapes += [mark for curve in panel.curves for mark in _marks(axes, curve, every=is_named)]
    return Scene(title=panel.title, width=WIDTH, height=HEIGHT, shapes=shapes)


def _band(axes: Axes, curve: Curve) -> Iterator[Area]:
    known = [(d.x, d.low, d.high) for d in curve.dots if d.low is not None and d.high is not None]
    if known:
        upper = [(axes.x(x), axes.y(high)) for x, _, high in known]
        lower = [(axes.x(x), axes.y(low)) for x, low, _ in reversed(known)]
        yield Area(points=[*upper, *lower], colour=curve.style.key)


def _line(axes: Axes, curve: Curve) -> Stroke:
    return Stroke(
        points=[(axes.x(dot.x), axes.y(dot.y)) for dot in curve.dots],
        colour=curve.style.key,
        width=2.0,
        dash=curve.style.dash,
    )


def _marks(axes: Axes, curve: Curve, *, every: bool) -> Iterator[Mark]:
    for dot in curve.dots if every else curve.dots[-1:]:
        is_last = dot is curve.dots[-1]
        yield Mark(
            at=(axes.x(dot.x), axes.y(dot.y)),
            shape=curve.style.shape if is_last else "circle",
            colour=curve.style.key,
            size=4.0 if is_last else 2.6,
            tip=(
                f"{curve.style.name} {dot.y:.3f}",
                f"step {dot.step:,}, {short(dot.x, billion='B')}",
            ),
        )


def _end_label(curve: Curve) -> str:
    return f"{curve.style.label} {curve.dots[-1].y:.2f}"


def _ends(axes: Axes, panel: CurvePanel) -> Iterator[Label]:
    """The names of curves at their right ends, moved apart."""
    texts = [(_end_label(c), c.style.key, axes.y(c.dots[-1].y)) for c in panel.curves]
    if panel.base_y is not None:
        texts.append((_base_text(panel.base_y), "soft", axes.y(panel.base_y)))
    places = spread([y for _, _, y in texts], LINE_PX, TOP, axes.bottom)
    for (text, colour, _), y in zip(texts, places, strict=True):
        yield Label(at=(axes.right + 8, y + 4), text=text, colour=colour, is_bold=colour != "soft")


def _base_label(axes: Axes, panel: CurvePanel) -> Iterator[Label]:
    if panel.base_y is not None:
        yield Label(at=(axes.right + 8, axes.y(panel.base_y) + 4), text=BASE)


def _base_text(base_y: float) -> str:
    return BASE if base_y == 0 else f"{BASE} {base_y:.2f}"
