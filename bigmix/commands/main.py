"""The `bigmix` command line: its subcommands, and how their errors are reported."""

import argparse
import sys
from collections.abc import Sequence

from bigmix import __version__
from bigmix.commands.arguments import parse_arguments
from bigmix.commands.compare.command import add_compare
from bigmix.commands.evaluate import add_evaluate
from bigmix.commands.inspect import add_recipe, add_rows
from bigmix.commands.plan.command import add_plan, add_sweep
from bigmix.commands.prepare.command import add_prepare, add_tokenizer
from bigmix.commands.preview import add_preview
from bigmix.commands.probe.command import add_probe
from bigmix.commands.quickstart.command import add_quickstart
from bigmix.commands.remedies.command import add_average, add_self_replay
from bigmix.commands.train import add_train
from bigmix.errors import FAILED, BigmixError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; `arguments` default to those of the process.

    Returns 0 done, 1 failed, 2 bad input, 75 interrupted after a complete checkpoint.
    """
    parser = argparse.ArgumentParser(
        prog="bigmix",
        description=(
            "Train a language model on a mixture, so that it learns a task and keeps its knowledge."
        ),
        epilog="Training under a launcher: deepspeed launch/train.py RECIPE.yaml [key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"bigmix {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        add_prepare,
        add_tokenizer,
        add_recipe,
        add_plan,
        add_preview,
        add_rows,
        add_sweep,
        add_train,
        add_evaluate,
        add_compare,
        add_probe,
        add_average,
        add_self_replay,
        add_quickstart,
    ):
        add(subparsers)
    known = parse_arguments(parser, arguments)
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
