"""Texts of a comparison go in, pieces of the page come out; everything that comes from a run is
escaped.

Points go in; out comes what their recipes have in common, and what differs.

Points go in; out comes what they were trained on: the budget in words, tokens, and each source's
part as logged.

Points go in; out come the outputs of each task laid side by side, the same example across points.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from bigmix.commands.compare.charts.styles import Style
from bigmix.commands.compare.charts.svg import Mark, mark_svg
from bigmix.commands.compare.folders import TaskSample
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.points import RunPoint
from bigmix.commands.compare.read import BASE, FinishedRun, Realised, TrainedSource
from bigmix.commands.compare.tables import ABSENT
from bigmix.terminal import share_percent


def code(text: str) -> str:
    """Names between backticks in code letters."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def wide(label: str, content: Iterable[str]) -> str:
    """A box that scrolls by itself, also with the keyboard, so that the page does not."""
    inside = "\n".join(content)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{inside}</div>'
    )


def folded(summary: str, content: str) -> str:
    """What is shown on request."""
    return f"<details><summary>{code(summary)}</summary>\n{content}\n</details>"


def plain_table(
    heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, classes: str = "number"
) -> Iterator[str]:
    """A table of texts; heads and names of rows are HTML already."""
    first = f'<th scope="col">{heads[0]}</th>' if heads[0] else "<td></td>"
    cells = "".join(f'<th scope="col" class="{classes}">{head}</th>' for head in heads[1:])
    yield f"<table><thead><tr>{first}{cells}</tr></thead><tbody>"
    for name, texts in rows:
        body = "".join(f'<td class="{classes}">{escape(text)}</td>' for text in texts)
        yield f'<tr><th scope="row">{name}</th>{body}</tr>'
    yield "</tbody></table>"


def named(name: str, styles: Mapping[str, Style]) -> str:
    """A point's name behind its mark; other names alone."""
    style = styles.get(name)
    if style is None:
        return escape(name)
    mark = Mark(at=(0.0, 0.0), shape=style.shape, colour=style.key, size=4.6)
    return f"{mark_svg(mark)}{escape(name)}"


def variables(styles: Mapping[str, Style], *, dark: bool) -> str:
    """The colours of points as custom properties."""
    return " ".join(f"--{s.key}: {s.dark if dark else s.light};" for s in styles.values())


_MOST_COLUMNS = 4  # points that stand beside each other; more stand below each other


def settings_part(points: Sequence[RunPoint], styles: Mapping[str, Style]) -> str:
    """A table of the settings that differ, and those in common on request."""
    settings = [_without_absent_sources(point, points) for point in points]
    keys = sorted({key for own in settings for key in own})
    values = {key: [own.get(key, ABSENT) for own in settings] for key in keys}
    differing = {key: found for key, found in values.items() if len(set(found)) > 1}
    common = {key: found for key, found in values.items() if key not in differing}
    parts = [_differing(points, differing, styles) if differing else "<p>They do not differ.</p>"]
    rows = ((f"<code>{escape(key)}</code>", found[:1]) for key, found in common.items())
    table = plain_table(["setting", "value"], rows, classes="value")
    if common:
        parts.append(folded(f"{len(common)} settings in common", wide("Settings in common", table)))
    return "\n".join(parts)


def _differing(
    points: Sequence[RunPoint], differing: Mapping[str, Sequence[str]], styles: Mapping[str, Style]
) -> str:
    names = [named(point.name, styles) for point in points]
    keys = [f"<code>{escape(key)}</code>" for key in differing]
    if len(points) <= _MOST_COLUMNS:
        rows = list(zip(keys, differing.values(), strict=True))
        table = plain_table(["setting", *names], rows, classes="value")
    else:
        columns = list(zip(*differing.values(), strict=True))
        table = plain_table(["", *keys], zip(names, columns, strict=True), classes="value")
    return wide("How the recipes differ", table)


def _without_absent_sources(point: RunPoint, points: Sequence[RunPoint]) -> dict[str, str]:
    """The settings; those of a source that another point lacks are told once, by its path, where
    the points agree on them.
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
    """A held-out folder is named by its source where that is trained, and beside the sources where
    it is not.
    """
    parts = key.split(".")
    is_own = len(parts) == 3 and parts[0] == "sources" and parts[2] == "held_out"
    return f"held_out.{parts[1]}" if is_own else key


# White text is readable on each of them, and neighbours are told apart by colour-blind readers.
_SOURCE_COLOURS = ("#0072b2", "#b35a00", "#007a5a", "#a04a7c", "#5b5bb0", "#6b7280")
_LABEL_FROM = 0.07  # a narrower part of a bar has no room for its number; the table below has it
_MOST_BARS = 4  # points whose shares are drawn and not only listed
_BUDGETS = {
    "task_tokens": (
        "Task tokens are fixed: replay comes on top, so a larger share trains longer on as much of"
        " the task"
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
    """Which of the ways to count the points follow, in words; with their names where they follow
    several.
    """
    kinds: dict[str, list[str]] = {}
    for point in points:
        kinds.setdefault(_budget(point), []).append(point.name)
    if len(kinds) == 1:
        return [f"{_BUDGETS[next(iter(kinds))]}."]
    return [f"{_BUDGETS[kind]} ({', '.join(names)})." for kind, names in kinds.items()]


def _budget(point: RunPoint) -> str:
    """`train.steps` wins over what the budget says."""
    if point.settings.get("train.steps", ABSENT) != ABSENT:
        return "steps"
    given = [kind for kind in _BUDGETS if point.settings.get(f"budget.{kind}", ABSENT) != ABSENT]
    return given[0] if given else "steps"


def training_table(comparison: Comparison, styles: Mapping[str, Style]) -> str:
    """Of each point its runs, steps, tokens, and replay's part by each way to count."""
    heads = [
        "",
        "runs",
        "steps",
        "task tokens",
        "all tokens",
        "share, written",
        "rows",
        "tokens",
        "loss tokens",
        "gradient, written",
        "gradient",
    ]
    rows = ((named(p.name, styles), _training(p)) for p in comparison.arrangement.ordered)
    return wide("What each point was trained on", plain_table(heads, rows))


def _training(point: RunPoint) -> list[str]:
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
        *(ABSENT if share is None else share_percent(share) for share in shares),
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


def _bars_of_run(run: FinishedRun, colours: Mapping[str, str]) -> Iterator[str]:
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


_MOST_EXAMPLES = 6
_MOST_LETTERS = 600  # of one text


def outputs_part(comparison: Comparison, styles: Mapping[str, Style]) -> Iterator[str]:
    """Of each task some examples; nothing where no run has kept outputs."""
    points = comparison.arrangement.ordered
    kept = {task for point in points for task in _final(point.runs[0])}
    for task in [task for task in comparison.scores if task in kept]:
        first = _first(points, task)
        by_point = {
            point.name: {s.prompt: s for s in _final(point.runs[0]).get(task, ())}
            for point in points
        }
        prompts = dict.fromkeys(prompt for found in by_point.values() for prompt in found)
        shown = list(prompts)[:_MOST_EXAMPLES]
        yield f"<h3>{escape(task)}</h3>"
        yield (
            f'<p class="note">{len(shown)} of {len(prompts)} examples that were kept, in their'
            " order; of a point with several seeds the outputs of the first. All are in the folder"
            " <code>samples</code> of each run.</p>"
        )
        for prompt in shown:
            found = {BASE: first.get(prompt)} | {
                name: s.get(prompt) for name, s in by_point.items()
            }
            yield _example(prompt, {name: s for name, s in found.items() if s}, styles)


def _final(run: FinishedRun) -> Mapping[str, Sequence[TaskSample]]:
    return run.samples[run.steps]


def _first(points: Sequence[RunPoint], task: str) -> dict[str, TaskSample]:
    """Outputs of the base, by prompt, from the first run that has them."""
    kept = (point.runs[0].samples.get(0, {}).get(task) for point in points)
    return {sample.prompt: sample for sample in next((found for found in kept if found), ())}


def _example(prompt: str, found: Mapping[str, TaskSample], styles: Mapping[str, Style]) -> str:
    references = next(iter(found.values())).references
    rights = "".join(f"<pre>{_text(text)}</pre>" for text in references[:3])
    rows = "".join(
        f'<tr><th scope="row">{named(name, styles)}</th>'
        f"<td>{''.join(f'<pre>{_text(text)}</pre>' for text in sample.outputs[:2])}"
        f"<small>{escape(_scores(sample))}</small></td></tr>"
        for name, sample in found.items()
    )
    heading = " ".join(prompt.split())
    short = f"{heading[:90]}…" if len(heading) > 90 else heading
    return folded(
        short.replace("`", "'"),
        f'<p class="note">Prompt</p><pre>{_text(prompt)}</pre><p class="note">Right would'
        f' be</p>{rights}<table class="outputs"><tbody>{rows}</tbody></table>',
    )


def _text(text: str) -> str:
    rest = len(text) - _MOST_LETTERS
    return (
        escape(text)
        if rest <= 0
        else f"{escape(text[:_MOST_LETTERS])}… <i>({rest:,} letters more)</i>"
    )


def _scores(sample: TaskSample) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in sample.scores.items()
    )
