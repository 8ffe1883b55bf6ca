"""The arguments and the exit code of a training run on one rank."""

import os
import sys
from collections.abc import Sequence

from bigmix.cluster.signals import StopSignal
from bigmix.cluster.world import World, without_local_rank, world_of
from bigmix.errors import BAD_INPUT, DONE, BadInput, BigmixError
from bigmix.recipe import SweepRun, load
from bigmix.terminal import Terminal, quiet_third_party_logs
from bigmix.train.inputs import open_inputs

USAGE = "usage: deepspeed launch/train.py RECIPE.yaml [key=value ...]"


def main(arguments: Sequence[str], stop_signal: StopSignal) -> int:
    """Train a recipe on this rank until it is done or is to stop; returns the exit code."""
    given = without_local_rank(arguments)
    if not given or given[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return DONE if given in (["-h"], ["--help"]) else BAD_INPUT
    world = world_of(os.environ)
    try:
        loaded = load(given[0], given[1:])
        if loaded.recipe.sweep is not None:
            return _run_sweep(loaded.chosen, world, stop_signal)
        recipe = loaded.recipe
        inputs = open_inputs(
            recipe,
            ranks=world.size,
            verify=world.local_rank == 0,
            machines=world.num_machines,
        )
        quiet_third_party_logs()
        # This import takes seconds, spent only on a recipe that can run.
        from bigmix.train.run import run

        run(recipe, inputs, world, Terminal(enabled=world.is_first, every=1), stop_signal)
        return DONE
    except BigmixError as error:
        report_error(error, world)
        return error.exit_code


def _run_sweep(runs: Sequence[SweepRun], world: World, stop_signal: StopSignal) -> int:
    quiet_third_party_logs()
    # As above.
    from bigmix.train.run import run_all

    run_all(runs, world, Terminal(enabled=world.is_first, every=1), stop_signal)
    return DONE


def report_error(error: BigmixError, world: World) -> None:
    """Print an error once per machine: its ranks see the same recipe and the same files."""
    if world.local_rank != 0:
        return
    kind = "error" if isinstance(error, BadInput) else "stopped"
    where = f" on rank {world.rank}" if world.rank else ""
    for line in str(error).splitlines():
        print(f"{kind}{where}: {line}", file=sys.stderr)
