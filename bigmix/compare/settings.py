"""Points go in; out comes what their recipes have in common, and what differs."""

from collections.abc import Mapping, Sequence
from html import escape

from bigmix.commands.compare.charts.styles import Style
from bigmix.commands.compare.points import Point
from bigmix.commands.compare.sections import folded, named, plain_table, wide
from bigmix.commands.compare.tables import ABSENT

_MOST_COLUMNS = 4  # points that stand beside each other; more stand below each other


def settings_part(points: Sequence[Point], styles: Mapping[str, Style]) -> str:
    """A table of the settings that differ, and those in common on request."""
    settings = [_without_absent_sources(point, points) for point in points]
    keys = sorted({key for own in settings for key in own})
    values = {key: [own.get(key, ABSENT) for own in settings] for key in keys}
    differing = {key: found for key, found in values.items() if len(set(found)) > 1}
    common = {key: found for key, found in values.items() if key not in differing}
    parts = [_differing(points, differing, styles) if differing else "<p>They do not differ.</p>"]
    rows = ((f"<code>{escape(key)}</code>", found[:1]) for key, found in common.items())
    table = plain_table(["setting", "value"], rows, classes="value")
    if common:
        parts.append(folded(f"{len(common)} settings in common", wide("Settings in common", table)))
    return "\n".join(parts)


def _differing(
    points: Sequence[Point], differing: Mapping[str, Sequence[str]], styles: Mapping[str, Style]
) -> str:
    names = [named(point.name, styles) for point in points]
    keys = [f"<code>{escape(key)}</code>" for key in differing]
    if len(points) <= _MOST_COLUMNS:
        rows = list(zip(keys, differing.values(), strict=True))
        table = plain_table(["setting", *names], rows, classes="value")
    else:
        columns = list(zip(*differing.values(), strict=True))
        table = plain_table(["", *keys], zip(names, columns, strict=True), classes="value")
    return wide("How the recipes differ", table)


def _without_absent_sources(point: Point, points: Sequence[Point]) -> dict[str, str]:
    """The settings; those of a source that another point lacks are told once, by its path, where the points agree on them."""
    settings = {_moved(key): value for key, value in point.settings.items()}
    names = [name for p in points for name in p.runs[0].sources]
    for name in dict.fromkeys(names):
        having = [p for p in points if name in p.runs[0].sources]
        if len(having) == len(points):
            continue
        prefix = f"sources.{name}."
        for key in {key for p in having for key in p.settings if key.startswith(prefix)}:
            if key != _moved(key) or key.endswith("share"):
                continue
            if len({p.settings.get(key) for p in having}) == 1:
                path = settings.pop(key, None)
                if key == f"{prefix}path" and path is not None:
                    settings[f"sources.{name}"] = path
    return settings


def _moved(key: str) -> str:
    """A held-out folder is named by its source where that is trained, and beside the sources where it is not."""
    parts = key.split(".")
    is_own = len(parts) == 3 and parts[0] == "sources" and parts[2] == "held_out"
    return f"held_out.{parts[1]}" if is_own else key
