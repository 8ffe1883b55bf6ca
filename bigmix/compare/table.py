"""A comparison goes in; out come the rows of its table as text, the same in every output, and summary.json's tree."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigmix.compare.judge import Comparison, forgetting, gain
from bigmix.compare.read import BASE, Evaluation, HeldOut, Run

ABSENT = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measure of one source; a cell for the base, then one for each run."""

    source: str
    role: str
    measure: str
    cells: Sequence[str]


def columns(comparison: Comparison) -> list[str]:
    """The heads of the cells of a row."""
    return [BASE, *(run.name for run in comparison.runs)]


def rows(comparison: Comparison) -> Iterator[Row]:
    """Four rows for each source: loss, bits/byte, perplexity, and forgetting or gain."""
    for source, role in comparison.roles.items():
        results = [comparison.base.get(source)]
        results += [run.final.sources.get(source) for run in comparison.runs]
        difference = gain if role == "task" else forgetting
        differences = [difference(run, source) for run in comparison.runs]
        measures = {
            "held-out loss": [_loss(result) for result in results],
            "bits/byte": [_number(result.bits_per_byte if result else None) for result in results],
            "perplexity": [_perplexity(result) for result in results],
            ("task gain" if role == "task" else "forgetting"): [
                ABSENT,
                *(signed(value) for value in differences),
            ],
        }
        for measure, cells in measures.items():
            yield Row(source=source, role=role, measure=measure, cells=cells)


def markdown(comparison: Comparison) -> str:
    """table.md: the headline, the table and what its numbers mean."""
    heads = ["source", "measure", *columns(comparison)]
    lines = [_line(heads), _line(["---", "---", *["---:"] * (len(heads) - 2)])]
    for row in rows(comparison):
        lines.append(_line([f"{row.source} ({row.role})", row.measure, *row.cells]))
    warnings = [f"> Warning: {text}\n" for text in comparison.warnings]
    return "\n".join(
        [f"{comparison.headline} {comparison.detail}".strip(), "", *warnings, *lines, "", NOTE, ""]
    )


NOTE = (
    "Loss in nats/token with its 95 % interval; forgetting: loss after training minus loss of the base, lower is "
    "better; task gain: loss of the base minus loss after training, higher is better."
)


def summary_tree(comparison: Comparison) -> dict[str, Any]:
    """summary.json. Numbers are not rounded; what was not evaluated is absent, what is unknown is null."""
    base_run = comparison.runs[0]
    base = Evaluation(step=0, task_tokens=0, sources=comparison.base)
    runs = {BASE: {"kind": BASE, **_of_model(comparison, base, base_run)}}
    for run in comparison.runs:
        runs[run.name] = {"kind": run.kind, **_of_model(comparison, run.final, run)}
    return {
        "version": 1,
        "headline": comparison.headline,
        "detail": comparison.detail,
        "warnings": list(comparison.warnings),
        "runs": runs,
    }


def _of_model(comparison: Comparison, evaluation: Evaluation, run: Run) -> dict[str, Any]:
    known = {
        name: evaluation.sources[name] for name in comparison.roles if name in evaluation.sources
    }
    lost = {name: forgetting(run, name) if evaluation.step else 0.0 for name in known}
    return {
        "steps": evaluation.step,
        "task_tokens": evaluation.task_tokens,
        "sources": {
            name: {"role": comparison.roles[name], **_of_source(result), "forgetting": lost[name]}
            for name, result in known.items()
        },
        "tasks": {
            name: {"loss": known[name].loss, "gain": _negative(lost[name])}
            for name in comparison.tasks
            if name in known
        },
    }


def _of_source(result: HeldOut) -> Mapping[str, Any]:
    return {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "interval": list(result.interval) if result.interval else None,
    }


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value  # 0.0 - 0.0 is 0.0, where -0.0 would print a sign


def signed(value: float | None) -> str:
    """Three decimals with a sign; zero has none."""
    if value is None:
        return ABSENT
    return "0.000" if f"{abs(value):.3f}" == "0.000" else f"{value:+.3f}".replace("-", "−")


def _loss(result: HeldOut | None) -> str:
    if result is None:
        return ABSENT
    if result.interval is None:
        return f"{result.loss:.3f}"
    half = (result.interval[1] - result.interval[0]) / 2
    # On a narrow page the line breaks before the sign and not after it.
    return f"{result.loss:.3f} ±\N{NO-BREAK SPACE}{half:.3f}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _perplexity(result: HeldOut | None) -> str:
    if result is None:
        return ABSENT
    value = result.perplexity
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
