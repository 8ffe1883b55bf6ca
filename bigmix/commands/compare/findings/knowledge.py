"""Finds what a point lost and kept of each kind of knowledge: behaviour, text, chats, other tasks.

They are different things: a model may keep its loss on text and no longer answer a question.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bigmix.commands.compare.findings.answers import (
    ComparedAnswer,
    instructions_lost,
    sentences_lost,
)
from bigmix.commands.compare.findings.kept import GOOD, VERDICTS, Verdict, is_lost, verdict_of
from bigmix.commands.compare.measures import (
    BEHAVIOUR,
    FORGETTING,
    INSTRUCTIONS,
    SENTENCES,
    Spread,
    drop,
    spread_of_known,
)
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import FinishedRun
from bigmix.evaluation.bootstrap import Estimate

# Sources of unknown kind are "data": the logs of earlier versions do not say what is in them.
Knowledge = Literal["behaviour", "text", "chats", "data", "task"]
KINDS: tuple[Knowledge, ...] = (BEHAVIOUR, "text", "chats", "data", "task")
# In this order where several are lost equally: the first two say more than nats.
_OF_BEHAVIOUR = (INSTRUCTIONS, SENTENCES, FORGETTING)

_PAIRED: Mapping[str, Callable[[Sequence[ComparedAnswer]], Estimate | None]] = {
    INSTRUCTIONS: instructions_lost,
    SENTENCES: sentences_lost,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a point kept of one thing that the base knew.

    `name` is that of a held-out source or a task, `measure` what the verdict is about. `loss` is
    how much the point lost in that measure, `one_way` how much the one-way point did; None where
    that is not known, or the point is the one-way point.
    """

    kind: Knowledge
    name: str
    measure: str
    loss: Spread
    one_way: Spread | None
    verdict: Verdict

    @property
    def is_good(self) -> bool:
        """Whether nothing or little of it was lost."""
        return self.verdict in GOOD


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBefore:
    """What the base knew: held-out sources by name with their kind, and the names of each task's
    scores.

    `learned` are the task sources; a task of the same name is no knowledge of the base.
    """

    sources: Mapping[str, Knowledge]
    scores: Mapping[str, Sequence[str]]
    learned: Sequence[str]


def findings_of(point: RunPoint, one_way: RunPoint | None, known: KnownBefore) -> list[Finding]:
    """What a point lost and kept against a one-way point, in the order of KINDS."""
    found = [
        *_behaviour(point, one_way),
        *_sources(point, one_way, known.sources),
        *_tasks(point, one_way, known),
    ]
    return sorted(found, key=lambda finding: KINDS.index(finding.kind))


def _behaviour(point: RunPoint, one_way: RunPoint | None) -> Iterator[Finding]:
    """The finding of the measure that was kept least."""
    found = [
        _finding(BEHAVIOUR, BEHAVIOUR, measure, loss, behaviour_lost(one_way, measure))
        for measure in _OF_BEHAVIOUR
        if (loss := behaviour_lost(point, measure)) is not None
    ]
    if found:
        yield max(found, key=_severity)


def _severity(finding: Finding) -> tuple[int, bool]:
    """How much a finding weighs among those of behaviour; where nothing was lost, one of a measure
    that one-way training did lose comes first.
    """
    could_lose = finding.one_way is not None and is_lost(finding.one_way)
    return VERDICTS.index(finding.verdict), could_lose


def behaviour_lost(point: RunPoint | None, measure: str) -> Spread | None:
    """What a point lost in a measure of behaviour: nats per token of the base's answers, or a
    fraction of prompts or answers. None where a run has not measured it, or without a point.
    """
    runs = () if point is None else point.runs
    return spread_of_known([_behaviour_lost(run, measure) for run in runs])


def _behaviour_lost(run: FinishedRun, measure: str) -> Estimate | None:
    paired = _PAIRED[measure](run.answers) if measure in _PAIRED else None
    if paired is not None:
        return paired
    before, after = (e.behaviour.get(measure) for e in (run.first, run.final))
    if after is None or measure == FORGETTING:
        return after
    return None if before is None else drop(before, after)


def _sources(
    point: RunPoint, one_way: RunPoint | None, kinds: Mapping[str, Knowledge]
) -> Iterator[Finding]:
    for name, kind in kinds.items():
        loss = point.source(name, FORGETTING)
        if loss is not None:
            theirs = None if one_way is None else one_way.source(name, FORGETTING)
            yield _finding(kind, name, FORGETTING, loss, theirs)


def _tasks(point: RunPoint, one_way: RunPoint | None, known: KnownBefore) -> Iterator[Finding]:
    """Tasks in whose first score the point or the one-way point is certainly worse than the base;
    where none is, the task may be the one that was learned.
    """
    for task, scores in known.scores.items():
        loss = score_lost(point, task, scores[0])
        theirs = score_lost(one_way, task, scores[0])
        losses = [each for each in (loss, theirs) if each is not None]
        if loss is None or task in known.learned or not any(map(is_lost, losses)):
            continue
        yield _finding("task", task, scores[0], loss, theirs)


def score_lost(point: RunPoint | None, task: str, score: str) -> Spread | None:
    """How much lower a score is than that of the base, a number from 0 to 1; None where a run or
    its base has no such score, or without a point.
    """
    losses = []
    for run in () if point is None else point.runs:
        before, after = (e.tasks.get(task, {}).get(score) for e in (run.first, run.final))
        losses.append(drop(before, after) if before and after else None)
    return spread_of_known(losses)


def _finding(
    kind: Knowledge, name: str, measure: str, loss: Spread, one_way: Spread | None
) -> Finding:
    return Finding(
        kind=kind,
        name=name,
        measure=measure,
        loss=loss,
        one_way=one_way,
        verdict=verdict_of(loss, one_way),
    )
