"""Points go in; out come the outputs of each task laid side by side, the same example across points."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from bigmix.commands.compare.charts.styles import Style
from bigmix.commands.compare.judge import Comparison
from bigmix.commands.compare.points import Point
from bigmix.commands.compare.read import BASE, Run
from bigmix.commands.compare.sections import folded, named
from bigmix.compare.samples import Sample

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
            f'<p class="note">{len(shown)} of {len(prompts)} examples that were kept, in their order; of a point with several '
            "seeds the outputs of the first. All are in the folder <code>samples</code> of each run.</p>"
        )
        for prompt in shown:
            found = {BASE: first.get(prompt)} | {
                name: s.get(prompt) for name, s in by_point.items()
            }
            yield _example(prompt, {name: s for name, s in found.items() if s}, styles)


def _final(run: Run) -> Mapping[str, Sequence[Sample]]:
    return run.samples[run.steps]


def _first(points: Sequence[Point], task: str) -> dict[str, Sample]:
    """Outputs of the base, by prompt, from the first run that has them."""
    kept = (point.runs[0].samples.get(0, {}).get(task) for point in points)
    return {sample.prompt: sample for sample in next((found for found in kept if found), ())}


def _example(prompt: str, found: Mapping[str, Sample], styles: Mapping[str, Style]) -> str:
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
        f'<p class="note">Prompt</p><pre>{_text(prompt)}</pre><p class="note">Right would be</p>{rights}'
        f'<table class="outputs"><tbody>{rows}</tbody></table>',
    )


def _text(text: str) -> str:
    rest = len(text) - _MOST_LETTERS
    return (
        escape(text)
        if rest <= 0
        else f"{escape(text[:_MOST_LETTERS])}… <i>({rest:,} letters more)</i>"
    )


def _scores(sample: Sample) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in sample.scores.items()
    )
