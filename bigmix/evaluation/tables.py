"""Tables of the results of an evaluation, for a terminal."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from bigmix.evaluation.behaviour.measure import AnswerPair, BehaviourResult, estimates_of
from bigmix.evaluation.bootstrap import Estimate
from bigmix.evaluation.evaluator import EvaluationResult
from bigmix.evaluation.held_out import HeldOutResult
from bigmix.evaluation.tasks.runner import TaskResult
from bigmix.recipe import Recipe
from bigmix.terminal import (
    Cell,
    Change,
    HeldOutRow,
    Table,
    Terminal,
    evaluation_table,
    percent,
)


def show_evaluation(terminal: Terminal, recipe: Recipe, of: str, found: EvaluationResult) -> None:
    """Print the tables of an evaluation; `of` names the model, for the titles."""
    if found.held_out:
        rows = [_held_out_row(recipe, *item) for item in found.held_out.items()]
        terminal.table(evaluation_table(f"held out, {of}", rows))
    if found.tasks:
        terminal.table(_tasks_table(f"tasks, {of}", found.tasks))
    if found.behaviour is not None:
        show_behaviour(terminal, of, found.behaviour)


def _held_out_row(recipe: Recipe, name: str, found: HeldOutResult) -> HeldOutRow:
    source = recipe.sources.get(name)
    return HeldOutRow(
        source=name,
        role=source.role if source is not None else "held out",
        loss=found.loss.value,
        loss_margin=_margin(found.loss),
        bits_per_byte=found.bits_per_byte.value,
        token_accuracy=found.token_accuracy.value,
        kl_to_base=None if found.kl_to_base is None else found.kl_to_base.value,
        forgetting=None if found.forgetting is None else _change(found.forgetting),
    )


def _change(forgetting: Estimate) -> Change:
    return Change(nats=forgetting.value, margin=_margin(forgetting))


def _margin(estimate: Estimate) -> float | None:
    """Half of the interval, None where that is not known."""
    margin = (estimate.high - estimate.low) / 2
    return None if math.isnan(margin) else margin


def _tasks_table(title: str, results: Mapping[str, TaskResult]) -> Table:
    rows: list[list[Cell]] = [
        [
            name,
            kind,
            f"{s.value:.1%}",
            f"{s.low:.1%}–{s.high:.1%}",
            result.num_examples,
            result.num_dropped,
        ]
        for name, result in results.items()
        for kind, s in result.scores.items()
    ]
    columns = ["task", "score", "value", "95 %", "examples", "dropped"]
    return Table(title=title, columns=columns, rows=rows)


def show_behaviour(terminal: Terminal, of: str, found: BehaviourResult) -> None:
    """Print what behaviour is like, next to that of the base, and some answers."""
    terminal.table(_behaviour_table(of, found))
    if found.samples:
        columns, rows = behaviour_samples(found)
        terminal.table(Table(title=f"answers, {of}", columns=columns, rows=rows))


def behaviour_samples(found: BehaviourResult) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """The samples of a result as columns and rows: the prompt, the base's answer where the base is
    another model, and the answer.
    """
    if found.base is None:
        return ["prompt", "answer"], [[_question(each), each.answer.text] for each in found.samples]
    rows = [
        [_question(each), "" if each.base is None else each.base.text, each.answer.text]
        for each in found.samples
    ]
    return ["prompt", "base", "now"], rows


def samples_as_markdown(found: BehaviourResult) -> str:
    """The samples of a result as a table in Markdown."""
    columns, rows = behaviour_samples(found)
    lines = [columns, ["---"] * len(columns), *([_as_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _as_cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "<br>".join(escaped.splitlines())


def _question(pair: AnswerPair) -> str:
    return str(pair.prompt.messages[-1]["content"])


# How a number is written, by the name of the statistic.
_STATISTICS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "instructions": ("instructions followed", percent),
    "sentences": ("answers with a whole sentence", percent),
    "stops": ("answers that end by themselves", percent),
    "length": ("tokens of an answer", lambda value: f"{value:.1f}"),
}


def _behaviour_table(of: str, found: BehaviourResult) -> Table:
    rows = [*_rows_on_base(found), *_rows_of_answers(found)]
    columns = ["measure", "base", "now", "change"]
    if found.base is None:
        columns, rows = ["measure", "value"], [[row[0], row[2]] for row in rows]
    return Table(
        title=f"behaviour, {of} ({len(found.pairs)} prompts, ± half of the 95 % interval)",
        columns=columns,
        rows=rows,
    )


def _rows_on_base(found: BehaviourResult) -> Iterator[list[Cell]]:
    """What is measured on the base's answers: the measure, the base, the model, and the change."""
    if found.loss is None or found.forgetting is None:
        return
    name, base = "loss on the base's answers, nats/token", found.loss.value - found.forgetting.value
    yield [name, _nats(base), _with_margin(found.loss, _nats), _change(found.forgetting)]
    if found.base is not None and found.kl is not None and found.same is not None:
        yield ["KL(base || model), nats/token", None, _with_margin(found.kl, _nats), None]
        yield ["answers that are the base's", None, _with_margin(found.same, percent), None]


def _rows_of_answers(found: BehaviourResult) -> Iterator[list[Cell]]:
    """The statistics of answers, in the same columns."""
    now = estimates_of(found.answers)
    base = {} if found.base is None else estimates_of(found.base)
    change = {} if found.change is None else estimates_of(found.change)
    for key, (name, write) in _STATISTICS.items():
        own, before, moved = now[key], base.get(key), change.get(key)
        if own is not None:
            yield [
                name,
                None if before is None else write(before.value),
                _with_margin(own, write),
                None if moved is None else _with_margin(moved, write, sign="+"),
            ]


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _with_margin(estimate: Estimate, write: Callable[[float], str], sign: str = "") -> str:
    """A number and half of its interval; `sign` is written before one that is not negative."""
    margin = _margin(estimate)
    value = write(estimate.value) if estimate.value < 0 else f"{sign}{write(estimate.value)}"
    return value if margin is None else f"{value} ±{write(margin)}"
