"""Texts of a comparison go in, pieces of the page come out; everything that comes from a run is escaped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from bigmix.commands.compare.charts.styles import Style
from bigmix.commands.compare.charts.svg import Mark
from bigmix.compare.svg import mark_svg


def code(text: str) -> str:
    """Names between backticks in code letters."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def wide(label: str, content: Iterable[str]) -> str:
    """A box that scrolls by itself, also with the keyboard, so that the page does not."""
    inside = "\n".join(content)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{inside}</div>'
    )


def folded(summary: str, content: str) -> str:
    """What is shown on request."""
    return f"<details><summary>{code(summary)}</summary>\n{content}\n</details>"


def plain_table(
    heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, classes: str = "number"
) -> Iterator[str]:
    """A table of texts; heads and names of rows are HTML already."""
    first = f'<th scope="col">{heads[0]}</th>' if heads[0] else "<td></td>"
    cells = "".join(f'<th scope="col" class="{classes}">{head}</th>' for head in heads[1:])
    yield f"<table><thead><tr>{first}{cells}</tr></thead><tbody>"
    for name, texts in rows:
        body = "".join(f'<td class="{classes}">{escape(text)}</td>' for text in texts)
        yield f'<tr><th scope="row">{name}</th>{body}</tr>'
    yield "</tbody></table>"


def named(name: str, styles: Mapping[str, Style]) -> str:
    """A point's name behind its mark; other names alone."""
    style = styles.get(name)
    if style is None:
        return escape(name)
    mark = Mark(at=(0.0, 0.0), shape=style.shape, colour=style.key, size=4.6)
    return f"{mark_svg(mark)}{escape(name)}"


def variables(styles: Mapping[str, Style], *, dark: bool) -> str:
    """The colours of points as custom properties."""
    return " ".join(f"--{s.key}: {s.dark if dark else s.light};" for s in styles.values())
