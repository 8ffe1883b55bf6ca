"""Compares the results of the replay study with its expectations.

    python benchmarks/study.py REPORT/summary.json ...

Each file is the summary.json of `bigmix compare` over one task of docs/study. The thresholds are
those of a pilot that was run before bigmix, on another machine. An expectation that was not met is
printed as missed, and the exit code is then 1.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from study_overview import draw_overview, overview
from study_summary import Spread, Study, shown, study_of
from table import Table

LEAST_FORGOTTEN = 0.3  # nats/token, one-way: below that there is nothing to keep
MOST_LEFT = {0.01: 0.85, 0.05: 0.55, 0.25: 0.25}  # of one-way's forgetting, by replay's share
MOST_TASK_RISE = 0.02  # nats/token, up to a share of 25 %
LAW_AT, LAW_ERROR = 0.1, 0.15  # of the law that is fitted to 1 and 5 %
SIGMAS = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One expectation; `held` is None where the runs that it needs are missing."""

    name: str
    expected: str
    found: str
    held: bool | None


def verdicts(study: Study) -> Iterator[Verdict]:
    """All expectations in order."""
    line = study.line()
    yield _forgets(study, line)
    yield _falls(study, line)
    yield from _is_kept(study, line)
    yield from _task_is_learned(study, line)
    yield from _per_token_pays(study)
    yield _no_remedy_is_better(study, line)
    yield _law_predicts(study)
    yield _divergence_predicts(study)


def _forgets(study: Study, line: Mapping[float, Any]) -> Verdict:
    found = study.forgetting(line[0.0])
    return Verdict(
        name="F1 one-way training forgets",
        expected=f">= {LEAST_FORGOTTEN}",
        found=shown(found),
        held=found["mean"] >= LEAST_FORGOTTEN,
    )


def _falls(study: Study, line: Mapping[float, Any]) -> Verdict:
    """How far forgetting falls from each share to the next, in standard deviations over seeds of
    the difference of two runs.
    """
    known = [share for share in (0.0, 0.01, 0.05, 0.25) if share in line]
    sigmas = [
        _sigmas(study.forgetting(line[less]), study.forgetting(line[more]))
        for less, more in pairwise(known)
    ]
    return Verdict(
        name="F2 it falls from 0 to 1 to 5 to 25 %",
        expected=f"each by > {SIGMAS:g} sigma",
        found=", ".join(map(_shown, sigmas)),
        held=min(sigmas) > SIGMAS if len(known) == 4 and _are_known(sigmas) else None,
    )


def _is_kept(study: Study, line: Mapping[float, Any]) -> Iterator[Verdict]:
    one_way = study.forgetting(line[0.0])["mean"]
    for share, most in MOST_LEFT.items():
        left = study.forgetting(line[share])["mean"] / one_way if share in line else None
        yield Verdict(
            name=f"F3 forgetting at {share:.0%} of one-way's",
            expected=f"<= {most}",
            found="not run" if left is None else f"{left:.3f}",
            held=None if left is None else left <= most,
        )


def _task_is_learned(study: Study, line: Mapping[float, Any]) -> Iterator[Verdict]:
    one_way = study.loss(line[0.0])["mean"]
    replayed = {share: point for share, point in line.items() if 0 < share < 0.3}
    rises = {share: study.loss(point)["mean"] - one_way for share, point in replayed.items()}
    if not rises:
        return
    worst = max(rises, key=lambda share: rises[share])
    yield Verdict(
        name="F4 task loss with replay up to 25 %",
        expected=f"rises by <= {MOST_TASK_RISE}",
        found=f"{rises[worst]:+.4f} at {worst:.0%}",
        held=rises[worst] <= MOST_TASK_RISE,
    )
    for task, scores in line[0.0]["scores"].items():
        for score in scores if task != "facts" else ():
            falls = {
                share: _sigmas(scores[score], point["scores"][task][score])
                for share, point in replayed.items()
            }
            worst = max(falls, key=lambda share: falls[share])
            yield Verdict(
                name=f"F4 {score} of {task} up to 25 %",
                expected=f"falls by <= {SIGMAS:g} sigma",
                found=(
                    f"{_shown(falls[worst])} at {worst:.0%},"
                    f" {shown(line[worst]['scores'][task][score])}"
                ),
                held=falls[worst] <= SIGMAS if _are_known(falls.values()) else None,
            )


def _per_token_pays(study: Study) -> Iterator[Verdict]:
    """Where the same shares were trained with `per_token`, whether that costs the task."""
    for index, line in enumerate(study.summary["lines"]):
        if "per_token" not in line["name"]:
            continue
        for share, point in study.line(index).items():
            same = study.line().get(share)
            if same is None or not share:
                continue
            rise = study.loss(point)["mean"] - study.loss(same)["mean"]
            sigma = _sigmas(study.loss(point), study.loss(same))
            yield Verdict(
                name=f"F4 per_token at {share:.0%} against per_source",
                expected=f"task loss rises by > {SIGMAS:g} sigma",
                found=f"{rise:+.4f}, {_shown(sigma)} sigma",
                held=sigma > SIGMAS if _are_known([sigma]) else None,
            )


def _no_remedy_is_better(study: Study, line: Mapping[float, Any]) -> Verdict:
    """A remedy without replay is better than a two-way point where it forgets less and has the
    lower task loss.
    """
    in_lines = {name for line in study.summary["lines"] for name in line["points"]}
    remedies = {
        name: point
        for name, point in study.points.items()
        if name not in in_lines and point["kind"] == "one-way"
    }
    two_way = [point for share, point in line.items() if share]
    better = [
        name
        for name, point in remedies.items()
        if any(
            study.forgetting(point)["mean"] < study.forgetting(other)["mean"]
            and study.loss(point)["mean"] < study.loss(other)["mean"]
            for other in two_way
        )
    ]
    return Verdict(
        name=f"F5 of {len(remedies)} remedies without replay, better than a two-way point",
        expected="none",
        found=", ".join(better) or "none",
        held=not better if remedies else None,
    )


def _law_predicts(study: Study) -> Verdict:
    found = study.summary["laws"].get(study.replay, {}).get("from_two_smallest", [])
    errors = [abs(p["error"]) for p in found if abs(p["share"] - LAW_AT) < 0.01]
    return Verdict(
        name="F6 the law of 1 and 5 % at 10 %",
        expected=f"within {LAW_ERROR:.0%}",
        found=f"off by {errors[0]:.0%}" if errors else "not fitted",
        held=errors[0] <= LAW_ERROR if errors else None,
    )


def _divergence_predicts(study: Study) -> Verdict:
    """Whether the divergence from the base on the new task predicts what is forgotten (RL's Razor,
    arXiv:2509.04259).
    """
    pairs = [
        (sources[study.task]["kl_to_base"]["mean"], study.forgetting(point)["mean"])
        for point in study.points.values()
        if "kl_to_base" in (sources := point["sources"])[study.task]
    ]
    if len(pairs) < 3:
        return Verdict(
            name="KL to the base on the task, forgetting",
            expected="rank correlation",
            found="not measured",
            held=None,
        )
    correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return Verdict(
        name="KL to the base on the task, forgetting",
        expected="rank correlation > 0.7",
        found=f"{correlation:.2f} over {len(pairs)} points",
        held=correlation > 0.7,
    )


def _sigmas(more: Spread, less: Spread) -> float:
    """How far the first mean is above the second, in standard deviations over seeds of a difference
    of two runs; NaN where one of them has a single seed.
    """
    if more["deviation"] is None or less["deviation"] is None:
        return math.nan
    sigma = math.hypot(more["deviation"], less["deviation"])
    apart = more["mean"] - less["mean"]
    return apart / sigma if sigma else math.copysign(math.inf, apart) if apart else 0.0


def _are_known(sigmas: Iterable[float]) -> bool:
    return not any(map(math.isnan, sigmas))


def _shown(sigma: float) -> str:
    return "one seed" if math.isnan(sigma) else f"{sigma:.1f}"


def main() -> int:
    """Print a table for each summary, and one of all where there are several; returns 1 where an
    expectation was missed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("summaries", nargs="+", type=Path, metavar="REPORT/summary.json")
    parser.add_argument("--picture", type=Path, help="a PNG of all tasks over replay's share")
    known = parser.parse_args()
    studies = [study_of(path) for path in known.summaries]
    missed = 0
    for study in studies:
        found = list(verdicts(study))
        missed += sum(verdict.held is False for verdict in found)
        marks = {True: "held", False: "MISSED", None: "-"}
        table = Table(
            heading=f"{study.task} after the base of {study.replay}, nats/token",
            columns=("expectation", "expected", "found", ""),
            rows=[(v.name, v.expected, v.found, marks[v.held]) for v in found],
        )
        print(table.text())
    if len(studies) > 1:
        print(overview(studies).text())
    if known.picture is not None:
        draw_overview(studies, known.picture)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
