"""The cluster as numbers: who we are, and sums over everybody.

The one module that imports torch.distributed.
"""

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as td

from bigmix.cluster.world import World


def export_world(world: World) -> None:
    """Tell libraries that read the environment what `world_of` found there."""
    numbers = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size}
    for name, value in numbers.items():
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


class Cluster:
    """Collectives of the process group.

    Small numbers travel over CPU memory, so that no GPU is waited for.
    """

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


class StoreLost(Exception):
    """The first rank, which keeps the board, does not answer any more."""


class KeyValueStore:
    """Short texts that every rank writes and reads at any time, from any thread, without the
    others; a collective to make.

    The first rank keeps them, in threads of their own that need no Python. Every key is given when
    the board is made; each begins with an empty text.
    """

    def __init__(self, cluster: Cluster, keys: Sequence[str], timeout: timedelta) -> None:
        """`timeout` is how long the first rank may take for an answer."""
        world = cluster.world
        self._timeout = timeout
        # It listens on all interfaces and on a port that is free; kept here for as long as the
        # board.
        self._server = _store("localhost", 0, timeout, keeps=True) if world.is_first else None
        port = self._server.port if self._server is not None else None
        port, *_ = cluster.gather(port)
        self._client = _store(os.environ["MASTER_ADDR"], port, timeout)
        if world.is_first:
            for key in keys:
                self.write(key, "")
        cluster.barrier()

    def write(self, key: str, text: str) -> None:
        """Put a text in the place of the one before."""
        self._answer(lambda: self._client.set(key, _EMPTY + text))

    def write_once(self, key: str, text: str) -> str:
        """The first text that anybody wrote under a key: this one where there is none yet."""
        return _read(self._answer(lambda: self._client.compare_set(key, _EMPTY, _EMPTY + text)))

    def read(self, keys: Sequence[str]) -> list[str]:
        """The newest text of each key."""
        return [_read(text) for text in self._answer(lambda: self._client.multi_get(list(keys)))]

    def _answer(self, ask: Callable[[], Any]) -> Any:
        """What the store answers, asked in a thread: a frozen server makes it wait beyond its own
        timeout.
        """
        answers: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_put_answer, args=(ask, answers), daemon=True).start()
        try:
            answer = answers.get(timeout=self._timeout.total_seconds())
        except Empty:
            raise StoreLost(f"no answer within {self._timeout.total_seconds():g} s") from None
        if isinstance(answer, RuntimeError):
            raise StoreLost(str(answer)) from answer
        return answer


# The store makes no difference between an empty value and none.
_EMPTY = "-"


def _read(text: bytes) -> str:
    return text.decode().removeprefix(_EMPTY)


def _put_answer(ask: Callable[[], Any], answers: "SimpleQueue[Any]") -> None:
    try:
        answers.put(ask())
    except RuntimeError as error:  # DistNetworkError and DistStoreError are both of this kind
        answers.put(error)


def _store(host: str, port: int, timeout: timedelta, *, keeps: bool = False) -> Any:
    store = td.TCPStore  # type: ignore[attr-defined]
    return store(host, port, is_master=keeps, timeout=timeout, wait_for_workers=False)


def leave() -> None:
    """End the process group, so that no rank prints a complaint about it at exit."""
    if td.is_initialized():
        td.destroy_process_group()


def is_joined() -> bool:
    """Whether this process is in a process group."""
    return td.is_initialized()
