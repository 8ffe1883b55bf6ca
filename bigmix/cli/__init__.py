"""The `bigmix` command: words go in, an exit code comes out."""

import argparse
import sys
from collections.abc import Sequence

from bigmix import __version__
from bigmix.cli.compare import add_compare
from bigmix.cli.inspect import add_recipe, add_rows
from bigmix.cli.prepare import add_prepare
from bigmix.cli.quickstart import add_quickstart
from bigmix.cli.tokenizer import add_tokenizer
from bigmix.errors import FAILED, BigmixError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0 done, 1 failed, 2 bad input, 75 interrupted after a whole checkpoint."""
    parser = argparse.ArgumentParser(
        prog="bigmix",
        description="Train a language model on a mixture, so that it learns a task and keeps its knowledge.",
        epilog="Training itself: deepspeed launch/train.py RECIPE.yaml [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"bigmix {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_prepare, add_tokenizer, add_recipe, add_rows, add_compare, add_quickstart):
        add(subparsers)
    known = parser.parse_args(arguments)
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
