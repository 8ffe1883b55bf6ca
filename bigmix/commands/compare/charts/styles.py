"""The colours and marks of points: an ordered scale for replay's share, other marks for the rest.

Each colour has a version for a light and one for a dark background, both with enough contrast. A
larger share differs more from the background, so that the order is visible without colours too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from bigmix.commands.compare.charts.svg import (
    REMEDY_SHAPES,
    Label,
    Mark,
    Scene,
    Shape,
    Stroke,
    width_of,
)
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.points import RunPoint
from bigmix.terminal import share_percent

ONE_WAY = ("#c2500a", "#ff9a57")
# Teal to deep blue on white, deep teal to pale blue on black; a single share has the middle one.
_SHARES = (("#1b8077", "#2a8f8c"), ("#0072b2", "#56a9e0"), ("#0d2f66", "#d5e6ff"))
_REMEDIES = (
    ("#a03c7c", "#e58fc4"),
    ("#7a5a00", "#d9b23c"),
    ("#5b4bb0", "#a99bf0"),
    ("#4d5661", "#b4bdc8"),
)
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 3), (8, 3, 2, 3))
MAX_NAMED = 6  # points that can be named at the ends of their curves
_MAX_NAME = 18  # letters
_MAX_IN_LEGEND = 48
_WORDS = re.compile(r"(?<=[-_/. ])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """How a point is drawn.

    `key` is the name of its colour, `label` a name that is short enough to be next to its mark.
    """

    key: str
    light: str
    dark: str
    shape: str
    dash: Sequence[float]
    label: str
    name: str


def styles_of(comparison: Comparison) -> dict[str, Style]:
    """The style of each point, by its name."""
    found = {}
    for index, (point, look) in enumerate(_looks(comparison)):
        (light, dark), shape, dash, label = look
        found[point.name] = Style(
            key=f"p{index}",
            light=light,
            dark=dark,
            shape=shape,
            dash=dash,
            label=label,
            name=point.name,
        )
    return found


_Look = tuple[tuple[str, str], str, Sequence[float], str]  # colours, shape, dash, label


def _looks(comparison: Comparison) -> Iterator[tuple[RunPoint, _Look]]:
    """The look of each point, those of lines over the share first."""
    is_sweep = len(comparison.points) > 2
    labels = labels_of([point.name for point in comparison.points])
    for number, line in enumerate(comparison.arrangement.lines):
        shape = "circle" if number == 0 else REMEDY_SHAPES[(number - 1) % len(REMEDY_SHAPES)]
        dash = _DASHES[number % len(_DASHES)]
        above = [point for point in line.points if point.kind == "two-way"]
        for point in line.points:
            is_two_way = point.kind == "two-way"
            colours = _of_share(above.index(point), len(above)) if is_two_way else ONE_WAY
            label = share_percent(point.written_share) if is_sweep else labels[point.name]
            yield point, (colours, shape, dash, label)
    for index, point in enumerate(comparison.arrangement.remedies):
        colours = _REMEDIES[index % len(_REMEDIES)]
        shape = REMEDY_SHAPES[index % len(REMEDY_SHAPES)]
        dash = _DASHES[1 + index % (len(_DASHES) - 1)]
        yield point, (colours, shape, dash, labels[point.name])


def _of_share(rank: int, count: int) -> tuple[str, str]:
    place = rank / (count - 1) if count > 1 else 0.5
    part, index = (place * 2, 0) if place < 0.5 else (place * 2 - 1, 1)
    light, dark = (
        _blend(*pair, part) for pair in zip(_SHARES[index], _SHARES[index + 1], strict=True)
    )
    return light, dark


def _blend(one: str, other: str, part: float) -> str:
    parts = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in parts)


def are_labels_enough(styles: Mapping[str, Style]) -> bool:
    """Whether the labels at the ends of curves identify the points, so that no legend is needed."""
    labels = {style.label for style in styles.values()}
    return len(styles) <= MAX_NAMED and len(labels) == len(styles)


def labels_of(names: Sequence[str]) -> dict[str, str]:
    """A short label for each name.

    Where one is too long, the words that all names begin with are left out, then those that all end
    with.
    """
    found = [_WORDS.split(name) for name in names]
    for way in (1, -1):
        if max(len("".join(words)) for words in found) > _MAX_NAME:
            found = [words[::way] for words in found]
            alike = _num_alike(found)
            found = [words[alike:][::way] for words in found]
    labels = ("".join(words).strip("-_/. ") for words in found)
    return {n: _shorten(label or n, _MAX_NAME) for n, label in zip(names, labels, strict=True)}


def _num_alike(lists: Sequence[Sequence[str]]) -> int:
    """How many words are the same at the start of all lists."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False)))


def _shorten(name: str, most: int) -> str:
    """A long name without its middle, since runs may differ at either end."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def legend(styles: Mapping[str, Style], width: float) -> Scene:
    """All marks with their names, as many in a line as there is room for."""
    shapes: list[Shape] = []
    x, y = 14.0, 14.0
    for style in styles.values():
        text = _shorten(style.name, _MAX_IN_LEGEND)
        if x + 26 + width_of(text) > width and x > 14:
            x, y = 14.0, y + 20
        shapes.append(
            Stroke(points=[(x - 9, y), (x + 9, y)], colour=style.key, width=2, dash=style.dash)
        )
        shapes.append(Mark(at=(x, y), shape=style.shape, colour=style.key))
        shapes.append(Label(at=(x + 15, y + 4), text=text, colour="ink"))
        x += 15 + width_of(text) + 26
    return Scene(title="", width=width, height=y + 14 if shapes else 0.0, shapes=shapes)
