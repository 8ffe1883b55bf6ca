"""Groups runs into points, which differ in their seed alone, and points into lines over replay's
share.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, takewhile
from pathlib import Path

from bigmix.commands.compare.measures import Evaluation, Spread, spread_of_known
from bigmix.commands.compare.read import (
    BASE,
    SEED_FOLDER,
    FinishedRun,
    RunKind,
    names_of,
)

_FREE = {"seed", "output"}  # what may differ between the runs of a point
# A key among the settings of a model that was evaluated outside of a run.
EVALUATED_MODEL = "evaluated model"

PointSettings = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPoint:
    """The runs of one recipe, which differ in their seed alone; `settings` are by dotted key."""

    name: str
    runs: Sequence[FinishedRun]
    settings: PointSettings

    @property
    def kind(self) -> RunKind:
        """Whether only task sources were trained, or replay as well."""
        return self.runs[0].kind

    @property
    def share(self) -> float | None:
        """Replay's part of all rows as logged, the mean over seeds: 0 for one-way training, None
        where it is not known.
        """
        known = [run.replay_share for run in self.runs]
        return None if None in known else sum(s for s in known if s is not None) / len(known)

    @property
    def written_share(self) -> float | None:
        """Replay's part of all rows as the recipe has it, or as logged where that is not one
        number.
        """
        sources = self.runs[0].sources.values()
        written = [source.share for source in sources if source.role == "replay"]
        return self.share if None in written else sum(s for s in written if s is not None)

    def source(self, source: str, measure: str) -> Spread | None:
        """A measure of a held-out source after the last step; None where a run lacks it."""
        return spread_of_known(
            [run.final.sources.get(source, {}).get(measure) for run in self.runs]
        )

    def task(self, task: str, score: str) -> Spread | None:
        """A score of a task after the last step; None where a run lacks it."""
        return spread_of_known([run.final.tasks.get(task, {}).get(score) for run in self.runs])

    def behaviour(self, measure: str) -> Spread | None:
        """A measure of behaviour after the last step; None where a run lacks it."""
        return spread_of_known([run.final.behaviour.get(measure) for run in self.runs])

    def shared_steps(self) -> list[list[Evaluation]]:
        """The evaluations of all runs at each step at which all were evaluated, then those after
        their last steps where these differ.
        """
        steps = set.intersection(*({e.step for e in run.evaluations} for run in self.runs))
        found = [
            [e for run in self.runs for e in run.evaluations if e.step == step]
            for step in sorted(steps)
        ]
        final = [run.final for run in self.runs]
        return found if final in found else [*found, final]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareLine:
    """Points that differ in replay's share alone, by share, the one-way point first.

    `name` is what the line has otherwise than the first one, empty for that one.
    """

    name: str
    points: Sequence[RunPoint]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """The points as lines over replay's share, the longest one first, and those outside of
    lines.
    """

    lines: Sequence[ShareLine]
    remedies: Sequence[RunPoint]

    @property
    def main(self) -> Sequence[RunPoint]:
        """The points of the first line."""
        return self.lines[0].points

    @property
    def ordered(self) -> list[RunPoint]:
        """All points: those of the lines, by share, then the others."""
        return [*(point for line in self.lines for point in line.points), *self.remedies]


def points_of(runs: Sequence[FinishedRun]) -> list[RunPoint]:
    """Runs grouped by recipe, leaving out seed and output, in the order given.

    A run that repeats the recipe and the seed of another is a point of its own: its numbers say
    nothing about other seeds.
    """
    grouped: dict[tuple[frozenset[tuple[str, str]], int], list[FinishedRun]] = {}
    seen: Counter[tuple[frozenset[tuple[str, str]], int]] = Counter()
    for run in runs:
        settings = frozenset(_settings(run).items())
        grouped.setdefault((settings, seen[settings, run.seed]), []).append(run)
        seen[settings, run.seed] += 1
    names = _point_names(list(grouped.values()))
    return [
        RunPoint(name=name, runs=group, settings=dict(sorted(settings)))
        for name, ((settings, _), group) in zip(names, grouped.items(), strict=True)
    ]


def _settings(run: FinishedRun) -> dict[str, str]:
    settings = {key: value for key, value in run.settings.items() if key not in _FREE}
    if run.model is not None:
        settings[EVALUATED_MODEL] = SEED_FOLDER.sub("seed-*", run.model)
    return settings


def _point_names(groups: Sequence[Sequence[FinishedRun]]) -> list[str]:
    """A name for each group: of the folder that its runs are in, apart from folders of seeds, or
    else what the names of its runs begin with. No two groups get one name.
    """
    folders = []
    for runs in groups:
        alike = {_without_seed(run.folder.resolve()) for run in runs}
        folders.append(alike.pop() if len(alike) == 1 else None)
    known = [folder for folder in folders if folder is not None]
    unique = [folder for folder in known if known.count(folder) == 1]
    named = dict(zip(unique, names_of(unique), strict=True))
    taken, found = {BASE, *named.values()}, []
    for runs, folder in zip(groups, folders, strict=True):
        first = runs[0].name
        numbered = (f"{first} ({number})" for number in count(2))
        others = chain((_beginning([run.name for run in runs]), first), numbered)
        free = (name for name in others if name and name not in taken)
        found.append(named[folder] if folder in named else next(free))
        taken.add(found[-1])
    return found


def _without_seed(folder: Path) -> Path:
    return Path(*(part for part in folder.parts if not SEED_FOLDER.fullmatch(part)))


def _beginning(names: Sequence[str]) -> str:
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).rstrip("-_./ ")


def arrange(points: Sequence[RunPoint]) -> Arrangement:
    """Find the points that differ in replay's share alone. A line has two shares above 0 or more,
    unless it is the first one.
    """
    rests = [_without_replay(point) for point in points]
    mixes = [_mix(point) for point in points]
    groups: dict[tuple[str, str], list[RunPoint]] = {}
    for point, rest, mix in zip(points, rests, mixes, strict=True):
        if point.kind == "two-way":
            groups.setdefault((rest, mix), []).append(point)
    common = Counter(rests).most_common(1)[0][0]
    first = max(groups, key=lambda key: (key[0] == common, len(groups[key])), default=(common, ""))
    others = [key for key, members in groups.items() if key != first and len(members) > 1]
    lines = []
    for rest, mix in [first, *others]:
        alone = [
            p for p, own in zip(points, rests, strict=True) if p.kind == "one-way" and own == rest
        ]
        members = [*alone, *groups.get((rest, mix), [])]
        lines.append(ShareLine(name="", points=sorted(members, key=lambda p: p.share or 0.0)))
    placed = {id(point) for line in lines for point in line.points}
    return Arrangement(
        lines=[lines[0], *(_named(line, lines[0]) for line in lines[1:])],
        remedies=[point for point in points if id(point) not in placed],
    )


def _named(line: ShareLine, main: ShareLine) -> ShareLine:
    """The line with a name made of up to two settings in which it differs from the first line."""
    ours, theirs = line.points[-1].settings, main.points[-1].settings
    keys = [
        key
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key) and not key.endswith((".share", ".held_out"))
    ]
    settings = [f"{key.split('.')[-1]} {ours.get(key, 'none')}" for key in keys[:2]]
    return ShareLine(name=", ".join(settings), points=line.points)


def _replays(point: RunPoint) -> list[str]:
    return [name for name, source in point.runs[0].sources.items() if source.role == "replay"]


def _without_replay(point: RunPoint) -> str:
    """All settings except those of replay and of sources that are only evaluated, as one text that
    is equal where they are.
    """
    ours = tuple(f"sources.{name}." for name in _replays(point))
    kept = [
        f"{key}={value}"
        for key, value in sorted(point.settings.items())
        if not key.startswith((*ours, "held_out", "groups"))
        and not (key.startswith("sources.") and key.endswith((".share", ".held_out")))
    ]
    return "\n".join(kept)


def _mix(point: RunPoint) -> str:
    """The settings of replay except a share that is one number, as one text that is equal where
    they are.
    """
    kept = []
    for name in _replays(point):
        is_number = point.runs[0].sources[name].share is not None
        left_out = {f"sources.{name}.held_out", *({f"sources.{name}.share"} if is_number else ())}
        kept += [
            f"{key}={value}"
            for key, value in sorted(point.settings.items())
            if key.startswith(f"sources.{name}.") and key not in left_out
        ]
    return "\n".join(
        [*kept, *(f"{k}={v}" for k, v in point.settings.items() if k.startswith("groups"))]
    )
