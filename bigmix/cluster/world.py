"""The environment that a launcher left goes in, who we are among all processes comes out."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among all of them."""

    rank: int
    local_rank: int
    size: int
    local_size: int

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.rank == 0


def world_of(environment: Mapping[str, str]) -> World:
    """The world as the launcher left it in the environment: deepspeed, torchrun, srun, or none of
    them.
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


def free_port() -> int:
    """A port of this machine that nobody listens on: the launchers' default collides with a second
    job.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
