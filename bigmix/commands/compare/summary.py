"""The content of `summary.json`: all numbers of a comparison, not rounded, null where unknown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bigmix.commands.compare.charts.frontier import Frontier
from bigmix.commands.compare.findings.knowledge import Finding
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.law import Fit, Prediction
from bigmix.commands.compare.measures import FORGETTING, GAIN, LOSS, Evaluation, Spread
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import BASE
from bigmix.evaluation.bootstrap import Estimate


def summary_tree(comparison: Comparison, frontiers: Sequence[Frontier]) -> dict[str, Any]:
    """The tree of summary.json, version 2; docs/compare.md describes its keys."""
    base = Evaluation(
        step=0,
        task_tokens=0,
        sources=comparison.base,
        tasks=comparison.base_tasks,
        num_examples={},
        behaviour=comparison.base_behaviour,
    )
    runs: dict[str, Any] = {BASE: {"kind": BASE, **_of_model(comparison, base)}}
    of_run = {run.name: point for point in comparison.points for run in point.runs}
    for run in comparison.runs:
        runs[run.name] = {
            "kind": run.kind,
            "point": of_run[run.name].name,
            "seed": run.seed,
            "folder": str(run.folder),
            "command": run.command,
            **_of_model(comparison, run.final),
        }
    return {
        "version": 2,
        "headline": comparison.headline,
        "detail": comparison.detail,
        "warnings": list(comparison.warnings),
        "runs": runs,
        "points": {p.name: _of_point(comparison, p) for p in comparison.arrangement.ordered},
        "lines": [
            {"name": line.name, "points": [point.name for point in line.points]}
            for line in comparison.arrangement.lines
        ],
        "frontiers": {frontier.title: _of_frontier(frontier) for frontier in frontiers},
        "laws": {source: _of_fit(fit) for source, fit in comparison.fits.items()},
    }


def _of_model(comparison: Comparison, evaluation: Evaluation) -> dict[str, Any]:
    known = {n: evaluation.sources[n] for n in comparison.roles if n in evaluation.sources}
    return {
        "steps": evaluation.step,
        "task_tokens": evaluation.task_tokens,
        "sources": {
            name: {"role": comparison.roles[name], **_of_source(measures)}
            for name, measures in known.items()
        },
        "tasks": {
            name: {
                "loss": known[name][LOSS].value,
                "gain": known[name][GAIN].value if GAIN in known[name] else None,
            }
            for name in comparison.tasks
            if name in known
        },
        "scores": {
            task: {score: _of_estimate(found) for score, found in scores.items()}
            for task, scores in evaluation.tasks.items()
        },
        "behaviour": {
            measure: _of_estimate(found) for measure, found in evaluation.behaviour.items()
        }
        or None,
    }


def _of_source(measures: Mapping[str, Estimate]) -> dict[str, Any]:
    """The measures of a source: the loss as `loss` with its `interval`, the others under their own
    names, and their intervals under `intervals`.
    """
    values = {
        name: _finite(found.value) for name, found in measures.items() if name not in (LOSS, GAIN)
    }
    intervals = {
        name: [_finite(end) for end in found.interval]
        for name, found in measures.items()
        if found.interval and name not in (LOSS, GAIN)
    }
    loss = measures[LOSS]
    return {
        "loss": loss.value,
        "interval": list(loss.interval) if loss.interval else None,
        **({"bits_per_byte": None, FORGETTING: None} | values),
        "intervals": intervals,
    }


def _of_estimate(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "interval": list(found.interval) if found.interval else None}


def _of_point(comparison: Comparison, point: RunPoint) -> dict[str, Any]:
    measures = {
        name: {
            measure: _of_spread(spread)
            for measure in point.runs[0].final.sources.get(name, {})
            if measure != GAIN and (spread := point.source(name, measure)) is not None
        }
        for name in comparison.roles
    }
    scores = {
        task: {s: _of_spread(spread) for s in names if (spread := point.task(task, s)) is not None}
        for task, names in comparison.scores.items()
    }
    behaviour = {
        measure: _of_spread(spread)
        for measure in point.runs[0].final.behaviour
        if (spread := point.behaviour(measure)) is not None
    }
    return {
        "kind": point.kind,
        "replay_share": point.share,
        "runs": [run.name for run in point.runs],
        "task_tokens": [run.task_tokens for run in point.runs],
        "total_tokens": [run.total_tokens for run in point.runs],
        "sources": measures,
        "scores": scores,
        "behaviour": behaviour or None,
        "kept": [_of_finding(finding) for finding in comparison.findings[point.name]],
    }


def _of_finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "name": finding.name,
        "measure": finding.measure,
        "verdict": finding.verdict,
        "lost": _of_loss(finding.loss),
        "lost_one_way": None if finding.one_way is None else _of_loss(finding.one_way),
    }


def _of_loss(loss: Spread) -> dict[str, Any]:
    return {"mean": _finite(loss.mean), "reach": [_finite(end) for end in loss.reach]}


def _of_spread(spread: Spread) -> dict[str, Any]:
    return {
        "mean": _finite(spread.mean),
        "deviation": None if spread.deviation is None else _finite(spread.deviation),
        "interval": [_finite(end) for end in spread.interval] if spread.interval else None,
        "values": [_finite(value) for value in spread.values],
    }


def _of_frontier(frontier: Frontier) -> dict[str, Any]:
    return {
        "task": frontier.x_label,
        "better": frontier.better,
        "replay": frontier.replay,
        "points": {
            spot.point.name: {
                "task": spot.task.mean,
                "forgetting": spot.forgetting.mean,
                "dominated": spot.is_dominated,
            }
            for spot in frontier.spots
        },
    }


def _of_fit(fit: Fit | str) -> dict[str, Any]:
    if isinstance(fit, str):
        return {"refused": fit}
    return {
        "forgetting_at_0": fit.law.at_zero,
        "B": fit.law.B,
        "alpha": fit.law.alpha,
        "shares": [point.share for point in fit.points],
        "passed_over": list(fit.passed_over),
        "leave_one_out": [_of_prediction(p) for p in fit.leave_one_out],
        "from_two_smallest": [_of_prediction(p) for p in fit.from_smallest],
    }


def _of_prediction(prediction: Prediction) -> dict[str, float]:
    return {
        "share": prediction.share,
        "measured": prediction.measured,
        "predicted": prediction.predicted,
        "error": prediction.error,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
