"""A comparison goes in, index.html comes out: one file that loads nothing else."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from bigmix.commands.compare.charts.curves import is_over_tokens
from bigmix.commands.compare.charts.law_chart import LAW_HEADS, law_rows, law_sentences
from bigmix.commands.compare.charts.styles import MAX_NAMED, Style, are_labels_enough, styles_of
from bigmix.commands.compare.charts.svg import Scene, draw_svg
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.law import Fit
from bigmix.commands.compare.sections import (
    bars,
    budget_sentences,
    code,
    folded,
    named,
    outputs_part,
    plain_table,
    settings_part,
    training_table,
    variables,
    wide,
)
from bigmix.commands.compare.tables import (
    NOTE,
    MeasureRow,
    MeasureTable,
    cells_of,
    has_shares,
    heads_of,
    tables,
    tables_of_runs,
)

_MOST_IN_TITLE = 4
_MOST_OPEN = 4  # points whose commands are shown at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What is drawn of a comparison: task against forgetting, forgetting over the share, and both
    over the run.
    """

    frontiers: Sequence[Scene]
    laws: Sequence[Scene]
    curves: Sequence[Scene]


def page(comparison: Comparison, pictures: Pictures, *, given: Sequence[Path], out: Path) -> str:
    """The whole page of the folders given, as it is written into `out`; everything that comes from
    a run is escaped.
    """
    template = Template(
        (files("bigmix.commands.compare") / "page.html").read_text(encoding="utf-8")
    )
    styles = styles_of(comparison)
    return template.substitute(
        title=escape(_title(comparison)),
        light=variables(styles, dark=False),
        dark=variables(styles, dark=True),
        headline=code(comparison.headline),
        detail=f'<p class="lead">{code(comparison.detail)}</p>' if comparison.detail else "",
        warnings="\n".join(f'<p class="warning">{code(w)}</p>' for w in comparison.warnings),
        body="\n".join(
            [
                *_sections(comparison, pictures, styles),
                *_commands(comparison, styles, given, out),
            ]
        ),
    )


def _title(comparison: Comparison) -> str:
    names = [point.name for point in comparison.points]
    if len(names) <= _MOST_IN_TITLE:
        return ", ".join(names)
    return f"{len(names)} points, {len(comparison.runs)} runs"


def _sections(
    comparison: Comparison,
    pictures: Pictures,
    styles: Mapping[str, Style],
) -> Iterator[str]:
    if pictures.frontiers:
        yield "<h2>Task against forgetting</h2>"
        yield f'<p class="note">{_FRONTIER_NOTE}</p>'
        yield _legend(styles)
        yield _charts(pictures.frontiers)
    if pictures.frontiers or pictures.laws:
        yield from _law(comparison, pictures)
    yield "<h2>Results on held-out data</h2>"
    yield from (_result(table, comparison, styles) for table in tables(comparison))
    yield f'<p class="note">{escape(NOTE)}</p>'
    if by_run := [_result(table, comparison, {}) for table in tables_of_runs(comparison)]:
        yield folded("Every run by itself", "\n".join(by_run))
    yield "<h2>Curves</h2>"
    yield f'<p class="note">{escape(_curves_note(comparison))}</p>'
    if not are_labels_enough(styles):
        yield _legend(styles)
    yield _charts(pictures.curves)
    if outputs := list(outputs_part(comparison, styles)):
        yield "<h2>Outputs side by side</h2>"
        yield from outputs
    yield "<h2>Budget and realised shares</h2>"
    yield from (f"<p>{escape(text)}</p>" for text in budget_sentences(comparison.points))
    yield f'<p class="note">{_SHARES_NOTE}</p>'
    yield training_table(comparison, styles)
    yield from bars(comparison)
    yield "<h2>How the recipes differ</h2>"
    yield settings_part(comparison.arrangement.ordered, styles)


_FRONTIER_NOTE = (
    "Each mark is one recipe: the mean over its seeds with Student's 95 % interval, or one run with"
    " its bootstrap interval. Points that differ in replay's share alone are joined. Hollow:"
    " another point does at least as well in both. Point at a mark for its numbers."
)
_SHARES_NOTE = (
    "Tokens are the mean over seeds. Shares are those of all replay sources together, in the first"
    " run of each point: as written in the recipe, then from the run's own log. The gradient is the"
    " mean over all steps."
)


def _legend(styles: Mapping[str, Style]) -> str:
    marks = "".join(f"<span>{named(name, styles)}</span>" for name in styles)
    return f'<div class="keys">{marks}</div>'


def _charts(scenes: Sequence[Scene]) -> str:
    figures = "\n".join(
        f"<figure><figcaption>{escape(scene.title)}</figcaption>\n{draw_svg(scene)}\n</figure>"
        for scene in scenes
    )
    return f'<div class="charts">{figures}</div>'


def _law(comparison: Comparison, pictures: Pictures) -> Iterator[str]:
    yield "<h2>Forgetting over replay's share</h2>"
    yield _charts(pictures.laws)
    for source, fit in comparison.fits.items():
        said = " ".join(law_sentences(source, fit))
        yield f'<p class="note">{escape(said)}</p>'
        if isinstance(fit, Fit):
            rows = ((escape(name), cells) for name, cells in law_rows(fit))
            yield wide(f"The law of {source}", plain_table([escape(source), *LAW_HEADS], rows))


def _result(table: MeasureTable, comparison: Comparison, styles: Mapping[str, Style]) -> str:
    with_share = has_shares(comparison)
    heads = [escape(head) for head in heads_of(table, with_share=with_share)]
    first = f"{escape(table.name)}<small>{escape(table.role)}</small>"
    cells = "".join(f'<th scope="col" class="number">{head}</th>' for head in heads)
    body = "\n".join(_result_row(row, styles, with_share=with_share) for row in table.rows)
    return wide(
        table.title,
        [
            (
                '<table class="results"><thead><tr><th scope="col"'
                f' class="source">{first}</th>{cells}</tr></thead><tbody>'
            ),
            body,
            "</tbody></table>",
        ],
    )


def _result_row(row: MeasureRow, styles: Mapping[str, Style], *, with_share: bool) -> str:
    moods = {-1: " bad", 0: "", 1: " good"}
    cells = "".join(
        f'<td class="number{moods[cell.sign]}"><span>{escape(cell.value)}</span>'
        + (f" <small>{escape(cell.doubt)}</small>" if cell.doubt else "")
        + "</td>"
        for cell in cells_of(row, with_share=with_share)
    )
    return f'<tr><th scope="row">{named(row.name, styles)}</th>{cells}</tr>'


def _curves_note(comparison: Comparison) -> str:
    against = (
        "Against task tokens, so that runs are compared after the same learning and not after the"
        " same number of steps"
        if is_over_tokens(comparison)
        else "Against steps"
    )
    outside = sum(point.runs[0].model is not None for point in comparison.points)
    left_out = (
        f" Without a curve, as evaluated once outside of a run: {outside}." if outside else ""
    )
    alone = (
        "single runs are not shaded, for there are many"
        if len(comparison.points) > MAX_NAMED
        else "of a single run its 95 % interval is shaded"
    )
    return (
        f"{against}. A line is the mean over the seeds of a point, shaded from the lowest to the"
        f" highest; {alone}. Point at a mark for its numbers.{left_out}"
    )


def _commands(
    comparison: Comparison, styles: Mapping[str, Style], given: Sequence[Path], out: Path
) -> Iterator[str]:
    """Of each point the commands that make its runs again, then those of the page; a click marks a
    whole block.
    """
    yield "<h2>How to reproduce</h2>"
    yield (
        '<p class="note">Each run again, from its resolved recipe into a new folder beside the old'
        " one; then this page, of the same runs and of the new ones. A click marks a block.</p>"
    )
    points = comparison.arrangement.ordered
    blocks = [(point.name, "\n".join(run.command for run in point.runs)) for point in points]
    shown = "\n".join(
        f"<h3>{named(name, styles)}</h3><pre>{escape(command)}</pre>" for name, command in blocks
    )
    few = len(points) <= _MOST_OPEN
    yield shown if few else folded(f"The commands of {len(points)} points", shown)
    again = [
        str(run.folder) if run.model is not None else f"{run.folder}-again"
        for run in comparison.runs
    ]
    same = _compare([str(folder) for folder in given], str(out))
    new = _compare(again, f"{out}-again")
    yield f"<h3>This page</h3><pre>{escape(same)}</pre><pre>{escape(new)}</pre>"


def _compare(folders: Sequence[str], out: str) -> str:
    return f"bigmix compare {shlex.join(folders)} --out {shlex.quote(out)}"
