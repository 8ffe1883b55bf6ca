"""Tables of the results of an evaluation, for a terminal."""

import math
from collections.abc import Mapping

from bigmix.evaluation.bootstrap import Estimate
from bigmix.evaluation.evaluator import EvaluationResult
from bigmix.evaluation.held_out import HeldOutResult
from bigmix.evaluation.tasks.runner import TaskResult
from bigmix.recipe import Recipe
from bigmix.terminal import Cell, Change, HeldOutRow, Table, Terminal, evaluation_table


def show_evaluation(terminal: Terminal, recipe: Recipe, of: str, found: EvaluationResult) -> None:
    """Print the tables of an evaluation; `of` names the model, for the titles."""
    if found.held_out:
        rows = [_held_out_row(recipe, *item) for item in found.held_out.items()]
        terminal.table(evaluation_table(f"held out, {of}", rows))
    if found.tasks:
        terminal.table(_tasks_table(f"tasks, {of}", found.tasks))


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
