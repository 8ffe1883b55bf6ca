"""Draws the conclusions of a comparison: points, the base, what was kept and learned, a headline,
and warnings.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.law import Fit, fit_source
from bigmix.commands.compare.measures import FORGETTING, LOSS
from bigmix.commands.compare.points import Arrangement, RunPoint, arrange, points_of
from bigmix.commands.compare.read import BASE, FinishedRun, ReadRun
from bigmix.evaluation.bootstrap import Estimate
from bigmix.terminal import share_percent

SAME_BASE = 1e-3  # relative difference of losses at step 0; kernels and numbers of GPUs make less
SAME_TOKENS = 0.02  # relative difference of task tokens; the last step is not cut to the token
_MAX_REASONS = 8  # why results were left out; how many were is reported in any case
LEAST_SHOWN = 0.005  # nats/token: the headline has two decimals
ABOUT_EQUAL = 0.01  # relative difference of task losses that the headline calls about the same


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that the page, the tables and the summary are made of.

    `roles` are those of the evaluated sources. `base` and `base_tasks` have the measures of the
    model before the first step, by source and by task, `scores` the names of each task's scores.
    `judged` is the replay source that the headline and the frontiers are about. `fits` has the law
    of each replay source, or the reason why there is none. `headline` is one sentence, `detail`
    another one or empty.
    """

    runs: Sequence[FinishedRun]
    points: Sequence[RunPoint]
    arrangement: Arrangement
    roles: Mapping[str, str]
    base: Mapping[str, Mapping[str, Estimate]]
    base_tasks: Mapping[str, Mapping[str, Estimate]]
    scores: Mapping[str, Sequence[str]]
    judged: str | None
    fits: Mapping[str, Fit | str]
    headline: str
    detail: str
    warnings: Sequence[str]

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
    for run in runs:
        base = {**run.first.sources, **base}
        base_tasks = {**run.first.tasks, **base_tasks}
    points = points_of(runs)
    arrangement = arrange(points)
    roles = _roles(runs, base)
    replays = [name for name, role in roles.items() if role == "replay"]
    headline, detail = _headline(points, arrangement, roles)
    return Comparison(
        runs=runs,
        points=points,
        arrangement=arrangement,
        roles=roles,
        base=base,
        base_tasks=base_tasks,
        scores=_scores(runs),
        judged=_judged(arrangement.main, replays),
        fits={name: fit_source(arrangement.main, name) for name in replays},
        headline=headline,
        detail=detail,
        warnings=list(_warnings(found, base, points)),
    )


def lost(point: RunPoint, source: str) -> float | None:
    """Held-out loss after training minus that before it, in nats/token, the mean over seeds; above
    0 where knowledge was lost.
    """
    spread = point.source(source, FORGETTING)
    return None if spread is None else spread.mean


def gained(point: RunPoint, source: str) -> float | None:
    """Held-out loss before training minus that after it, in nats/token, the mean over seeds; above
    0 where the model learned.
    """
    value = lost(point, source)
    return None if value is None else 0.0 - value


def _roles(runs: Sequence[FinishedRun], base: Mapping[str, object]) -> dict[str, str]:
    """The role of each evaluated source, task sources first.

    A source that is only evaluated has the role replay, unless a run trains it as a task.
    """
    tasks = {name for run in runs for name, source in run.sources.items() if source.role == "task"}
    ordered = sorted(base, key=lambda name: name not in tasks)
    return {name: "task" if name in tasks else "replay" for name in ordered}


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
    known = [name for name in replays if all(lost(point, name) is not None for point in points)]
    trained = {name for point in points for name in point.runs[0].sources}
    own = [name for name in known if name in trained] or known or list(replays)
    return max(own, key=lambda name: lost(points[0], name) or 0.0, default=None)


def _headline(
    points: Sequence[RunPoint], arrangement: Arrangement, roles: Mapping[str, str]
) -> tuple[str, str]:
    """The headline and its detail.

    They are about the first one-way and the first two-way point, those of the main line before
    others, so that none is chosen by its result.
    """
    by_settings = [*arrangement.main, *points]
    one = next((point for point in by_settings if point.kind == "one-way"), None)
    two = next((point for point in by_settings if point.kind == "two-way"), None)
    replays = [name for name, role in roles.items() if role == "replay"]
    tasks = [name for name, role in roles.items() if role == "task"]
    if one is None or two is None:
        return _alone(points[0], replays, tasks), ""
    main = arrangement.main
    if main[0].kind == "one-way" and len(main) > 2 and (judged := _judged(main, replays)):
        return _over_shares(main, judged, tasks), _seeds(points)
    both = [name for name in replays if _evaluated(name, one, two)]
    if not both:
        return "No replay source was evaluated in a one-way and in a two-way run.", ""
    # The headline is about a source that the two-way run replayed; the others are in the detail.
    own = [name for name in both if name in two.runs[0].sources] or both
    worst = max(own, key=lambda name: lost(one, name) or 0.0)
    kept = _kept(one, two, worst, named=len(points) > 2)
    detail = _mean_sentence(one, two, both) if len(both) > 1 else ""
    return f"{kept}{_task_clause(one, two, tasks)}.", detail


def _over_shares(main: Sequence[RunPoint], source: str, tasks: Sequence[str]) -> str:
    """The headline on a line of shares: the smallest and the largest against none."""
    one, least, most = main[0], main[1], main[-1]
    values = [lost(point, source) or 0.0 for point in (one, least, most)]
    losses = [
        f"{' to '.join(dict.fromkeys([f'{min(ends):.2f}', f'{max(ends):.2f}']))} on `{task}`"
        for task in tasks
        if (ends := [s.mean for point in main if (s := point.source(task, LOSS)) is not None])
    ]
    at = f"; over all shares the task loss is {' and '.join(losses)}" if losses else ""
    return (
        f"Without replay training forgot {values[0]:.2f} nats/token of `{source}`, with"
        f" {share_percent(least.written_share)} of replay {values[1]:.2f}, with"
        f" {share_percent(most.written_share)} {values[2]:.2f}{at}."
    )


def _seeds(points: Sequence[RunPoint]) -> str:
    counts = [len(point.runs) for point in points]
    shown = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
    runs = sum(counts)
    return (
        f"{len(points)} points of {shown} {'seed' if shown == '1' else 'seeds'}, {runs} runs."
        if runs > 1
        else ""
    )


def _evaluated(source: str, *points: RunPoint) -> bool:
    return all(lost(point, source) is not None for point in points)


def _alone(point: RunPoint, replays: Sequence[str], tasks: Sequence[str]) -> str:
    forgot = {name: value for name in replays if (value := lost(point, name)) is not None}
    learned = {name: value for name in tasks if (value := gained(point, name)) is not None}
    parts = [f"forgot {value:.2f} nats/token on `{name}`" for name, value in forgot.items()]
    parts += [f"gained {value:.2f} nats/token on `{name}`" for name, value in learned.items()]
    other = "two-way" if point.kind == "one-way" else "one-way"
    found = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    start = f"{point.kind.capitalize()} training ({point.name}) {found or 'was not evaluated'}"
    return f"{start}; no {other} run was given to compare it with."


def _kept(one: RunPoint, two: RunPoint, source: str, *, named: bool) -> str:
    lost_one, lost_two = lost(one, source) or 0.0, lost(two, source) or 0.0
    ones = f"one-way training ({one.name})" if named else "one-way training"
    twos = f"Two-way training ({two.name})" if named else "Two-way training"
    numbers = f"(forgetting {lost_two:.2f} against {lost_one:.2f} nats/token)"
    if not _is_lost(one, source):
        return f"{twos} had nothing to keep on `{source}`: {ones} did not lose it {numbers}"
    if lost_two > lost_one:
        return f"{twos} lost more than {ones} on `{source}` {numbers}"
    if lost_two <= 0:
        return f"{twos} kept all of what {ones} lost on `{source}` {numbers}"
    # Rounded down, so that 99.6 % is not shown as 100 %.
    kept = int(100 * (1 - lost_two / lost_one))
    return f"{twos} kept {kept} % of what {ones} lost on `{source}` {numbers}"


def _is_lost(point: RunPoint, source: str) -> bool:
    """Whether forgetting is large enough to be shown and certainly above 0: by its interval, or
    with each of several seeds.
    """
    found = point.source(source, FORGETTING)
    if found is None or found.mean < LEAST_SHOWN:
        return False
    least = found.estimate.low if len(found.values) == 1 else min(found.values)
    return math.isnan(least) or least > 0


def _task_clause(one: RunPoint, two: RunPoint, tasks: Sequence[str]) -> str:
    losses = {
        task: (ones.mean, twos.mean)
        for task in tasks
        if (ones := one.source(task, LOSS)) and (twos := two.source(task, LOSS))
    }
    clauses = [
        _task_comparison(*pair, on=f" on `{task}`" if len(losses) > 1 else "")
        for task, pair in losses.items()
    ]
    return " at " + " and ".join(clauses) if clauses else ""


def _task_comparison(one: float, two: float, *, on: str) -> str:
    if f"{one:.2f}" == f"{two:.2f}":
        which = "the same"
    elif abs(two - one) <= ABOUT_EQUAL * one:
        which = "about the same"
    else:
        which = "a lower" if two < one else "a higher"
    return f"{which} task loss{on} ({two:.2f} against {one:.2f})"


def _mean_sentence(one: RunPoint, two: RunPoint, sources: Sequence[str]) -> str:
    means = [sum(lost(point, s) or 0.0 for s in sources) / len(sources) for point in (two, one)]
    return (
        f"Over all {len(sources)} replay sources the mean forgetting is "
        f"{means[0]:.2f} against {means[1]:.2f} nats/token."
    )


def _warnings(
    found: ReadRun, base: Mapping[str, Mapping[str, Estimate]], points: Sequence[RunPoint]
) -> Iterator[str]:
    if found.left_out:
        yield (
            f"{len(found.left_out)} results in the given folders are left out,"
            f" {len(found.runs)} are compared: "
            + "; ".join(found.left_out[:_MAX_REASONS])
            + (f"; and {more} more" if (more := len(found.left_out) - _MAX_REASONS) > 0 else "")
        )
    for run in found.runs:
        yield from _other_start(run, found.runs, base)
        for name in run.final.diverged:
            yield (
                f"{run.name} has no finite loss on `{name}` at step {run.final.step}; its cells are"
                " empty."
            )
        known = {*run.final.sources, *run.final.diverged}
        absent = [f"`{name}`" for name in base if name not in known]
        if absent:
            yield f"{run.name} was not evaluated on {', '.join(absent)}; its cells are empty."
    yield from _repeated(points)
    yield from _unequal_tokens(found.runs)


def _other_start(
    run: FinishedRun, runs: Sequence[FinishedRun], base: Mapping[str, Mapping[str, Estimate]]
) -> Iterator[str]:
    """A warning for each source on which a run is not comparable: it was evaluated on other data
    than the first run that was, or it began as another model.
    """
    for name, measures in run.first.sources.items():
        first = next(other for other in runs if name in other.first.sources)
        ours, theirs = (r.first.sizes.get(name) for r in (run, first))
        loss, of_base = measures[LOSS].value, base[name][LOSS].value
        if ours and theirs and ours != theirs:
            yield (
                f"{run.name} was evaluated on other held-out data of `{name}` than {first.name}:"
                f" {ours}, not {theirs}. Its numbers on that source are not comparable."
            )
        elif abs(loss - of_base) > SAME_BASE * abs(of_base):
            yield (
                f"{run.name} does not start from the {BASE} of the other runs: its loss on `{name}`"
                f" at step 0 is {loss:.4f}, not {of_base:.4f}. Its forgetting is measured from its"
                " own start; its other numbers are not comparable."
            )


def _repeated(points: Sequence[RunPoint]) -> Iterator[str]:
    """A warning for each point with the settings of an earlier one, whose seeds it repeats."""
    firsts: dict[tuple[tuple[str, str], ...], RunPoint] = {}
    for point in points:
        first = firsts.setdefault(tuple(point.settings.items()), point)
        if first is not point:
            yield (
                f"{point.name} has the recipe and a seed of {first.name}: it is a point of its own,"
                f" not a further seed of {first.name}."
            )


def _unequal_tokens(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """A warning where task tokens differ. Runs whose budget is `total_tokens` are not among them:
    with more replay they have fewer task tokens by design.
    """
    tokens = {
        run.name: run.task_tokens
        for run in runs
        if run.task_tokens is not None and run.settings.get("budget.total_tokens", "–") == "–"
    }
    if tokens and max(tokens.values()) - min(tokens.values()) > SAME_TOKENS * max(tokens.values()):
        ends = {min(tokens, key=tokens.__getitem__), max(tokens, key=tokens.__getitem__)}
        shown = ", ".join(f"{name} {count:,}" for name, count in tokens.items() if name in ends)
        among = f"; least and most of {len(tokens)} runs" if len(tokens) > 2 else ""
        yield (
            f"The runs were not trained on the same number of task tokens ({shown}{among}); compare"
            " the curves at equal task tokens, not the last numbers."
        )
