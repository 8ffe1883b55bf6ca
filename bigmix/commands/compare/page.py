"""Renders `index.html`, the page of a comparison: one file that loads nothing else."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from bigmix.commands.compare.charts.curves import is_over_tokens
from bigmix.commands.compare.charts.law_chart import LAW_HEADS, law_rows, law_sentences
from bigmix.commands.compare.charts.styles import (
    MAX_NAMED,
    Style,
    are_labels_enough,
    styles_of,
)
from bigmix.commands.compare.charts.svg import Mark, Scene, draw_svg, mark_svg
from bigmix.commands.compare.findings.kept import DEFINITION
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.law import Fit
from bigmix.commands.compare.read import BASE
from bigmix.commands.compare.sections import (
    TextTable,
    answers_side_by_side,
    budget_sentences,
    kept_outputs,
    realised_shares,
    recipe_settings,
    source_colours,
    training_table,
    with_asides,
)
from bigmix.commands.compare.tables import kept_table, note_of, tables, tables_of_runs

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
    """The page of the folders `given`, which is written into `out`.

    The templates escape all texts, so that names and outputs of runs are never read as HTML.
    """
    styles = styles_of(comparison)
    points = comparison.arrangement.ordered
    shares = realised_shares(points)
    environment = Environment(
        loader=PackageLoader("bigmix.commands.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        title=_title(comparison),
        comparison=comparison,
        headline=with_asides(comparison.headline),
        points=points,
        pictures=pictures,
        draw_svg=draw_svg,
        styles=styles,
        marks={name: _mark(style) for name, style in styles.items()},
        is_labelled=are_labels_enough(styles),
        laws=_laws(comparison),
        tables=tables(comparison),
        tables_of_runs=tables_of_runs(comparison),
        tables_note=note_of(comparison),
        kept=kept_table(comparison),
        kept_note=DEFINITION,
        base_name=BASE,
        answered=answers_side_by_side(comparison),
        is_over_tokens=is_over_tokens(comparison),
        are_runs_shaded=len(comparison.points) <= MAX_NAMED,
        num_without_curve=sum(point.runs[0].model is not None for point in comparison.points),
        outputs=kept_outputs(comparison),
        budget=budget_sentences(comparison.points),
        training=training_table(points),
        shares=shares,
        colours=source_colours(shares),
        settings=recipe_settings(points),
        are_commands_open=len(points) <= _MOST_OPEN,
        commands_of_page=_commands_of_page(comparison, given, out),
    )


def _title(comparison: Comparison) -> str:
    names = [point.name for point in comparison.points]
    if len(names) <= _MOST_IN_TITLE:
        return ", ".join(names)
    return f"{len(names)} points, {len(comparison.runs)} runs"


def _mark(style: Style) -> str:
    return mark_svg(Mark(at=(0.0, 0.0), shape=style.shape, colour=style.key, size=4.6))


def _laws(comparison: Comparison) -> list[tuple[str, str, TextTable | None]]:
    """Of each replay source its name, what was fitted or why nothing was, and the law's table."""
    return [
        (
            source,
            " ".join(law_sentences(source, fit)),
            TextTable(heads=[source, *LAW_HEADS], rows=law_rows(fit))
            if isinstance(fit, Fit)
            else None,
        )
        for source, fit in comparison.fits.items()
    ]


def _commands_of_page(comparison: Comparison, given: Sequence[Path], out: Path) -> list[str]:
    """The command that makes the page again, and the one that makes it of the runs once all of
    them were trained again.
    """
    again = [
        str(run.folder) if run.model is not None else f"{run.folder}-again"
        for run in comparison.runs
    ]
    return [
        _compare([str(folder) for folder in given], str(out)),
        _compare(again, f"{out}-again"),
    ]


def _compare(folders: Sequence[str], out: str) -> str:
    return f"bigmix compare {shlex.join(folders)} --out {shlex.quote(out)}"
