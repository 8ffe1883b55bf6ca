"""The chart of a fitted law over replay's share, and the texts and the table that say how good the
fit is.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from bigmix.commands.compare.charts.axes import HEIGHT, TOP, WIDTH, Axes, range_of, share_axes
from bigmix.commands.compare.charts.styles import styles_of
from bigmix.commands.compare.charts.svg import Label, Mark, Scene, Shape, Stroke
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.law import Fit, Law, Prediction, fit_law
from bigmix.commands.compare.measures import FORGETTING, Spread
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import ABSENT
from bigmix.terminal import share_percent


def law_scenes(comparison: Comparison) -> list[Scene]:
    """A chart for each replay source that has a law."""
    return [
        _scene(comparison, source, fit)
        for source, fit in comparison.fits.items()
        if isinstance(fit, Fit)
    ]


def _scene(comparison: Comparison, source: str, fit: Fit) -> Scene:
    measured = [
        (point, spread)
        for point in comparison.arrangement.main
        if (spread := point.source(source, FORGETTING)) is not None and point.share is not None
    ]
    smallest, largest = fit.points[1].share, max(point.share or 0.0 for point, _ in measured)
    heights = [v for _, spread in measured for v in (spread.mean, *(spread.interval or ()))]
    axes = share_axes(smallest, largest, range_of([0.0, *heights]))
    named = [(point.share or 0.0, share_percent(point.written_share)) for point, _ in measured]
    shapes: list[Shape] = [*axes.frame(x_label="replay's share of the rows, p", x_ticks=named)]
    if fit.from_smallest:
        by_two = fit_law(fit.law.at_zero, fit.points[1:3])
        shapes.append(_curve(axes, by_two, largest, colour="soft", dash=(3, 3)))
    shapes.append(_curve(axes, fit.law, largest, colour="ink", dash=()))
    shapes.append(
        Label(at=(axes.right, TOP + 10), text=formula(fit.law), colour="ink", anchor="end")
    )
    if fit.from_smallest:
        note = "dashed: from the two smallest shares alone"
        shapes.append(Label(at=(axes.right, TOP + 27), text=note, anchor="end"))
    shapes += _measured(comparison, axes, measured)
    return Scene(
        title=f"{source}: forgetting over replay's share", width=WIDTH, height=HEIGHT, shapes=shapes
    )


def _curve(axes: Axes, law: Law, largest: float, *, colour: str, dash: tuple[float, ...]) -> Stroke:
    bent = np.linspace(0.0, axes.bend(largest), 80)
    # The axis is bent by log1p(c share); the inverse spreads the samples evenly over it.
    scale = math.expm1(axes.bend(largest)) / largest
    shares = [float(share) for share in np.expm1(bent) / scale]
    points = [(axes.x(share), axes.y(law.predict(share))) for share in shares]
    return Stroke(points=points, colour=colour, width=1.6, dash=dash)


def _measured(
    comparison: Comparison, axes: Axes, measured: Sequence[tuple[RunPoint, Spread]]
) -> Iterator[Shape]:
    styles = styles_of(comparison)
    for point, spread in measured:
        style, x = styles[point.name], axes.x(point.share or 0.0)
        if spread.interval:
            low, high = (axes.y(end) for end in spread.interval)
            yield Stroke(points=[(x, low), (x, high)], colour=style.key, width=1.4)
        tip = (point.name, f"forgetting {spread.mean:.3f}")
        yield Mark(
            at=(x, axes.y(spread.mean)), shape=style.shape, colour=style.key, size=4.5, tip=tip
        )


def formula(law: Law) -> str:
    """The law with its constants, as a text."""
    return f"{law.at_zero:.3f} / (1 + {law.B:.3g} p)^{law.alpha:.3g}"


def law_sentences(source: str, fit: Fit | str) -> list[str]:
    """What was fitted to which points, or why nothing was."""
    if isinstance(fit, str):
        return [fit]
    sentences = [
        f"Forgetting of {source} is {formula(fit.law)}, with p replay's part of all rows that were"
        " trained; forgetting at p = 0 is as measured, the other two constants are fitted to"
        f" {len(fit.points) - 1} shares by least squares on the logarithm, weighted by the spread"
        " over seeds."
    ]
    if not fit.from_smallest:
        sentences.append("Two shares fix both constants, so nothing is left to test the law on.")
    if fit.passed_over:
        shares = ", ".join(share_percent(share) for share in fit.passed_over)
        sentences.append(f"Left out of the fit, as nothing was forgotten there: {shares}.")
    return sentences


LAW_HEADS = (
    "measured",
    "law",
    "predicted from the other shares",
    "predicted from the two smallest",
)


def law_rows(fit: Fit) -> list[tuple[str, list[str]]]:
    """Of each share what was measured, what the law says, and the predictions of fits without that
    share.
    """
    others = {prediction.share: prediction for prediction in fit.leave_one_out}
    smallest = {prediction.share: prediction for prediction in fit.from_smallest}
    return [
        (
            share_percent(point.share),
            [
                f"{point.forgetting:.3f}",
                f"{fit.law.predict(point.share):.3f}",
                _predicted(others.get(point.share)),
                _predicted(smallest.get(point.share)),
            ],
        )
        for point in fit.points
    ]


def _predicted(prediction: Prediction | None) -> str:
    if prediction is None:
        return ABSENT
    return f"{prediction.predicted:.3f} ({100 * prediction.error:+.0f} %)".replace("-", "−")
