"""The cluster as numbers: who we are, and sums over everybody. The one module that imports torch.distributed."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td

from bigmix.world import World


def export_world(world: World) -> None:
    """Tell libraries that read the environment what `world_of` found there."""
    numbers = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size}
    for name, value in numbers.items():
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


class Cluster:
    """Collectives of the process group. Small numbers travel over CPU memory, so that no GPU is waited for."""

    def __init__(self, world: World, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.world = world
        self._control: Any = None
        if world.size > 1:
            self._control = td.new_group(backend="gloo", timeout=timeout)

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        """Each number added up over the ranks, on the CPU, in double precision."""
        if self.world.size == 1:
            return list(counts)
        tensor = torch.tensor(counts, dtype=torch.float64)
        td.all_reduce(tensor, group=self._control)
        return [float(number) for number in tensor]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor added up over the ranks on its own device, in place; nothing waits for it."""
        if self.world.size > 1:
            td.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A value of every rank, on every rank, in order of rank."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        td.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            td.barrier(group=self._control)


def leave() -> None:
    """End the process group, so that no rank prints a complaint about it at exit."""
    if td.is_initialized():
        td.destroy_process_group()
