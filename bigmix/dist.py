"""The cluster as numbers: who we are, and sums over everybody. The one module that imports torch.distributed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class BoardLost(Exception):
    """The first rank, which keeps the board, does not answer any more."""


class Board:
    """Short texts that every rank writes and reads at any time, from any thread, without the others; a collective to make.

    The first rank keeps them, in threads of their own that need no Python. Every key is given when the board is made;
    each begins with an empty text.
    """

    def __init__(self, cluster: Cluster, keys: Sequence[str], timeout: timedelta) -> None:
        """`timeout` is how long the first rank may take for an answer."""
        world = cluster.world
        # It listens on all interfaces and on a port that is free; kept here for as long as the board.
        self._server = _store("localhost", 0, timeout, keeps=True) if world.is_first else None
        port = self._server.port if self._server is not None else None
        (port, *_) = cluster.gather(port)
        self._client = _store(os.environ["MASTER_ADDR"], port, timeout)
        if world.is_first:
            for key in keys:
                self.write(key, "")
        cluster.barrier()

    def write(self, key: str, text: str) -> None:
        """Put a text in the place of the one before."""
        with _lost_where_silent():
            self._client.set(key, _EMPTY + text)

    def write_once(self, key: str, text: str) -> str:
        """The first text that anybody wrote under a key: this one where there is none yet."""
        with _lost_where_silent():
            kept: bytes = self._client.compare_set(key, _EMPTY, _EMPTY + text)
        return kept.decode().removeprefix(_EMPTY)

    def read(self, keys: Sequence[str]) -> list[str]:
        """The newest text of each key."""
        with _lost_where_silent():
            texts: list[bytes] = self._client.multi_get(list(keys))
        return [text.decode().removeprefix(_EMPTY) for text in texts]


def _store(host: str, port: int, timeout: timedelta, *, keeps: bool = False) -> Any:
    store = td.TCPStore  # type: ignore[attr-defined]
    return store(host, port, is_master=keeps, timeout=timeout, wait_for_workers=False)


# The store makes no difference between an empty value and none.
_EMPTY = "-"


@contextmanager
def _lost_where_silent() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistNetworkError and DistStoreError are both of this kind
        raise BoardLost(str(error)) from error


def leave() -> None:
    """End the process group, so that no rank prints a complaint about it at exit."""
    if td.is_initialized():
        td.destroy_process_group()
