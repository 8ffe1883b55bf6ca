"""`bigmix train RECIPE`: trains on this machine, and starts the ranks again where one fails."""

import argparse
import os
import subprocess
import sys
from typing import Any

from bigmix.cluster.supervisor import LaunchSpec, Process, StopRequests, supervise
from bigmix.cluster.world import free_port
from bigmix.commands.arguments import add_recipe_arguments
from bigmix.errors import BadInput
from bigmix.recipe import load
from bigmix.runs.layout import progress


def add_train(subparsers: Any) -> None:
    """Add the command to the parser of `bigmix`."""
    parser = subparsers.add_parser(
        "train",
        help="train on this machine, and start again where a rank fails",
        description=(
            "Starts the ranks of launch/train.py on this machine without another launcher."
            " docs/faults.md describes what happens when one of them fails."
        ),
    )
    add_recipe_arguments(parser)
    parser.add_argument("--ranks", type=int, help="processes (default: one per GPU, or 1)")
    parser.add_argument(
        "--restarts", type=int, default=3, help="how often at most to start again (default 3)"
    )
    parser.set_defaults(func=_train)


def _train(known: argparse.Namespace) -> int:
    requests = StopRequests()
    loaded = load(known.recipe, known.overrides)
    recipes = [run.recipe for run in loaded.chosen] or [loaded.recipe]
    num_ranks = num_gpus() or 1 if known.ranks is None else known.ranks
    if num_ranks < 1 or known.restarts < 0:
        raise BadInput(
            f"--ranks is {num_ranks} and --restarts is {known.restarts}; give 1 or more ranks and"
            " 0 or more restarts"
        )
    spec = LaunchSpec(
        start=lambda: start_ranks("train", num_ranks, [known.recipe, *known.overrides]),
        newest_step=lambda: progress(recipes),
        max_restarts=known.restarts,
    )
    return supervise(spec, requests, report_restart)


def num_gpus() -> int:
    """How many GPUs of this machine DeepSpeed may use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    # This import takes seconds, which a command with --ranks need not wait for.
    import torch

    return torch.cuda.device_count()


def start_ranks(command: str, num_ranks: int, arguments: list[str]) -> list[Process]:
    """Start the ranks of the command `train` or `evaluate` on this machine."""
    common = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    # Each in a session of its own, so that Ctrl-C reaches the ranks once, from here.
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bigmix.commands.rank", command, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(num_ranks)
    ]


def report_restart(line: str) -> None:
    """One line of the supervisor, on stderr."""
    print(f"bigmix train: {line}", file=sys.stderr, flush=True)
