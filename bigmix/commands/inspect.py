"""The commands that show what a recipe means: `bigmix recipe show`, `bigmix recipe schema` and
`bigmix rows`.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from bigmix.commands.arguments import (
    add_recipe_arguments,
    check_step,
    report_moving_shares,
    report_replaced_shards,
)
from bigmix.data.records import RankRows
from bigmix.data.run_plan import RunPlan
from bigmix.errors import DONE, BadInput
from bigmix.recipe import Recipe, load, load_recipe, plain, to_yaml
from bigmix.train.inputs import open_inputs


def add_recipe(subparsers: Any) -> None:
    """Add `bigmix recipe`."""
    parser = subparsers.add_parser("recipe", help="show a recipe with its defaults, or the schema")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the complete recipe with all defaults")
    add_recipe_arguments(show)
    show.add_argument(
        "--key",
        action="append",
        metavar="KEY",
        help=(
            "print only the value of this setting, such as cache.folder; may be given several times"
        ),
    )
    show.set_defaults(func=_show)
    schema = actions.add_parser("schema", help="print the JSON schema of recipes, for editors")
    schema.set_defaults(func=_schema)


def add_rows(subparsers: Any) -> None:
    """Add `bigmix rows`."""
    parser = subparsers.add_parser(
        "rows",
        help="print the identity of every row of one step",
        description="One line per row: rank micro_batch source epoch shard row sha256-of-tokens.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--step", type=int, required=True, help="optimizer step, counted from 1")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (default 1)")
    parser.set_defaults(func=_rows)


def _show(known: argparse.Namespace) -> int:
    loaded = load(known.recipe, known.overrides)
    recipe = loaded.chosen[0].recipe if len(loaded.chosen) == 1 else loaded.recipe
    if known.key is None:
        print(to_yaml(recipe), end="")
        return DONE
    for value in [_value(recipe, key) for key in known.key]:
        print(value)
    return DONE


def _value(recipe: Recipe, key: str) -> str:
    """The value of a setting: a text as it is, everything else as JSON."""
    value: Any = plain(recipe)
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadInput(
                f"--key is {key}, which is no setting of this recipe; `bigmix recipe show`"
                " lists them all"
            )
        value = value[part]
    return value if isinstance(value, str) else json.dumps(value)


def _schema(known: argparse.Namespace) -> int:
    del known
    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return DONE


def _rows(known: argparse.Namespace) -> int:
    if known.step < 1 or known.ranks < 1:
        raise BadInput(
            f"--step is {known.step} and --ranks is {known.ranks}; both must be 1 or more"
        )
    recipe = load_recipe(known.recipe, known.overrides)
    inputs = open_inputs(recipe, ranks=known.ranks, verify=False)
    # A controller may give the run more steps than its recipe does.
    if not recipe.controllers:
        check_step(known.step, inputs)

    def lines(plan: RunPlan) -> list[str]:
        return [
            line
            for rank in range(known.ranks)
            for line in _lines(recipe, plan, known.step, rank, known.ranks)
        ]

    found, bad = inputs.around_bad_shards(known.step, lines)
    report_replaced_shards(bad, known.step)
    report_moving_shares(recipe)
    print("\n".join(found))
    return DONE


def _lines(recipe: Recipe, plan: RunPlan, step: int, rank: int, num_ranks: int) -> Iterator[str]:
    micro_batch_rows, streams = recipe.train.micro_batch_rows, plan.streams_at(step)
    rank_rows = RankRows(
        rank=rank,
        ranks=num_ranks,
        rows_per_step=recipe.rows_per_step,
        micro_batch_rows=micro_batch_rows,
    )
    for index, row_id in enumerate(plan.row_ids_of_rank(rank_rows, step).ids()):
        row = streams[row_id.source].read(row_id)
        digest = hashlib.sha256(row.ids_T[: row.num_tokens].astype("<u4").tobytes()).hexdigest()
        identity = f"{row_id.source} {row_id.epoch} {row_id.shard} {row_id.row}"
        yield f"{rank} {index // micro_batch_rows} {identity} {digest}"
