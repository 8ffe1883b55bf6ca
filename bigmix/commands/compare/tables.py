"""The tables of a comparison: as texts for every output, and as `table.md` and `table.tex`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.findings.kept import DEFINITION, is_lost
from bigmix.commands.compare.findings.knowledge import KINDS, Finding
from bigmix.commands.compare.findings.phrases import brief, brief_numbers, head_of
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.measures import (
    BEHAVIOUR,
    BEHAVIOUR_MEASURES,
    FORGETTING,
    GAIN,
    SOURCE_MEASURES,
    Measure,
    Spread,
    score_measure,
    spread_of,
)
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import ABSENT, BASE
from bigmix.evaluation.bootstrap import Estimate
from bigmix.terminal import share_percent

_NOTE = (
    "Loss in nats/token; forgetting: loss after training minus loss of the base, lower is better;"
    " task gain: loss of the base minus loss after training, higher is better. In brackets is the"
    " 95 % bootstrap interval of a single run; after ± is the standard deviation over the seeds of"
    " a point, whose value is their mean."
)
_BEHAVIOUR_NOTE = (
    " Behaviour is how the model answers general prompts. Forgetting and KL, both in nats/token,"
    " are measured on the base's answers. Of the model's own answers are instructions (the part"
    " that follows the constraints of its prompt), sentences (the part in sentences), stops (the"
    " part that ends by itself), length (tokens) and same (the part that is the base's answer)."
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


def kept_table(comparison: Comparison) -> MeasureTable | None:
    """What each point kept and lost, a column for each thing that the base knew; None where the
    headline alone says it.
    """
    found = comparison.findings
    every = sorted((f for own in found.values() for f in own), key=lambda f: KINDS.index(f.kind))
    heads = dict.fromkeys(head_of(finding) for finding in every)
    if not heads or (len(heads) == 1 and len(found) <= 2):
        return None
    rows = []
    for point in comparison.arrangement.ordered:
        by_head = {head_of(finding): finding for finding in found[point.name]}
        cells = [_cell_of_finding(by_head.get(head), point) for head in heads]
        rows.append(MeasureRow(name=point.name, cells=cells))
    one_way = comparison.reference
    role = f"against {one_way.name}" if one_way else "against the base"
    return MeasureTable(name="kept and lost", role=role, heads=list(heads), rows=rows)


def note_of(comparison: Comparison) -> str:
    """What the numbers of the tables mean."""
    return _NOTE + (_BEHAVIOUR_NOTE if _has_behaviour(comparison) else "")


def _has_behaviour(comparison: Comparison) -> bool:
    return any(run.final.behaviour for run in comparison.runs)


def _cell_of_finding(finding: Finding | None, point: RunPoint) -> ResultCell:
    if finding is None:
        return ResultCell(value=ABSENT)
    sign = 1 if finding.verdict in ("all", "most") else -1 if is_lost(finding.loss) else 0
    doubt = f"({brief_numbers(finding, point)})"
    return ResultCell(value=brief(finding), doubt=doubt, sign=sign)


def _tables(
    comparison: Comparison,
    points: Sequence[RunPoint],
    measures: Sequence[Measure] = SOURCE_MEASURES,
) -> Iterator[MeasureTable]:
    with_share = len(comparison.points) > 2
    if _has_behaviour(comparison):
        yield _behaviour_table(comparison, points, with_share=with_share)
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


def _behaviour_table(
    comparison: Comparison, points: Sequence[RunPoint], *, with_share: bool
) -> MeasureTable:
    spreads = {m: [point.behaviour(m.key) for point in points] for m in BEHAVIOUR_MEASURES}
    base = comparison.base_behaviour
    heads, rows = _measured(points, spreads, base, with_share=with_share)
    sizes = {size for run in comparison.runs if (size := run.final.sizes.get(BEHAVIOUR))}
    role = sizes.pop().partition(",")[0] if len(sizes) == 1 else "prompts"
    return MeasureTable(name=BEHAVIOUR, role=role, heads=heads, rows=rows)


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
    elif spread.interval and measure.has_interval:
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
    return f"{value:.{measure.digits}f}"


def signed(value: float) -> str:
    """Three decimals with a sign; zero has none."""
    return "0.000" if f"{abs(value):.3f}" == "0.000" else f"{value:+.3f}".replace("-", "−")


def markdown(comparison: Comparison) -> str:
    """The text of `table.md`: the headline, the tables and what their numbers mean."""
    lines = [f"{comparison.headline} {comparison.detail}".strip(), ""]
    lines += [f"> Warning: {text}\n" for text in comparison.warnings]
    if (kept := kept_table(comparison)) is not None:
        lines += [*_markdown(kept), DEFINITION, ""]
    for table in tables(comparison):
        lines += _markdown(table)
    return "\n".join([*lines, note_of(comparison), ""])


def _markdown(table: MeasureTable) -> Iterator[str]:
    heads = [table.title, *table.heads]
    yield from (_line(heads), _line(["---", *["---:"] * (len(heads) - 1)]))
    for row in table.rows:
        yield _line([row.name, *(cell.text for cell in row.cells)])
    yield ""


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
    kept = kept_table(comparison)
    for table in ([] if kept is None else [kept]) + tables(comparison):
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
