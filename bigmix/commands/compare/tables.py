"""The tables of a comparison: as texts for every output, and as `table.md` and `table.tex`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.measures import (
    FORGETTING,
    GAIN,
    SOURCE_MEASURES,
    Measure,
    Spread,
    score_measure,
    spread_of,
)
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import BASE
from bigmix.evaluation.bootstrap import Estimate
from bigmix.terminal import share_percent

ABSENT = "–"
NOTE = (
    "Loss in nats/token; forgetting: loss after training minus loss of the base, lower is better;"
    " task gain: loss of the base minus loss after training, higher is better. In brackets is the"
    " 95 % bootstrap interval of a single run; after ± is the standard deviation over the seeds of"
    " a point, whose value is their mean."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultCell:
    """A value and what is known of its accuracy; `sign` is -1 for a change to the worse and 1 for
    one to the better.
    """

    value: str
    doubt: str = ""
    sign: int = 0

    @property
    def text(self) -> str:
        """Value and accuracy."""
        return f"{self.value} {self.doubt}".rstrip()

    @property
    def brief(self) -> str:
        """The value, with its standard deviation over seeds but without an interval; it has no
        space at which a line could be broken.
        """
        return (
            f"{self.value}\N{NO-BREAK SPACE}{self.doubt.replace(' ', '')}"
            if self.doubt.startswith("±")
            else self.value
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureRow:
    """A point, a run or the base."""

    name: str
    cells: Sequence[ResultCell]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureTable:
    """All that was measured on one held-out source or one task; `heads` are those of the cells.

    The first cell of a row is replay's share, unless there are two points or fewer, which their
    names distinguish well enough.
    """

    name: str
    role: str
    heads: Sequence[str]
    rows: Sequence[MeasureRow]

    @property
    def title(self) -> str:
        """The name and, in parentheses, the role."""
        return f"{self.name} ({self.role})"


def tables(comparison: Comparison) -> list[MeasureTable]:
    """A table for each source and each task; a row for the base, then one for each point."""
    return list(_tables(comparison, comparison.arrangement.ordered))


def narrow_tables(comparison: Comparison) -> list[MeasureTable]:
    """The same for a terminal: without the perplexity, which is exp(loss)."""
    measures = [measure for measure in SOURCE_MEASURES if measure.key != "perplexity"]
    return list(_tables(comparison, comparison.arrangement.ordered, measures))


def tables_of_runs(comparison: Comparison) -> list[MeasureTable]:
    """The same with a row for each run; none where every point has one run, whose row it is."""
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
    with_share = len(comparison.points) > 2
    for source, role in comparison.roles.items():
        hidden = FORGETTING if role == "task" else GAIN
        spreads = {
            measure: [point.source(source, measure.key) for point in points]
            for measure in measures
            if measure.key != hidden
        }
        heads, rows = _measured(points, spreads, comparison.base[source], with_share=with_share)
        yield MeasureTable(name=source, role=role, heads=heads, rows=rows)
    for task, scores in comparison.scores.items():
        spreads = {
            score_measure(score): [point.task(task, score) for point in points] for score in scores
        }
        counts = {
            run.final.num_examples[task]
            for run in comparison.runs
            if task in run.final.num_examples
        }
        role = f"scores, {max(counts):,} examples" if len(counts) == 1 else "scores"
        base = comparison.base_tasks.get(task, {})
        heads, rows = _measured(points, spreads, base, with_share=with_share)
        yield MeasureTable(name=task, role=role, heads=heads, rows=rows)


def _measured(
    points: Sequence[RunPoint],
    spreads: Mapping[Measure, Sequence[Spread | None]],
    base: Mapping[str, Estimate],
    *,
    with_share: bool,
) -> tuple[list[str], list[MeasureRow]]:
    """Heads and rows of a table, without the measures that no point has."""
    measured = [m for m, found in spreads.items() if any(spread is not None for spread in found)]
    heads = [m.label for m in measured]
    rows = [MeasureRow(name=BASE, cells=[_cell_of_base(base, measure) for measure in measured])]
    for index, point in enumerate(points):
        cells = [_cell(spreads[measure][index], measure) for measure in measured]
        rows.append(MeasureRow(name=point.name, cells=cells))
    if with_share:
        heads.insert(0, "replay")
        shares = [ABSENT, *(share_percent(point.written_share) for point in points)]
        rows = [
            MeasureRow(name=row.name, cells=[ResultCell(value=share), *row.cells])
            for row, share in zip(rows, shares, strict=True)
        ]
    return heads, rows


def _cell_of_base(base: Mapping[str, Estimate], measure: Measure) -> ResultCell:
    found = base.get(measure.key)
    if found is None or measure.key in (FORGETTING, GAIN):
        return ResultCell(value=ABSENT)
    return _cell(spread_of([found]), measure)


def _cell(spread: Spread | None, measure: Measure) -> ResultCell:
    if spread is None:
        return ResultCell(value=ABSENT)
    value = _number(spread.mean, measure)
    doubt = ""
    if spread.deviation is not None:
        doubt = f"± {_plain(spread.deviation, measure)}"
    elif spread.interval:
        doubt = f"[{', '.join(_number(end, measure) for end in spread.interval)}]"
    is_change = measure.is_signed and value[0] in "+−"
    sign = (1 if (value[0] == "−") == (measure.better == "lower") else -1) if is_change else 0
    return ResultCell(value=value, doubt=doubt, sign=sign)


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


def markdown(comparison: Comparison) -> str:
    """The text of `table.md`: the headline, the tables and what their numbers mean."""
    lines = [f"{comparison.headline} {comparison.detail}".strip(), ""]
    lines += [f"> Warning: {text}\n" for text in comparison.warnings]
    for table in tables(comparison):
        heads = [table.title, *table.heads]
        lines += [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        for row in table.rows:
            lines.append(_line([row.name, *(cell.text for cell in row.cells)]))
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
    """The text of `table.tex`: each table as a tabular, for the package booktabs."""
    lines = ["% Needs \\usepackage{booktabs}."]
    for table in tables(comparison):
        heads = [table.title, *table.heads]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
        lines += [_tex_line(heads), r"\midrule"]
        for row in table.rows:
            lines.append(_tex_line([row.name, *(cell.text for cell in row.cells)]))
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def _tex_line(cells: Sequence[str]) -> str:
    # After \\, TeX reads a cell that begins with a bracket as an option, unless it is in braces.
    texts = ["".join(_TEX.get(letter, letter) for letter in cell) for cell in cells]
    return " & ".join(f"{{{text}}}" for text in texts) + r" \\"
