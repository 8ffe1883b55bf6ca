"""A comparison goes in, index.html comes out: one file that loads nothing else."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template

from bigmix.compare.chart import Panel
from bigmix.compare.judge import Comparison
from bigmix.compare.read import RECIPE, Realised, Run, TrainedSource
from bigmix.compare.svg import draw_svg
from bigmix.compare.table import ABSENT, NOTE, Row, columns, rows

# White text is readable on each of them, and neighbours are told apart by colour-blind readers.
_SOURCE_COLOURS = ("#0072b2", "#b35a00", "#007a5a", "#a04a7c", "#5b5bb0", "#6b7280")
_LABEL_FROM = 0.07  # a narrower part of a bar has no room for its number; the table below has it


def page(comparison: Comparison, panels: Sequence[Panel], out: Path) -> str:
    """The whole page; everything that comes from a run is escaped."""
    template = Template((files("bigmix.compare") / "page.html").read_text(encoding="utf-8"))
    x_label = panels[0].x_label if panels else "steps"
    return template.substitute(
        title=escape(", ".join(run.name for run in comparison.runs)),
        headline=_code(comparison.headline),
        detail=f'<p class="lead">{_code(comparison.detail)}</p>' if comparison.detail else "",
        warnings="\n".join(f'<p class="warning">{_code(w)}</p>' for w in comparison.warnings),
        results="\n".join(_results(comparison)),
        note=escape(NOTE),
        curves_note=escape(_curves_note(x_label)),
        charts="\n".join(_chart(panel) for panel in panels),
        shares="\n".join(_shares(comparison.runs)),
        differences="\n".join(_differences(comparison.runs)),
        commands=escape("\n".join(_commands(comparison.runs, out))),
    )


def _code(text: str) -> str:
    """Names between backticks in code letters."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _curves_note(x_label: str) -> str:
    return (
        f"Against {x_label}, so that runs are compared after the same learning and not after the same number "
        "of steps; shaded: 95 % interval; point at a dot for its numbers."
        if x_label != "steps"
        else "Against steps; shaded: 95 % interval; point at a dot for its numbers."
    )


def _results(comparison: Comparison) -> Iterator[str]:
    heads = columns(comparison)
    yield _table_start(["", *heads])
    for (source, role), group in groupby(rows(comparison), key=lambda row: (row.source, row.role)):
        yield (
            f'<tr class="source"><th colspan="{len(heads) + 1}">{escape(source)}'
            f"<small>{escape(role)}</small></th></tr>"
        )
        yield from map(_result_row, group)
    yield "</tbody></table>"


def _result_row(row: Row) -> str:
    is_key = row.measure in ("forgetting", "task gain")
    cells = "".join(
        f'<td class="number{_mood(row.measure, cell) if is_key else ""}">{escape(cell)}</td>'
        for cell in row.cells
    )
    start = '<tr class="key">' if is_key else "<tr>"
    return f'{start}<th scope="row">{escape(row.measure)}</th>{cells}</tr>'


def _mood(measure: str, cell: str) -> str:
    if cell[0] not in "+−":
        return ""
    return " good" if (cell[0] == "+") == (measure == "task gain") else " bad"


def _table_start(heads: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col" class="number">{escape(head)}</th>' for head in heads[1:])
    first = f'<th scope="col">{escape(heads[0])}</th>' if heads[0] else "<td></td>"
    return f"<table><thead><tr>{first}{cells}</tr></thead><tbody>"


def _chart(panel: Panel) -> str:
    caption = f"{escape(panel.title)}, {escape(panel.y_label)}"
    return f"<figure><figcaption>{caption}</figcaption>\n{draw_svg(panel)}\n</figure>"


def _shares(runs: Sequence[Run]) -> Iterator[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.sources))
    colours = {n: _SOURCE_COLOURS[i % len(_SOURCE_COLOURS)] for i, n in enumerate(names)}
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    )
    yield f'<div class="keys">{keys}</div>'
    for run in runs:
        yield f"<h3>{escape(run.name)}</h3>"
        if len(run.sources) == 1:
            yield f"<p>All of it was <code>{escape(next(iter(run.sources)))}</code>.</p>"
            continue
        own = [name for name in names if name in run.sources]
        measured = {name: _of_source(run.sources[name], run.realised[name]) for name in own}
        yield from _share_bars(measured, colours)
        yield '<details><summary class="note">as numbers</summary><div class="wide">'
        yield from _share_table(measured)
        yield "</div></details>"


def _of_source(source: TrainedSource, realised: Realised) -> dict[str, float | None]:
    return {
        "share, written": source.share,
        "rows": realised.rows,
        "tokens": realised.tokens,
        "loss tokens": realised.loss_tokens,
        "gradient, written": source.loss_share,
        "gradient": realised.gradient,
    }


def _share_bars(
    measured: Mapping[str, Mapping[str, float | None]], colours: Mapping[str, str]
) -> Iterator[str]:
    yield '<div class="shares">'
    for key in next(iter(measured.values())):
        yield f'<span class="name">{key}</span><div class="bar">'
        for name, shares in measured.items():
            share = shares[key]
            if share:
                label = f"<b>{share:.1%}</b>" if share >= _LABEL_FROM else ""
                yield (
                    f'<span style="flex:{share:.4f}" title="{escape(name)} {share:.1%}">'
                    f'<i style="background:{colours[name]}"></i>{label}</span>'
                )
        yield "</div>"
    yield "</div>"


def _share_table(measured: Mapping[str, Mapping[str, float | None]]) -> Iterator[str]:
    yield _table_start(["source", *next(iter(measured.values()))])
    for name, shares in measured.items():
        cells = "".join(
            f'<td class="number">{ABSENT if share is None else f"{share:.2%}"}</td>'
            for share in shares.values()
        )
        yield f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    yield "</tbody></table>"


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    keys = sorted({key for run in runs for key in run.settings} - {"output"})
    differing = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    if not differing:
        yield "<p>They do not differ.</p>"
        return
    yield _table_start(["setting", *(run.name for run in runs)])
    for key in differing:
        cells = "".join(
            f'<td class="number">{escape(run.settings.get(key, ABSENT))}</td>' for run in runs
        )
        yield f'<tr><th scope="row"><code>{escape(key)}</code></th>{cells}</tr>'
    yield "</tbody></table>"


def _commands(runs: Sequence[Run], out: Path) -> Iterator[str]:
    again = [f"{run.folder}-again" for run in runs]
    for run, folder in zip(runs, again, strict=True):
        recipe = shlex.quote(str(run.folder / RECIPE))
        yield f"deepspeed launch/train.py {recipe} {shlex.quote(f'output={folder}')}"
    yield f"bigmix compare {shlex.join(again)} --out {shlex.quote(f'{out}-again')}"
