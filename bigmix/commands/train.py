"""`bigmix train RECIPE`: the ranks of this machine, started again where they fail."""

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
            "Starts launch/train.py's ranks on this machine without another launcher;"
            " docs/faults.md says what happens when one fails."
        ),
    )
    add_recipe_arguments(parser)
    parser.add_argument("--ranks", type=int, help="processes (default: the GPUs, or 1)")
    parser.add_argument(
        "--restarts", type=int, default=3, help="how often to start again at most (default 3)"
    )
    parser.set_defaults(func=_train)


def _train(known: argparse.Namespace) -> int:
    requests = StopRequests()
    loaded = load(known.recipe, known.overrides)
    recipes = [run.recipe for run in loaded.chosen] or [loaded.recipe]
    ranks = num_gpus() or 1 if known.ranks is None else known.ranks
    if ranks < 1 or known.restarts < 0:
        raise BadInput(
            f"--ranks is {ranks} and --restarts is {known.restarts}; give 1 or more, and 0 or more"
        )
    course = LaunchSpec(
        start=lambda: start_ranks("train", ranks, [known.recipe, *known.overrides]),
        newest_step=lambda: progress(recipes),
        restarts=known.restarts,
    )
    return supervise(course, requests, report_restart)


def num_gpus() -> int:
    """The GPUs of this machine that DeepSpeed may use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    # Seconds of import, for those who do not say how many ranks.
    import torch

    return torch.cuda.device_count()


def start_ranks(command: str, ranks: int, words: list[str]) -> list[Process]:
    """The ranks of `train` or `evaluate` on this machine."""
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    # A session of its own: Ctrl-C reaches the ranks once, from here.
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bigmix.commands.rank", command, *words],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def report_restart(line: str) -> None:
    """One line of the supervisor, on stderr."""
    print(f"bigmix train: {line}", file=sys.stderr, flush=True)
