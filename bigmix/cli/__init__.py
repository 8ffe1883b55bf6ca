"""The `bigmix` command: words go in, an exit code comes out."""

import argparse
import sys
from collections.abc import Sequence

from bigmix import __version__
from bigmix.cli.compare import add_compare
from bigmix.cli.inspect import add_recipe, add_rows
from bigmix.cli.lm_eval import add_lm_eval
from bigmix.cli.plan import add_plan
from bigmix.cli.prepare import add_prepare
from bigmix.cli.preview import add_preview
from bigmix.cli.quickstart import add_quickstart
from bigmix.cli.supervise import add_train
from bigmix.cli.tokenizer import add_tokenizer
from bigmix.errors import FAILED, BigmixError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0 done, 1 failed, 2 bad input, 75 interrupted after a whole checkpoint."""
    parser = argparse.ArgumentParser(
        prog="bigmix",
        description="Train a language model on a mixture, so that it learns a task and keeps its knowledge.",
        epilog="Training under a launcher: deepspeed launch/train.py RECIPE.yaml [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"bigmix {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        add_prepare, add_tokenizer, add_recipe, add_plan, add_preview, add_rows, add_train, add_compare, add_quickstart,
        add_lm_eval,
    ):  # fmt: skip
        add(subparsers)
    known = _parse(parser, arguments)
    try:
        code: int = known.func(known)
        return code
    except BigmixError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What argparse makes of the words; KEY=VALUE may also stand behind options, where it does not look for them."""
    known, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(known, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        known.overrides = [*known.overrides, *rest]
    return known
