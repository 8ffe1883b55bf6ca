"""Arguments, checks and messages that several commands share."""

import argparse
import sys
from collections.abc import Mapping, Sequence

from bigmix.data.quarantine import BadShard
from bigmix.errors import BadInput
from bigmix.recipe import Recipe
from bigmix.recipe.fields import whole_number
from bigmix.train.inputs import RunInputs, moving_shares

INPUTS = (
    ".txt, .jsonl(.gz/.zst), .parquet, WebDataset .tar, a glob or folder of them, a saved dataset, "
    "or hf:NAME[:CONFIG][:SPLIT]"
)


def count(text: str) -> int:
    """Parse a whole number above zero, such as 500, 64M or 2e6."""
    value = whole_number(text)
    if not isinstance(value, int) or value < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a whole number above 0; write it like 500, 64M or 2e6"
        )
    return value


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the path of a recipe and the settings that override its own."""
    parser.add_argument("recipe", metavar="RECIPE", help="path of the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as train.lr=1e-5")


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse arguments with argparse, and accept KEY=VALUE also after options, as it does not."""
    known, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and not hasattr(known, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        known.overrides = [*known.overrides, *rest]
    return known


def columns_of(text: str | None) -> Mapping[str, str] | None:
    """The column of each part from a text such as prompt=question,response=answer.

    Raises BadInput where the text is written otherwise or names a part twice.
    """
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(part and equals and column for part, equals, column in pairs):
        raise BadInput(
            f"--columns is {text!r}; write PART=COLUMN pairs with commas between, such as"
            " prompt=question,response=answer"
        )
    found = {part: column for part, _, column in pairs}
    if len(found) < len(pairs):
        raise BadInput(
            f"--columns is {text!r}, which names a part twice; give each part one column"
        )
    return found


def check_step(step: int, inputs: RunInputs) -> None:
    """Raise BadInput if a step is beyond the end of the run."""
    if step > inputs.plan.steps:
        raise BadInput(f"--step is {step}, the run has {inputs.plan.steps} steps; give one of them")


def report_moving_shares(recipe: Recipe) -> None:
    """Warn on stderr where shares move: what is shown holds only until the first decision."""
    for warning in moving_shares(recipe):
        print(warning, file=sys.stderr)


def report_replaced_shards(bad: Sequence[BadShard], step: int) -> None:
    """Report on stderr the unreadable shards, whose rows are replaced in what is shown."""
    for shard in bad:
        print(f"replaced from step {step} on: {shard}", file=sys.stderr)
