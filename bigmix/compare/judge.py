"""Runs go in; out comes what they say together: the base, each run's gains and losses, a sentence, the doubts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmix.compare.read import BASE, HeldOut, Run

SAME_BASE = 1e-3  # relative difference of step-0 losses: kernels and numbers of GPUs differ by less
SAME_TOKENS = 0.02  # relative difference of task tokens; the last step is not cut to the token
ABOUT_EQUAL = 0.01  # relative difference of task losses that the headline calls about the same


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that the outputs are drawn from. `base` is the model before the first step, by source.

    `headline` is one sentence; `detail` is a further one, or empty.
    """

    runs: Sequence[Run]
    roles: Mapping[str, str]
    base: Mapping[str, HeldOut]
    headline: str
    detail: str
    warnings: Sequence[str]

    @property
    def tasks(self) -> list[str]:
        """The evaluated task sources."""
        return [name for name, role in self.roles.items() if role == "task"]

    @property
    def replays(self) -> list[str]:
        """The evaluated sources that carry what the base knew."""
        return [name for name, role in self.roles.items() if role == "replay"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What `compare` found and the files that it wrote."""

    comparison: Comparison
    files: Sequence[Path]


def judge(runs: Sequence[Run]) -> Comparison:
    """Put the runs side by side; the first run that evaluated a source gives that source's base."""
    base: dict[str, HeldOut] = {}
    for run in runs:
        base = {**run.first.sources, **base}
    roles = _roles(runs, base)
    headline, detail = _say(runs, roles)
    return Comparison(
        runs=runs,
        roles=roles,
        base=base,
        headline=headline,
        detail=detail,
        warnings=list(_warnings(runs, base)),
    )


def forgetting(run: Run, source: str) -> float | None:
    """Held-out loss after the run minus before it, in nats/token; above 0 the run lost knowledge."""
    before, after = run.first.sources.get(source), run.final.sources.get(source)
    return after.loss - before.loss if before and after else None


def gain(run: Run, source: str) -> float | None:
    """Held-out loss before the run minus after it, in nats/token; above 0 the run learned."""
    lost = forgetting(run, source)
    return None if lost is None else -lost


def _roles(runs: Sequence[Run], base: Mapping[str, HeldOut]) -> dict[str, str]:
    """Task sources first. A source that is only evaluated is replay, unless some run trains it as a task."""
    tasks = {name for run in runs for name, source in run.sources.items() if source.role == "task"}
    ordered = sorted(base, key=lambda name: name not in tasks)
    return {name: "task" if name in tasks else "replay" for name in ordered}


def _say(runs: Sequence[Run], roles: Mapping[str, str]) -> tuple[str, str]:
    """The first one-way and the first two-way run, in the order given: nothing is picked by its result."""
    one = next((run for run in runs if run.kind == "one-way"), None)
    two = next((run for run in runs if run.kind == "two-way"), None)
    replays = [name for name, role in roles.items() if role == "replay"]
    tasks = [name for name, role in roles.items() if role == "task"]
    if one is None or two is None:
        return _alone(runs[0], replays, tasks), ""
    both = [name for name in replays if _evaluated(name, one, two)]
    if not both:
        return "No replay source was evaluated in a one-way and in a two-way run.", ""
    # What the two-way run replayed comes first; what it only kept by kinship is in the second sentence.
    own = [name for name in both if name in two.sources] or both
    worst = max(own, key=lambda name: forgetting(one, name) or 0.0)
    kept = _kept(one, two, worst, named=len(runs) > 2)
    detail = _mean_sentence(one, two, both) if len(both) > 1 else ""
    return f"{kept}{_task_clause(one, two, tasks)}.", detail


def _evaluated(source: str, *runs: Run) -> bool:
    return all(forgetting(run, source) is not None for run in runs)


def _alone(run: Run, replays: Sequence[str], tasks: Sequence[str]) -> str:
    lost = {name: value for name in replays if (value := forgetting(run, name)) is not None}
    learned = {name: value for name in tasks if (value := gain(run, name)) is not None}
    words = [f"forgot {value:.2f} nats/token on `{name}`" for name, value in lost.items()]
    words += [f"gained {value:.2f} nats/token on `{name}`" for name, value in learned.items()]
    other = "two-way" if run.kind == "one-way" else "one-way"
    said = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    start = f"{run.kind.capitalize()} training ({run.name}) {said or 'was not evaluated'}"
    return f"{start}; no {other} run was given to compare it with."


def _kept(one: Run, two: Run, source: str, *, named: bool) -> str:
    lost_one, lost_two = forgetting(one, source) or 0.0, forgetting(two, source) or 0.0
    ones = f"one-way training ({one.name})" if named else "one-way training"
    twos = f"Two-way training ({two.name})" if named else "Two-way training"
    numbers = f"(forgetting {lost_two:.2f} against {lost_one:.2f} nats/token)"
    if not _is_lost(one, source):
        return f"{twos} had nothing to keep on `{source}`: {ones} did not lose it {numbers}"
    if lost_two > lost_one:
        return f"{twos} lost more than {ones} on `{source}` {numbers}"
    if lost_two <= 0:
        return f"{twos} kept all of what {ones} lost on `{source}` {numbers}"
    # Rounded down, so that 99.6 % never reads as all.
    kept = int(100 * (1 - lost_two / lost_one))
    return f"{twos} kept {kept} % of what {ones} lost on `{source}` {numbers}"


def _is_lost(run: Run, source: str) -> bool:
    """Whether a loss rose by more than half the interval that it is known to."""
    lost, interval = forgetting(run, source) or 0.0, run.final.sources[source].interval
    return lost > ((interval[1] - interval[0]) / 2 if interval else 0.005)


def _task_clause(one: Run, two: Run, tasks: Sequence[str]) -> str:
    both = [name for name in tasks if _evaluated(name, one, two)]
    clauses = [_task_words(one.final.sources[t], two.final.sources[t], t, both) for t in both]
    return " at " + " and ".join(clauses) if clauses else ""


def _task_words(one: HeldOut, two: HeldOut, task: str, tasks: Sequence[str]) -> str:
    if f"{one.loss:.2f}" == f"{two.loss:.2f}":
        word = "the same"
    elif abs(two.loss - one.loss) <= ABOUT_EQUAL * one.loss:
        word = "about the same"
    else:
        word = "a lower" if two.loss < one.loss else "a higher"
    on = f" on `{task}`" if len(tasks) > 1 else ""
    return f"{word} task loss{on} ({two.loss:.2f} against {one.loss:.2f})"


def _mean_sentence(one: Run, two: Run, sources: Sequence[str]) -> str:
    means = [sum(forgetting(run, s) or 0.0 for s in sources) / len(sources) for run in (two, one)]
    return (
        f"Over all {len(sources)} replay sources the mean forgetting is "
        f"{means[0]:.2f} against {means[1]:.2f} nats/token."
    )


def _warnings(runs: Sequence[Run], base: Mapping[str, HeldOut]) -> Iterator[str]:
    for run in runs:
        for name, result in run.first.sources.items():
            if abs(result.loss - base[name].loss) > SAME_BASE * abs(base[name].loss):
                yield (
                    f"{run.name} does not start from the {BASE} of the other runs: its loss on `{name}` at "
                    f"step 0 is {result.loss:.4f}, not {base[name].loss:.4f}. Its forgetting is measured "
                    "from its own start; other numbers are not comparable."
                )
        absent = [f"`{name}`" for name in base if name not in run.final.sources]
        if absent:
            yield f"{run.name} was not evaluated on {', '.join(absent)}; its cells are empty."
    tokens = {run.name: run.final.task_tokens for run in runs}
    if max(tokens.values()) - min(tokens.values()) > SAME_TOKENS * max(tokens.values()):
        shown = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        yield (
            f"The runs were not trained on the same number of task tokens ({shown}); "
            "compare the curves at equal task tokens, not the last numbers."
        )
