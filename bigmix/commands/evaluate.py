"""`bigmix evaluate`, which starts the ranks of an evaluation, and what each of these ranks runs."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigmix.cluster.signals import StopSignal
from bigmix.cluster.supervisor import LaunchSpec, StopRequests, supervise
from bigmix.cluster.world import World, without_local_rank, world_of
from bigmix.commands.arguments import add_recipe_arguments, parse_arguments
from bigmix.commands.lm_eval import add_lm_eval_arguments, run_lm_eval, show_lm_eval
from bigmix.commands.train import num_gpus, start_ranks
from bigmix.commands.train_rank import report_error
from bigmix.errors import BAD_INPUT, DONE, BadInput, BigmixError
from bigmix.evaluation.inputs import open_held_out
from bigmix.recipe import Recipe, load_recipe
from bigmix.runs.layout import EXPORT
from bigmix.terminal import Terminal, quiet_third_party_logs

_EVALUATION = "evaluation"  # in the output of a recipe
_NO_BASE = "none"


def add_evaluate(subparsers: Any) -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate a model on a recipe's held-out sources",
        description=(
            "Starts the ranks of launch/evaluate.py on this machine, without a launcher;"
            " docs/evaluation.md describes what is measured."
        ),
    )
    _add_arguments(parser)
    parser.add_argument("--ranks", type=int, help="processes (default: the GPUs, or 1)")
    add_lm_eval_arguments(parser)
    parser.set_defaults(func=_evaluate)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--model", help="folder or hub name of a model (default: export/ in the recipe's output)"
    )
    parser.add_argument(
        "--base",
        help=(
            "the model that forgetting and divergence are measured from (default: the recipe's"
            " model.path); none: they are not measured"
        ),
    )
    parser.add_argument(
        "--output",
        metavar="OUT",
        help="folder of the results (default: evaluation/ in the recipe's output)",
    )


def _evaluate(known: argparse.Namespace) -> int:
    """Evaluate the held-out sources and tasks of a recipe, then run benchmarks; for the folder of a
    model, only benchmarks.
    """
    if known.lm_eval is not None and Path(known.recipe).is_dir():
        _run_benchmarks(known, known.recipe, Path(known.output or _EVALUATION))
        return DONE
    code = _supervised(known)
    if code == DONE and known.lm_eval is not None:
        recipe = load_recipe(known.recipe, known.overrides)
        _run_benchmarks(known, _model(recipe, known), _out(recipe, known))
    return code


def _run_benchmarks(known: argparse.Namespace, model: str, out: Path) -> None:
    show_lm_eval(run_lm_eval(model, known.lm_eval, out, known.lm_eval_args))


def _supervised(known: argparse.Namespace) -> int:
    requests = StopRequests()
    ranks = num_gpus() or 1 if known.ranks is None else known.ranks
    if ranks < 1:
        raise BadInput(f"--ranks is {ranks}; give 1 or more")
    launch = LaunchSpec(
        start=lambda: start_ranks("evaluate", ranks, _words(known)),
        newest_step=lambda: 0,
        max_restarts=0,
    )
    return supervise(launch, requests, _report)


def _report(line: str) -> None:
    print(f"bigmix evaluate: {line}", file=sys.stderr, flush=True)


def _words(known: argparse.Namespace) -> list[str]:
    """The arguments of the command line of a rank."""
    options = {"--model": known.model, "--base": known.base, "--output": known.output}
    given = [word for name, value in options.items() if value for word in (name, value)]
    return [known.recipe, *known.overrides, *given]


def main(arguments: Sequence[str], stop_signal: StopSignal) -> int:
    """Evaluate on this rank until done or a stop is requested; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py")
    _add_arguments(parser)
    given = without_local_rank(arguments)
    if not given:
        parser.print_usage(sys.stderr)
        return BAD_INPUT
    known = parse_arguments(parser, given)
    world = world_of(os.environ)
    try:
        recipe = load_recipe(known.recipe, known.overrides)
        return _run(recipe, known, world, stop_signal)
    except BigmixError as error:
        report_error(error, world)
        return error.exit_code


def _run(recipe: Recipe, known: argparse.Namespace, world: World, stop_signal: StopSignal) -> int:
    model, base = _model(recipe, known), known.base or recipe.model.path
    base = None if base == _NO_BASE else base
    inputs = open_held_out(
        recipe,
        verify=world.local_rank == 0,
        machines=world.num_machines,
        asked=base or model,
    )
    quiet_third_party_logs()
    # Takes seconds to import, which a recipe that cannot be evaluated should not wait for.
    from bigmix.evaluation.standalone import EvaluationRequest, evaluate_standalone

    request = EvaluationRequest(
        model=model,
        base=base,
        output=_out(recipe, known),
        command=shlex.join(["bigmix", "evaluate", *_words(known), "--ranks", str(world.size)]),
    )
    terminal = Terminal(enabled=world.is_first)
    evaluate_standalone(recipe, inputs, request, world, terminal, stop_signal)
    return DONE


def _out(recipe: Recipe, known: argparse.Namespace) -> Path:
    return Path(known.output or Path(recipe.output) / _EVALUATION)


def _model(recipe: Recipe, known: argparse.Namespace) -> str:
    own = Path(recipe.output) / EXPORT
    if known.model is None and not own.is_dir():
        raise BadInput(
            f"{own} is no folder: no run of this recipe has been completed there; train it first,"
            " or give another model with --model"
        )
    return known.model or str(own)
