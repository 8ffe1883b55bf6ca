"""`bigmix plan RECIPE`: what a run will be, before a GPU is used."""

import argparse
import json
from typing import Any

from bigmix.cli.sweep import show_runs
from bigmix.commands.arguments import add_recipe_arguments, tell_replaced
from bigmix.errors import DONE, BadInput
from bigmix.recipe import load
from bigmix.terminal import Terminal, tame_libraries
from bigmix.train.inputs import moving_shares, open_inputs


def add_plan(subparsers: Any) -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "plan",
        help="what a run will be: shares, epochs, padding, memory, disk, time",
        description="Says what a recipe will do before anything is trained; docs/plan.md explains every number.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, help="ranks over all nodes (default 1)")
    parser.add_argument("--gpu", default="H100", help="their name, or cpu (default H100)")
    parser.add_argument("--device-gib", type=float, default=80, help="their memory (default 80)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="part of the peak that is reached (default 0.4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=_plan)


def _plan(known: argparse.Namespace) -> int:
    tame_libraries()
    loaded = load(known.recipe, known.overrides)
    _check(known)
    if len(loaded.chosen) > 1:
        return show_runs(loaded.chosen, ranks=known.gpus, as_json=known.json)
    recipe = loaded.chosen[0].recipe if loaded.chosen else loaded.recipe
    inputs = open_inputs(recipe, ranks=known.gpus, verify=False)
    # Seconds of imports, and only for a recipe that can run.
    from bigmix.commands.plan.forecast import Machine, forecast
    from bigmix.commands.plan.show import as_json, show
    from bigmix.commands.plan.warnings import warnings_of

    machine = Machine(gpus=known.gpus, gpu=known.gpu, device_gib=known.device_gib, mfu=known.mfu)
    plan, bad = inputs.around_bad_shards(1, lambda inputs: forecast(recipe, inputs, machine))
    tell_replaced(bad, 1)
    warnings = [*moving_shares(recipe), *warnings_of(recipe, plan, machine)]
    if known.json:
        print(json.dumps(as_json(plan, machine, warnings), indent=2))
    else:
        show(Terminal(), recipe, plan, machine, warnings)
    return DONE


def _check(known: argparse.Namespace) -> None:
    faults = []
    for name, low, high in (("gpus", 1, None), ("device_gib", 1e-9, None), ("mfu", 1e-9, 1)):
        value = getattr(known, name)
        if value < low or (high is not None and value > high):
            limits = f"above 0 and at most {high}" if high else "above 0"
            faults.append(f"--{name.replace('_', '-')} is {value}, must be {limits}")
    if known.gpu not in (gpus := _known_gpus()):
        faults.append(f"--gpu is {known.gpu}, must be one of {', '.join(gpus)}")
    if faults:
        raise BadInput(*faults)


def _known_gpus() -> list[str]:
    # flops imports torch: only a command that needs it waits.
    from bigmix.model.flops import PEAKS

    return [*PEAKS, "cpu"]
