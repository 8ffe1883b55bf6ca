"""Points go in; out comes what they were trained on: the budget in words, tokens, and each source's part as logged."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from bigmix.commands.compare.charts.styles import Style
from bigmix.commands.compare.judge import Comparison, percent
from bigmix.commands.compare.points import Point
from bigmix.commands.compare.read import Realised, Run, TrainedSource
from bigmix.commands.compare.sections import folded, named, plain_table, wide
from bigmix.commands.compare.tables import ABSENT

# White text is readable on each of them, and neighbours are told apart by colour-blind readers.
_SOURCE_COLOURS = ("#0072b2", "#b35a00", "#007a5a", "#a04a7c", "#5b5bb0", "#6b7280")
_LABEL_FROM = 0.07  # a narrower part of a bar has no room for its number; the table below has it
_MOST_BARS = 4  # points whose shares are drawn and not only listed
_BUDGETS = {
    "task_tokens": "Task tokens are fixed: replay comes on top, so a larger share trains longer on as much of the task",
    "total_tokens": "Total tokens are fixed: replay takes the place of task tokens, so a larger share sees less of the task",
    "steps": "Steps are fixed: replay takes the place of task rows, so a larger share sees less of the task",
}


def budget_sentences(points: Sequence[Point]) -> list[str]:
    """Which of the ways to count the points follow, in words; with their names where they follow several."""
    kinds: dict[str, list[str]] = {}
    for point in points:
        kinds.setdefault(_budget(point), []).append(point.name)
    if len(kinds) == 1:
        return [f"{_BUDGETS[next(iter(kinds))]}."]
    return [f"{_BUDGETS[kind]} ({', '.join(names)})." for kind, names in kinds.items()]


def _budget(point: Point) -> str:
    """`train.steps` wins over what the budget says."""
    if point.settings.get("train.steps", ABSENT) != ABSENT:
        return "steps"
    given = [kind for kind in _BUDGETS if point.settings.get(f"budget.{kind}", ABSENT) != ABSENT]
    return given[0] if given else "steps"


def training_table(comparison: Comparison, styles: Mapping[str, Style]) -> str:
    """Of each point its runs, steps, tokens, and replay's part by each way to count."""
    heads = [
        "", "runs", "steps", "task tokens", "all tokens", "share, written", "rows", "tokens", "loss tokens",
        "gradient, written", "gradient",
    ]  # fmt: skip
    rows = ((named(p.name, styles), _training(p)) for p in comparison.arrangement.ordered)
    return wide("What each point was trained on", plain_table(heads, rows))


def _training(point: Point) -> list[str]:
    run = point.runs[0]
    replays = [name for name, source in run.sources.items() if source.role == "replay"]
    parts = [_parts(run.sources[name], run.realised[name]) for name in replays]
    keys = _parts_of_nothing() if not parts else parts[0]
    shares = [_sum([part[key] for part in parts]) for key in keys]
    return [
        str(len(point.runs)),
        _mean([r.steps for r in point.runs]),
        _mean([r.task_tokens for r in point.runs]),
        _mean([r.total_tokens for r in point.runs]),
        *(ABSENT if share is None else percent(share) for share in shares),
    ]


def _mean(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return f"{sum(known) / len(known):,.0f}" if known else ABSENT


def _sum(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) if len(known) == len(shares) else None


def _parts(source: TrainedSource, realised: Realised) -> dict[str, float | None]:
    return {
        "share, written": source.share,
        "rows": realised.rows,
        "tokens": realised.tokens,
        "loss tokens": realised.loss_tokens,
        "gradient, written": source.loss_share,
        "gradient": realised.gradient,
    }


def _parts_of_nothing() -> dict[str, float | None]:
    nothing = Realised(rows=0.0, tokens=0.0, loss_tokens=0.0, gradient=0.0)
    return _parts(TrainedSource(role="replay", share=0.0, loss_share=0.0), nothing)


def bars(comparison: Comparison) -> Iterator[str]:
    """Each source's part as bars, where there are few points: the first run of each."""
    points = comparison.arrangement.ordered
    if len(points) > _MOST_BARS:
        return
    runs = [point.runs[0] for point in points]
    names = list(dict.fromkeys(name for run in runs for name in run.sources))
    colours = {n: _SOURCE_COLOURS[i % len(_SOURCE_COLOURS)] for i, n in enumerate(names)}
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in colours.items()
    )
    yield f'<div class="keys">{keys}</div>'
    for point, run in zip(points, runs, strict=True):
        yield f"<h3>{escape(point.name)}</h3>"
        yield from _bars_of_run(run, colours)


def _bars_of_run(run: Run, colours: Mapping[str, str]) -> Iterator[str]:
    if len(run.sources) == 1:
        yield f"<p>All of it was <code>{escape(next(iter(run.sources)))}</code>.</p>"
        return
    measured = {name: _parts(run.sources[name], run.realised[name]) for name in run.sources}
    yield '<div class="shares">'
    for key in next(iter(measured.values())):
        yield f'<span class="name">{key}</span><div class="bar">'
        for name, shares in measured.items():
            if share := shares[key]:
                label = f"<b>{share:.1%}</b>" if share >= _LABEL_FROM else ""
                yield (
                    f'<span style="flex:{share:.4f}" title="{escape(name)} {share:.1%}">'
                    f'<i style="background:{colours[name]}"></i>{label}</span>'
                )
        yield "</div>"
    yield "</div>"
    rows = (
        (escape(name), [ABSENT if share is None else f"{share:.2%}" for share in shares.values()])
        for name, shares in measured.items()
    )
    table = plain_table(["source", *next(iter(measured.values()))], rows)
    yield folded("as numbers", wide(f"Shares of {run.name}", table))
