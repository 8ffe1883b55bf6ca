"""The command `bigmix preview`, which shows the rows that a step trains, in colour."""

import argparse
from typing import Any

from bigmix.commands.arguments import (
    add_recipe_arguments,
    check_step,
    report_moving_shares,
    report_replaced_shards,
)
from bigmix.data.records import RankRows, Row
from bigmix.data.run_plan import RunPlan
from bigmix.errors import DONE, BadInput
from bigmix.recipe import Recipe, load_recipe
from bigmix.terminal import Terminal, quiet_third_party_logs
from bigmix.train.inputs import RunInputs, open_inputs


def add_preview(subparsers: Any) -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "preview",
        help=(
            "show the rows of one step as they are trained: context, loss tokens, padding,"
            " documents"
        ),
        description=(
            "Loss tokens are green, context is dim, special tokens are magenta. In a pipe and with"
            " --plain, loss tokens are in [[ ]] and special tokens in {{ }}."
        ),
    )
    add_recipe_arguments(parser)
    parser.add_argument("--step", type=int, default=1, help="optimizer step (default 1, the first)")
    parser.add_argument("--rank", type=int, default=0, help="whose rows (default 0)")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    parser.add_argument("--rows", type=int, default=4, help="number of rows to show (default 4)")
    parser.add_argument("--full", action="store_true", help="show long rows to their end")
    parser.add_argument("--plain", action="store_true", help="signs instead of colours")
    parser.set_defaults(func=_preview)


def _preview(known: argparse.Namespace) -> int:
    quiet_third_party_logs()
    recipe = load_recipe(known.recipe, known.overrides)
    _check(known)
    inputs = open_inputs(recipe, ranks=known.ranks, verify=False)
    check_step(known.step, inputs)
    _show(known, recipe, inputs, Terminal())
    return DONE


def _check(known: argparse.Namespace) -> None:
    least = {"step": 1, "ranks": 1, "rows": 1, "rank": 0}
    faults = [
        f"--{name} is {value}, must be {low} or more"
        for name, low in least.items()
        if (value := getattr(known, name)) < low
    ]
    if known.rank >= known.ranks >= 1:
        faults.append(
            f"--rank is {known.rank} and --ranks is {known.ranks}; ranks count from 0 to"
            f" {known.ranks - 1}"
        )
    if faults:
        raise BadInput(*faults)


def _show(known: argparse.Namespace, recipe: Recipe, inputs: RunInputs, terminal: Terminal) -> None:
    # tokenizers takes seconds to import: `bigmix --help` should not.
    from bigmix.commands.row_view import SHOWN_TOKENS, MicroBatchId, marked, preview
    from bigmix.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(inputs.tokenizer_folder))
    micro_batch_rows = recipe.train.micro_batch_rows
    rank_rows = RankRows(
        rank=known.rank,
        ranks=known.ranks,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=micro_batch_rows,
    )

    def read(plan: RunPlan) -> list[Row]:
        streams = plan.streams_at(known.step)
        own = plan.row_ids(known.step)[rank_rows.rows]
        return [streams[row_id.source].read(row_id) for row_id in own[: known.rows]]

    rows, bad = inputs.around_bad_shards(known.step, read)
    report_replaced_shards(bad, known.step)
    report_moving_shares(recipe)
    for index, row in enumerate(rows):
        where = MicroBatchId(rank=known.rank, number=index // micro_batch_rows)
        limit = None if known.full else SHOWN_TOKENS
        pieces = list(preview(row, where, tokenizer, max_tokens=limit))
        if known.plain or not terminal.has_colour:
            terminal.note(marked(pieces))
        else:
            terminal.styled(
                [(piece.text, _style(piece.kind, piece.is_special)) for piece in pieces]
            )
    num_rows = rank_rows.rows.stop - rank_rows.rows.start
    if num_rows > known.rows:
        more = num_rows - known.rows
        terminal.note(f"… {more:,} more rows of this rank, --rows {num_rows} shows them")


def _style(kind: str, is_special: bool) -> str:
    if is_special:
        return "bold magenta" if kind == "loss" else "dim magenta"
    return {
        "head": "bold reverse",
        "border": "cyan",
        "context": "dim",
        "loss": "green",
        "padding": "bright_black",
    }[kind]
