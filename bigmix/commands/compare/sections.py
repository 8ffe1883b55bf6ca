"""What the page shows besides results: settings, the budget, realised shares and kept outputs.

These functions select and count; the templates next to this module make HTML of what they return.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigmix.commands.compare.findings.answers import ComparedAnswer, telling_example
from bigmix.commands.compare.folders import TaskSample
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import ABSENT, BASE, FinishedRun
from bigmix.terminal import share_percent


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table of texts: `heads` are those of all columns, a row is its name and its cells."""

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


def with_asides(text: str) -> list[tuple[str, bool]]:
    """The parts of a text, with True for those in parentheses, which an answer in quotation marks
    may have too.
    """
    parts: list[tuple[str, bool]] = []
    begin, depth, is_quoted = 0, 0, False
    for at, letter in enumerate(text):
        if letter in "“”":
            is_quoted = letter == "“"
        elif letter == "(" and not is_quoted:
            if depth == 0:
                parts.append((text[begin:at], False))
                begin = at
            depth += 1
        elif letter == ")" and not is_quoted and depth:
            depth -= 1
            if depth == 0:
                parts.append((text[begin : at + 1], True))
                begin = at + 1
    return [*parts, (text[begin:], depth > 0)]


_MAX_COLUMNS = 4  # points side by side; with more of them, each point is a row


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeSettings:
    """The settings of all points: a table of those that differ, None where none do, and those in
    common by dotted key.

    `has_point_rows` says that the rows of the table are points and its columns settings, and not
    the reverse.
    """

    differing: TextTable | None
    has_point_rows: bool
    common: TextTable


def recipe_settings(points: Sequence[RunPoint]) -> RecipeSettings:
    """Compare the settings of points."""
    settings = [_without_absent_sources(point, points) for point in points]
    keys = sorted({key for own in settings for key in own})
    values = {key: [own.get(key, ABSENT) for own in settings] for key in keys}
    differing = {key: found for key, found in values.items() if len(set(found)) > 1}
    common = [(key, found[:1]) for key, found in values.items() if key not in differing]
    names = [point.name for point in points]
    has_point_rows = len(points) > _MAX_COLUMNS
    if has_point_rows:
        by_point = zip(*differing.values(), strict=True)
        table = TextTable(heads=["", *differing], rows=list(zip(names, by_point, strict=False)))
    else:
        table = TextTable(heads=["setting", *names], rows=list(differing.items()))
    return RecipeSettings(
        differing=table if differing else None,
        has_point_rows=has_point_rows,
        common=TextTable(heads=["setting", "value"], rows=common),
    )


def _without_absent_sources(point: RunPoint, points: Sequence[RunPoint]) -> dict[str, str]:
    """The settings of a point. Settings of a source that another point lacks, and on which the
    points that have it agree, are one entry: the path of the source.
    """
    settings = {_moved(key): value for key, value in point.settings.items()}
    names = [name for p in points for name in p.runs[0].sources]
    for name in dict.fromkeys(names):
        having = [p for p in points if name in p.runs[0].sources]
        if len(having) == len(points):
            continue
        prefix = f"sources.{name}."
        for key in {key for p in having for key in p.settings if key.startswith(prefix)}:
            if key != _moved(key) or key.endswith("share"):
                continue
            if len({p.settings.get(key) for p in having}) == 1:
                path = settings.pop(key, None)
                if key == f"{prefix}path" and path is not None:
                    settings[f"sources.{name}"] = path
    return settings


def _moved(key: str) -> str:
    """The key of a held-out folder under `held_out`, wherever the recipe has it: a source that is
    trained names its own, one that is only evaluated has it in the table `held_out`.
    """
    parts = key.split(".")
    is_own = len(parts) == 3 and parts[0] == "sources" and parts[2] == "held_out"
    return f"held_out.{parts[1]}" if is_own else key


_BUDGETS = {
    "task_tokens": (
        "Task tokens are fixed: replay comes on top, so a larger share trains longer on the same"
        " task data"
    ),
    "total_tokens": (
        "Total tokens are fixed: replay takes the place of task tokens, so a larger share sees less"
        " of the task"
    ),
    "steps": (
        "Steps are fixed: replay takes the place of task rows, so a larger share sees less of the"
        " task"
    ),
}


def budget_sentences(points: Sequence[RunPoint]) -> list[str]:
    """What the budget of the points fixes: one sentence, or where they differ one for each kind of
    budget with the names of its points.
    """
    kinds: dict[str, list[str]] = {}
    for point in points:
        kinds.setdefault(_budget(point), []).append(point.name)
    if len(kinds) == 1:
        return [f"{_BUDGETS[next(iter(kinds))]}."]
    return [f"{_BUDGETS[kind]} ({', '.join(names)})." for kind, names in kinds.items()]


def _budget(point: RunPoint) -> str:
    """The kind of a point's budget; `train.steps` overrides the table `budget`."""
    if point.settings.get("train.steps", ABSENT) != ABSENT:
        return "steps"
    given = [kind for kind in _BUDGETS if point.settings.get(f"budget.{kind}", ABSENT) != ABSENT]
    return given[0] if given else "steps"


_WAYS = ("share, written", "rows", "tokens", "loss tokens", "gradient, written", "gradient")


def training_table(points: Sequence[RunPoint]) -> TextTable:
    """Of each point its runs, steps and tokens, and the part of all its replay sources together
    by each way to count.
    """
    heads = ["", "runs", "steps", "task tokens", "all tokens", *_WAYS]
    return TextTable(heads=heads, rows=[(point.name, _training(point)) for point in points])


def _training(point: RunPoint) -> list[str]:
    run = point.runs[0]
    replays = [_parts(run, name) for name, own in run.sources.items() if own.role == "replay"]
    shares = [_sum(parts) for parts in zip(*replays, strict=True)] or [0.0] * len(_WAYS)
    return [
        str(len(point.runs)),
        _mean([r.num_steps for r in point.runs]),
        _mean([r.task_tokens for r in point.runs]),
        _mean([r.total_tokens for r in point.runs]),
        *(ABSENT if share is None else share_percent(share) for share in shares),
    ]


def _parts(run: FinishedRun, name: str) -> list[float | None]:
    """What part of the run a source was, by each of the ways to count."""
    written, realised = run.sources[name], run.realised[name]
    return [
        written.share,
        realised.rows,
        realised.tokens,
        realised.loss_tokens,
        written.loss_share,
        realised.gradient,
    ]


def _mean(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return f"{sum(known) / len(known):,.0f}" if known else ABSENT


def _sum(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(shares) else None


# White text is readable on each of them, and colour-blind readers can distinguish neighbours.
_SOURCE_COLOURS = ("#0072b2", "#b35a00", "#007a5a", "#a04a7c", "#5b5bb0", "#6b7280")
_MOST_BARS = 4  # points whose shares are drawn; with more of them, they are only in the table


@dataclass(frozen=True, kw_only=True, slots=True)
class RealisedShares:
    """How the first run of a point was divided among its sources.

    `bars` has for each way to count the sources with their parts, without those that are 0 or not
    known; `table` has all of them.
    """

    point: str
    run: str
    sources: Sequence[str]
    bars: Mapping[str, Sequence[tuple[str, float]]]
    table: TextTable


def realised_shares(points: Sequence[RunPoint]) -> list[RealisedShares]:
    """The shares of each point, to be drawn; none where there are too many points for that."""
    if len(points) > _MOST_BARS:
        return []
    return [_shares_of(point.name, point.runs[0]) for point in points]


def _shares_of(point: str, run: FinishedRun) -> RealisedShares:
    parts = {name: _parts(run, name) for name in run.sources}
    rows = [
        (name, [ABSENT if share is None else f"{share:.2%}" for share in own])
        for name, own in parts.items()
    ]
    return RealisedShares(
        point=point,
        run=run.name,
        sources=list(parts),
        bars={
            way: [(name, share) for name, own in parts.items() if (share := own[index])]
            for index, way in enumerate(_WAYS)
        },
        table=TextTable(heads=["source", *_WAYS], rows=rows),
    )


def source_colours(shares: Sequence[RealisedShares]) -> dict[str, str]:
    """The colour of each source in the bars."""
    names = dict.fromkeys(name for own in shares for name in own.sources)
    return {n: _SOURCE_COLOURS[i % len(_SOURCE_COLOURS)] for i, n in enumerate(names)}


_MOST_EXAMPLES = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptOutputs:
    """Examples of a task: of each prompt the samples of the base and of the points, by name.

    `num_kept` is how many prompts the runs have kept, of which the first ones are here.
    """

    task: str
    num_kept: int
    samples: Mapping[str, Mapping[str, TaskSample]]


def kept_outputs(comparison: Comparison) -> list[KeptOutputs]:
    """Some examples of each task, of the first run of each point after its last step; none of a
    task of which no run has kept outputs.
    """
    points = comparison.arrangement.ordered
    found = []
    for task in comparison.scores:
        by_point = {
            point.name: {s.prompt: s for s in _final(point.runs[0]).get(task, ())}
            for point in points
        }
        if not any(task in _final(point.runs[0]) for point in points):
            continue
        by_model = {BASE: _of_base(points, task), **by_point}
        prompts = list(dict.fromkeys(prompt for own in by_point.values() for prompt in own))
        samples = {
            prompt: {name: own[prompt] for name, own in by_model.items() if prompt in own}
            for prompt in prompts[:_MOST_EXAMPLES]
        }
        found.append(KeptOutputs(task=task, num_kept=len(prompts), samples=samples))
    return found


def _final(run: FinishedRun) -> Mapping[str, Sequence[TaskSample]]:
    return run.samples[run.num_steps]


def _of_base(points: Sequence[RunPoint], task: str) -> dict[str, TaskSample]:
    """Outputs of the base, by prompt, from the first run that has them."""
    kept = (point.runs[0].samples.get(0, {}).get(task) for point in points)
    return {sample.prompt: sample for sample in next((found for found in kept if found), ())}


_MOST_PROMPTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredPrompt:
    """A prompt of the behaviour probe and the answers to it: `prompt` has those of the base,
    `answers` is by point. `is_telling` where it is one that shows what was lost.
    """

    prompt: ComparedAnswer
    answers: Mapping[str, ComparedAnswer]
    is_telling: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswersSideBySide:
    """Some of the prompts that were answered; `num_prompts` is how many there are."""

    num_prompts: int
    shown: Sequence[AnsweredPrompt]


def answers_side_by_side(comparison: Comparison) -> AnswersSideBySide:
    """Answers of the first run of each point: to the prompts that show what a point has lost, then
    to the first prompt of each kind.
    """
    points = comparison.arrangement.ordered
    by_point = {p.name: {a.id: a for a in p.runs[0].answers} for p in points}
    prompts = {i: answer for own in reversed(by_point.values()) for i, answer in own.items()}
    telling = [found.id for p in points if (found := telling_example(p.runs[0].answers))]
    kinds = {prompt.kind: prompt.id for prompt in reversed(prompts.values())}
    chosen = [*telling, *(prompt.id for prompt in prompts.values() if prompt.id in kinds.values())]
    return AnswersSideBySide(
        num_prompts=len(prompts),
        shown=[
            AnsweredPrompt(
                prompt=prompts[i],
                answers={name: own[i] for name, own in by_point.items() if i in own},
                is_telling=i in telling,
            )
            for i in list(dict.fromkeys(chosen))[:_MOST_PROMPTS]
        ],
    )
