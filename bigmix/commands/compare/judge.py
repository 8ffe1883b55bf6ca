"""Draws the conclusions of a comparison: points, the base, what was kept and learned, a headline,
and warnings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.findings.headline import headline_of, reference_of
from bigmix.commands.compare.findings.knowledge import (
    Finding,
    Knowledge,
    KnownBefore,
    findings_of,
)
from bigmix.commands.compare.findings.warnings import unmeasured_behaviour, warnings_of
from bigmix.commands.compare.law import Fit, fit_source
from bigmix.commands.compare.measures import FORGETTING
from bigmix.commands.compare.points import Arrangement, RunPoint, arrange, points_of
from bigmix.commands.compare.read import FinishedRun, ReadRun
from bigmix.evaluation.bootstrap import Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that the page, the tables and the summary are made of.

    `roles` are those of the evaluated sources. `base`, `base_tasks` and `base_behaviour` have the
    measures of the model before the first step, by source, by task, and of behaviour; `known` says
    what of that the base knew. `findings` is what each point kept of it, by the point's name,
    against `reference`, the one-way point; None where there is none. `judged` is the replay source
    that the frontiers are about. `fits` has the law of each replay source, or the reason why there
    is none. `headline` says what was kept and lost, `detail` what else is to be known, and may be
    empty.
    """

    runs: Sequence[FinishedRun]
    points: Sequence[RunPoint]
    arrangement: Arrangement
    roles: Mapping[str, str]
    base: Mapping[str, Mapping[str, Estimate]]
    base_tasks: Mapping[str, Mapping[str, Estimate]]
    base_behaviour: Mapping[str, Estimate]
    known: KnownBefore
    reference: RunPoint | None
    findings: Mapping[str, Sequence[Finding]]
    judged: str | None
    fits: Mapping[str, Fit | str]
    headline: str
    detail: str
    warnings: Sequence[str]

    @property
    def scores(self) -> Mapping[str, Sequence[str]]:
        """The names of each task's scores."""
        return self.known.scores

    @property
    def tasks(self) -> list[str]:
        """The evaluated task sources."""
        return [name for name, role in self.roles.items() if role == "task"]

    @property
    def replays(self) -> list[str]:
        """The evaluated sources of what the base knew."""
        return [name for name, role in self.roles.items() if role == "replay"]


def judge(found: ReadRun) -> Comparison:
    """Compare the runs. The base of a source is that of the first run that evaluated it."""
    runs = found.runs
    base: dict[str, Mapping[str, Estimate]] = {}
    base_tasks: dict[str, Mapping[str, Estimate]] = {}
    base_behaviour: Mapping[str, Estimate] = {}
    for run in runs:
        base = {**run.first.sources, **base}
        base_tasks = {**run.first.tasks, **base_tasks}
        base_behaviour = base_behaviour or run.first.behaviour
    points = points_of(runs)
    arrangement = arrange(points)
    roles = _roles(runs, base)
    replays = [name for name, role in roles.items() if role == "replay"]
    known = KnownBefore(
        sources=_kinds(runs, replays),
        scores=_scores(runs),
        learned=[name for name, role in roles.items() if role == "task"],
    )
    judged = _judged(arrangement.main, replays)
    reference = reference_of(points, arrangement)
    headline, detail = headline_of(points, arrangement, known, judged)
    return Comparison(
        runs=runs,
        points=points,
        arrangement=arrangement,
        roles=roles,
        base=base,
        base_tasks=base_tasks,
        base_behaviour=base_behaviour,
        known=known,
        reference=reference,
        findings={
            point.name: findings_of(point, None if point is reference else reference, known)
            for point in points
        },
        judged=judged,
        fits={name: fit_source(arrangement.main, name) for name in replays},
        headline=headline,
        detail=" ".join(filter(None, [unmeasured_behaviour(runs), detail])),
        warnings=list(warnings_of(found, base, points)),
    )


def _roles(runs: Sequence[FinishedRun], base: Mapping[str, object]) -> dict[str, str]:
    """The role of each evaluated source, task sources first.

    A source that is only evaluated has the role replay, unless a run trains it as a task.
    """
    tasks = {name for run in runs for name, source in run.sources.items() if source.role == "task"}
    ordered = sorted(base, key=lambda name: name not in tasks)
    return {name: "task" if name in tasks else "replay" for name in ordered}


def _kinds(runs: Sequence[FinishedRun], sources: Sequence[str]) -> dict[str, Knowledge]:
    """What is in each source, as the first run has it that knows."""
    kinds: dict[str, Knowledge] = {}
    for name in sources:
        known = [run.chats[name] for run in runs if name in run.chats]
        kinds[name] = "data" if not known else "chats" if known[0] else "text"
    return kinds


def _scores(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for task, scores in run.final.tasks.items():
            found.setdefault(task, {}).update(dict.fromkeys(scores))
    return {task: list(scores) for task, scores in found.items()}


def _judged(points: Sequence[RunPoint], replays: Sequence[str]) -> str | None:
    """The replay source that one-way training lost most of. Sources that some point replays come
    before those that none was trained on, which are kept only as far as they are similar.
    """
    lost = {
        (point.name, name): point.source(name, FORGETTING) for point in points for name in replays
    }
    known = [name for name in replays if all(lost[point.name, name] for point in points)]
    trained = {name for point in points for name in point.runs[0].sources}
    own = [name for name in known if name in trained] or known or list(replays)
    first = {name: lost[points[0].name, name] for name in own}
    return max(own, key=lambda n: spread.mean if (spread := first[n]) else 0.0, default=None)
