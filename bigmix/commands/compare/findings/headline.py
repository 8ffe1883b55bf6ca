"""Makes the headline of a comparison: what was kept and lost, by kind of knowledge.

Behaviour comes first where it was measured, then text, chats and other tasks, then the task that
was learned.
"""

from collections.abc import Iterator, Mapping, Sequence

from bigmix.commands.compare.findings.kept import Verdict, is_lost
from bigmix.commands.compare.findings.knowledge import (
    Finding,
    Knowledge,
    KnownBefore,
    findings_of,
    score_lost,
)
from bigmix.commands.compare.findings.phrases import (
    brief,
    brief_numbers,
    clauses_of,
    example_of,
    head_of,
    on_source,
    scores_of,
)
from bigmix.commands.compare.measures import BEHAVIOUR, FORGETTING, LOSS, Spread
from bigmix.commands.compare.points import Arrangement, RunPoint
from bigmix.terminal import share_percent

ABOUT_EQUAL = 0.01  # relative difference of task losses that the headline calls about the same
_MOST_OTHERS = 3  # points that a sentence of the detail is about
_WORDS: dict[Verdict, str] = {  # in the order in which a sentence has them
    "more": "lost",
    "lost": "lost",
    "part": "kept in part",
    "unclear": "perhaps kept",
    "most": "kept",
    "all": "kept",
    "nothing": "not certainly lost",
}
_MOVED = "not kept"  # as "lost", of nats alone, which do not show that answers are worse


def headline_of(
    points: Sequence[RunPoint],
    arrangement: Arrangement,
    known: KnownBefore,
    judged: str | None,
) -> tuple[str, str]:
    """The headline and its detail.

    They are about the first one-way and the first two-way point, those of the main line before
    others, so that none is chosen by its result; about the whole main line where it has more
    points. `judged` is the source of the sentence about a line.
    """
    one, two = reference_of(points, arrangement), _first("two-way", points, arrangement)
    if one is None or two is None:
        return _alone(points[0], known), ""
    main = arrangement.main
    if main[0] is one and len(main) > 2 and judged is not None:
        return _over_shares(main, judged, known), _seeds(points)
    others = [point for point in points if point is not one and point is not two]
    detail = [*_means(one, two, known), *_others(others, one, known)]
    return _of_pair(one, two, known, named=bool(others)), " ".join(detail)


def reference_of(points: Sequence[RunPoint], arrangement: Arrangement) -> RunPoint | None:
    """The one-way point that all others are compared with; None where there is none."""
    return _first("one-way", points, arrangement)


def _first(kind: str, points: Sequence[RunPoint], arrangement: Arrangement) -> RunPoint | None:
    return next((p for p in [*arrangement.main, *points] if p.kind == kind), None)


def _of_pair(one: RunPoint, two: RunPoint, known: KnownBefore, *, named: bool) -> str:
    # A loss of behaviour is reported even where that of one-way training is not known.
    found = [
        finding
        for finding in findings_of(two, one, known)
        if finding.one_way is not None or (finding.kind == BEHAVIOUR and not finding.is_good)
    ]
    chosen = _chosen(found, two)
    if not chosen:
        return "No replay source was evaluated in a one-way and in a two-way run."
    subject = f"Two-way training ({two.name})" if named else "Two-way training"
    clauses = clauses_of(chosen, two, one, named=named)
    return f"{subject} {clauses}{_task_clause(one, two, known)}."


def _chosen(found: Sequence[Finding], two: RunPoint) -> list[Finding]:
    """The finding of each kind that the headline is about: of the sources, the one that one-way
    training lost most of, those that the two-way run replayed before others; of tasks all.
    """
    chosen = []
    kinds: dict[Knowledge, list[Finding]] = {}
    for finding in found:
        kinds.setdefault(finding.kind, []).append(finding)
    for kind, of_kind in kinds.items():
        if kind in (BEHAVIOUR, "task"):
            chosen += of_kind
            continue
        own = [f for f in of_kind if f.name in two.runs[0].sources] or of_kind
        chosen.append(max(own, key=lambda f: f.one_way.mean if f.one_way else 0.0))
    return chosen


def _alone(point: RunPoint, known: KnownBefore) -> str:
    """The headline of points that are all of one kind."""
    parts = []
    found = findings_of(point, None, known)
    for finding in found:
        if finding.kind == BEHAVIOUR:
            parts += [_behaviour_alone(finding, point)] if is_lost(finding.loss) else []
        elif finding.kind == "task":
            parts.append(f"lost part of the task `{finding.name}` ({scores_of(finding, point)})")
        else:
            where = on_source(finding.kind, finding.name)
            parts.append(f"forgot {finding.loss.mean:.2f} nats/token {where}")
    for task in known.learned:
        if (loss := point.source(task, FORGETTING)) is not None:
            parts.append(f"gained {0.0 - loss.mean:.2f} nats/token on `{task}`")
    other = "two-way" if point.kind == "one-way" else "one-way"
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    start = f"{point.kind.capitalize()} training ({point.name}) {listed or 'was not evaluated'}"
    return f"{start}; no {other} run was given to compare it with."


def _behaviour_alone(finding: Finding, point: RunPoint) -> str:
    example = example_of(point)
    if finding.measure == FORGETTING:
        shown = f" ({example[0]})" if example else ""
        return f"forgot {finding.loss.mean:.2f} nats/token of the base's answers{shown}"
    numbers = [*example, scores_of(finding, point)]
    return f"lost the base's behaviour ({'; '.join(numbers)})"


def _over_shares(main: Sequence[RunPoint], source: str, known: KnownBefore) -> str:
    """The headline on a line of shares: the smallest and the largest against none."""
    one, least, most = main[0], main[1], main[-1]
    values = [_mean(point.source(source, FORGETTING)) for point in (one, least, most)]
    where = on_source(known.sources[source], source).removeprefix("on ")
    return (
        f"{_behaviour_over_shares(main, known)}"
        f"Without replay training forgot {values[0]:.2f} nats/token of {where}, with"
        f" {share_percent(least.written_share)} of replay {values[1]:.2f}, with"
        f" {share_percent(most.written_share)} {values[2]:.2f}{_task_ranges(main, known)}."
    )


def _mean(spread: Spread | None) -> float:
    return 0.0 if spread is None else spread.mean


def _behaviour_over_shares(main: Sequence[RunPoint], known: KnownBefore) -> str:
    """A sentence on behaviour at each share, empty where it was not measured: where it was lost
    first, with an answer at the largest of these shares.
    """
    words = [*dict.fromkeys(_WORDS.values())]
    places: dict[str, list[RunPoint]] = {w: [] for w in (words[0], _MOVED, *words[1:])}
    for point in main[1:]:
        for finding in findings_of(point, main[0], known):
            if finding.kind == BEHAVIOUR and finding.one_way is not None:
                word = _WORDS[finding.verdict]
                is_nats = finding.measure == FORGETTING
                places[_MOVED if word == "lost" and is_nats else word].append(point)
    parts = []
    for word, points in places.items():
        if points:
            shares = [share_percent(point.written_share) for point in points]
            listed = " and ".join([", ".join(shares[:-1]), shares[-1]] if shares[1:] else shares)
            example = example_of(points[-1]) if word in ("lost", _MOVED) else []
            shown = f" (with {shares[-1]}, {example[0]})" if example else ""
            parts.append(f"{word} with {listed} of replay{shown}")
    return f"Behaviour was {', '.join(parts)}. " if parts else ""


def _task_ranges(main: Sequence[RunPoint], known: KnownBefore) -> str:
    """The lowest and the highest loss and first score of each task over all shares."""
    losses = [
        f"{_range(found)} on `{task}`"
        for task in known.learned
        if (found := [s.mean for point in main if (s := point.source(task, LOSS)) is not None])
    ]
    scores = [
        f"{names[0].replace('_', ' ')} of `{task}` {_range(found)}"
        for task, names in known.scores.items()
        if (found := [s.mean for point in main if (s := point.task(task, names[0])) is not None])
    ]
    parts = [*([f"the task loss is {' and '.join(losses)}"] if losses else []), *scores]
    return f"; over all shares {', '.join(parts)}" if parts else ""


def _range(values: Sequence[float]) -> str:
    ends = (f"{min(values):.2f}", f"{max(values):.2f}")
    return " to ".join(dict.fromkeys(ends))


def _seeds(points: Sequence[RunPoint]) -> str:
    counts = [len(point.runs) for point in points]
    shown = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    runs = sum(counts)
    return (
        f"{len(points)} points of {shown} {'seed' if shown == '1' else 'seeds'}, {runs} runs."
        if runs > 1
        else ""
    )


def _task_clause(one: RunPoint, two: RunPoint, known: KnownBefore) -> str:
    """The losses of the tasks that were learned, and the scores next to them."""
    scores = _scores(one, two, known)
    losses = {
        task: (ones.mean, twos.mean)
        for task in known.learned
        if (ones := one.source(task, LOSS)) and (twos := two.source(task, LOSS))
    }
    clauses = [
        _task_comparison(
            *pair,
            on=f" on `{task}`" if len(losses) > 1 else "",
            score=scores.pop(task, ""),
        )
        for task, pair in losses.items()
    ]
    others = [f"`{task}` {score}" for task, score in scores.items()]
    if not clauses:
        return f"; {', '.join(others)}" if others else ""
    return f" at {' and '.join(clauses)}{', '.join(['', *others])}"


def _scores(one: RunPoint, two: RunPoint, known: KnownBefore) -> dict[str, str]:
    """The first score of each task in both points, apart from tasks that are worse than the base:
    they are among what was lost.
    """
    found = {}
    for task, names in known.scores.items():
        ones, twos = (point.task(task, names[0]) for point in (one, two))
        losses = [score_lost(point, task, names[0]) for point in (one, two)]
        is_worse = any(loss is not None and is_lost(loss) for loss in losses)
        if ones and twos and (task in known.learned or not is_worse):
            label = names[0].replace("_", " ")
            found[task] = f"{label} {twos.mean:.2f} against {ones.mean:.2f}"
    return found


def _task_comparison(one: float, two: float, *, on: str, score: str) -> str:
    if f"{one:.2f}" == f"{two:.2f}":
        which = "the same"
    elif abs(two - one) <= ABOUT_EQUAL * one:
        which = "about the same"
    else:
        which = "a lower" if two < one else "a higher"
    shown = "; ".join([f"{two:.2f} against {one:.2f}", *([score] if score else [])])
    return f"{which} task loss{on} ({shown})"


def _others(points: Sequence[RunPoint], one: RunPoint, known: KnownBefore) -> Iterator[str]:
    """A sentence on each point that the headline is not about; none where there are many."""
    for point in points if len(points) <= _MOST_OTHERS else ():
        found = _chosen(findings_of(point, one, known), point)
        parts = [f"{head_of(f)} {brief(f)} ({brief_numbers(f, point)})" for f in found]
        if parts:
            yield f"{point.name}: {', '.join(parts)}."


def _means(one: RunPoint, two: RunPoint, known: KnownBefore) -> Iterator[str]:
    """A sentence on each kind of which several sources were evaluated in both points."""
    kinds: dict[Knowledge, list[str]] = {}
    for name, kind in known.sources.items():
        if all(point.source(name, FORGETTING) is not None for point in (one, two)):
            kinds.setdefault(kind, []).append(name)
    labels: Mapping[Knowledge, str] = {"text": "text ", "chats": "chat ", "data": "replay "}
    for kind, names in kinds.items():
        if len(names) > 1:
            means = [
                sum(_mean(point.source(name, FORGETTING)) for name in names) / len(names)
                for point in (two, one)
            ]
            yield (
                f"Over all {len(names)} {labels[kind]}sources the mean forgetting is"
                f" {means[0]:.2f} against {means[1]:.2f} nats/token."
            )
