"""Reads from the environment which of all processes this one is."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among all of them.

    `local_rank` counts the `local_size` processes of one machine, `rank` the `size` of all
    machines; both begin at 0.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0

    @property
    def num_machines(self) -> int:
        """Machines that the ranks run on, each with as many of them."""
        return self.size // self.local_size


def world_of(environment: Mapping[str, str]) -> World:
    """The world that deepspeed, torchrun or srun has described in the environment.

    Without any of them it has one process.
    """

    def number(name: str, default: int) -> int:
        value = environment.get(name) or environment.get(_SLURM.get(name, ""))
        return int(value) if value else default

    size = number("WORLD_SIZE", 1)
    per_node = environment.get("SLURM_NTASKS_PER_NODE") or ""
    local_size = number("LOCAL_WORLD_SIZE", int(per_node) if per_node.isdigit() else size)
    return World(
        rank=number("RANK", 0),
        local_rank=number("LOCAL_RANK", 0),
        size=size,
        local_size=min(local_size, size),
    )


def without_local_rank(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments of a rank without the --local_rank=N that the deepspeed launcher puts first.

    The environment holds the same number.
    """
    return [word for word in arguments if not word.startswith("--local_rank")]


def free_port() -> int:
    """A port of this machine that no process listens on.

    The default of the launchers would collide with that of a second job.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
