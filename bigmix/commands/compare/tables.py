"""A comparison goes in; out come its tables as text, the same in every output, and table.md and
table.tex.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.measures import (
    FORGETTING,
    GAIN,
    SOURCE_MEASURES,
    Measure,
    MeasuredValue,
    Spread,
    score_measure,
    spread_of,
)
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import BASE
from bigmix.terminal import share_percent

ABSENT = "–"
NOTE = (
    "Loss in nats/token; forgetting: loss after training minus loss of the base, lower is better;"
    " task gain: loss of the base minus loss after training, higher is better. In brackets the 95 %"
    " bootstrap interval of a single run; after ± the standard deviation over the seeds of a point,"
    " whose value is their mean."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A value, and beside it what is known of its accuracy; `sign` is -1 or 1 for a change to the
    worse or the better.
    """

    value: str
    doubt: str = ""
    sign: int = 0

    @property
    def text(self) -> str:
        """Both."""
        return f"{self.value} {self.doubt}".rstrip()

    @property
    def brief(self) -> str:
        """The value, with its standard deviation over seeds but without an interval; in one word,
        so that it is in one line.
        """
        return (
            f"{self.value}\N{NO-BREAK SPACE}{self.doubt.replace(' ', '')}"
            if self.doubt.startswith("±")
            else self.value
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureRow:
    """A point, a run or the base; `replay` is replay's share of its rows."""

    name: str
    replay: str
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureTable:
    """All that was measured on one held-out source or one task."""

    name: str
    role: str
    heads: Sequence[str]
    rows: Sequence[MeasureRow]

    @property
    def title(self) -> str:
        """Name and role."""
        return f"{self.name} ({self.role})"


def tables(comparison: Comparison) -> list[MeasureTable]:
    """One for each source and each task; a row for the base, then one for each point."""
    return list(_tables(comparison, comparison.arrangement.ordered))


def narrow_tables(comparison: Comparison) -> list[MeasureTable]:
    """The same for a terminal: without the perplexity, which is exp(loss)."""
    measures = [measure for measure in SOURCE_MEASURES if measure.key != "perplexity"]
    return list(_tables(comparison, comparison.arrangement.ordered, measures))


def tables_of_runs(comparison: Comparison) -> list[MeasureTable]:
    """The same with a row for each run; none where every point has one run, as its row says all."""
    points = comparison.arrangement.ordered
    if all(len(point.runs) == 1 for point in points):
        return []
    runs = [run for point in points for run in point.runs]
    return list(_tables(comparison, [RunPoint(name=r.name, runs=[r], settings={}) for r in runs]))


def _tables(
    comparison: Comparison,
    points: Sequence[RunPoint],
    measures: Sequence[Measure] = SOURCE_MEASURES,
) -> Iterator[MeasureTable]:
    for source, role in comparison.roles.items():
        hidden = FORGETTING if role == "task" else GAIN
        spreads = {
            measure: [point.source(source, measure.key) for point in points]
            for measure in measures
            if measure.key != hidden
        }
        yield _table(source, role, points, spreads, comparison.base[source])
    for task, scores in comparison.scores.items():
        spreads = {
            score_measure(score): [point.task(task, score) for point in points] for score in scores
        }
        counts = {run.final.examples[task] for run in comparison.runs if task in run.final.examples}
        counted = f", {max(counts):,} examples" if len(counts) == 1 else ""
        base = comparison.base_tasks.get(task, {})
        yield _table(task, f"scores{counted}", points, spreads, base)


def _table(
    name: str,
    role: str,
    points: Sequence[RunPoint],
    spreads: Mapping[Measure, Sequence[Spread | None]],
    base: Mapping[str, MeasuredValue],
) -> MeasureTable:
    """Measures that nobody has are left out."""
    measured = [m for m, found in spreads.items() if any(spread is not None for spread in found)]
    rows = [MeasureRow(name=BASE, replay=ABSENT, cells=[_cell_of_base(base, m) for m in measured])]
    for index, point in enumerate(points):
        cells = [_cell(spreads[measure][index], measure) for measure in measured]
        rows.append(
            MeasureRow(name=point.name, replay=share_percent(point.written_share), cells=cells)
        )
    return MeasureTable(name=name, role=role, heads=[m.label for m in measured], rows=rows)


def _cell_of_base(base: Mapping[str, MeasuredValue], measure: Measure) -> Cell:
    found = base.get(measure.key)
    if found is None or measure.key in (FORGETTING, GAIN):
        return Cell(value=ABSENT)
    return _cell(spread_of([found]), measure)


def _cell(spread: Spread | None, measure: Measure) -> Cell:
    if spread is None:
        return Cell(value=ABSENT)
    value = _number(spread.mean, measure)
    doubt = ""
    if spread.deviation is not None:
        doubt = f"± {_plain(spread.deviation, measure)}"
    elif spread.interval:
        doubt = f"[{', '.join(_number(end, measure) for end in spread.interval)}]"
    is_change = measure.is_signed and value[0] in "+−"
    sign = (1 if (value[0] == "−") == (measure.better == "lower") else -1) if is_change else 0
    return Cell(value=value, doubt=doubt, sign=sign)


def _number(value: float, measure: Measure) -> str:
    return signed(value) if measure.is_signed else _plain(value, measure)


def _plain(value: float, measure: Measure) -> str:
    if measure.key == "perplexity":
        digits = 2 if value < 1000 else 0
        return f"{value:,.{digits}f}" if value < 1e6 or math.isinf(value) else f"{value:.2e}"
    return f"{value:.3f}"


def signed(value: float) -> str:
    """Three decimals with a sign; zero has none."""
    return "0.000" if f"{abs(value):.3f}" == "0.000" else f"{value:+.3f}".replace("-", "−")


def has_shares(comparison: Comparison) -> bool:
    """Whether rows say their share: of two points the names tell enough."""
    return len(comparison.points) > 2


def cells_of(row: MeasureRow, *, with_share: bool) -> list[Cell]:
    """The cells that follow a row's name."""
    return [*([Cell(value=row.replay)] if with_share else []), *row.cells]


def heads_of(table: MeasureTable, *, with_share: bool) -> list[str]:
    """The heads of those cells."""
    return [*(["replay"] if with_share else []), *table.heads]


def markdown(comparison: Comparison) -> str:
    """table.md: the headline, the tables and what their numbers mean."""
    with_share = has_shares(comparison)
    lines = [f"{comparison.headline} {comparison.detail}".strip(), ""]
    lines += [f"> Warning: {text}\n" for text in comparison.warnings]
    for table in tables(comparison):
        heads = [table.title, *heads_of(table, with_share=with_share)]
        lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        for row in table.rows:
            cells = cells_of(row, with_share=with_share)
            lines.append(_line([row.name, *(cell.text for cell in cells)]))
        lines.append("")
    return "\n".join([*lines, NOTE, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_TEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "~": r"\textasciitilde{}",
    "\N{NO-BREAK SPACE}": "~",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def latex(comparison: Comparison) -> str:
    """table.tex: each table as a tabular for the package booktabs."""
    with_share = has_shares(comparison)
    lines = ["% Needs \\usepackage{booktabs}."]
    for table in tables(comparison):
        heads = [table.title, *heads_of(table, with_share=with_share)]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
        lines += [_tex_line(heads), r"\midrule"]
        for row in table.rows:
            cells = cells_of(row, with_share=with_share)
            lines.append(_tex_line([row.name, *(cell.text for cell in cells)]))
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def _tex_line(cells: Sequence[str]) -> str:
    # Braces keep a cell that begins with a bracket from being read as an option of the line before.
    texts = ["".join(_TEX.get(letter, letter) for letter in cell) for cell in cells]
    return " & ".join(f"{{{text}}}" for text in texts) + r" \\"
