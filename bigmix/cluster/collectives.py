"""Collectives over the ranks, and a store of short texts that they share.

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
    """Set the variables that libraries read to what `world_of` has found, whatever the launcher."""
    numbers = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size}
    for name, value in numbers.items():
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


class Cluster:
    """The collectives of the process group.

    Every rank must make the same calls in the same order. Counts and objects travel over CPU memory
    (gloo), so that no GPU is waited for. With one rank no call communicates.
    """

    def __init__(self, world: World, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.world = world
        self._control: Any = None
        if world.size > 1:
            self._control = td.new_group(backend="gloo", timeout=timeout)

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        """Add up each number over the ranks, on the CPU and in double precision."""
        if self.world.size == 1:
            return list(counts)
        tensor = torch.tensor(counts, dtype=torch.float64)
        td.all_reduce(tensor, group=self._control)
        return [float(number) for number in tensor]

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over the ranks on its device, in place, without waiting for it."""
        if self.world.size > 1:
            td.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank, in order of rank; they must be picklable."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        td.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world.size > 1:
            td.barrier(group=self._control)


class StoreLost(Exception):
    """The first rank, which holds the store, no longer answers."""


class KeyValueStore:
    """Short texts that each rank can write and read at any time and from any thread.

    Only the constructor is a collective. The first rank holds the texts, in threads of the store's
    own that do not need Python to run. All keys are given to the constructor, and each begins with
    an empty text. Every method raises StoreLost where the first rank does not answer in time.
    """

    def __init__(self, cluster: Cluster, keys: Sequence[str], timeout: timedelta) -> None:
        """`timeout` is how long the first rank may take to answer."""
        world = cluster.world
        self._timeout = timeout
        # It listens on all interfaces, on a free port, for as long as this object refers to it.
        self._server = _store("localhost", 0, timeout, is_server=True) if world.is_first else None
        port = self._server.port if self._server is not None else None
        port, *_ = cluster.gather(port)
        self._client = _store(os.environ["MASTER_ADDR"], port, timeout)
        if world.is_first:
            for key in keys:
                self.write(key, "")
        cluster.barrier()

    def write(self, key: str, text: str) -> None:
        """Replace the text of a key."""
        self._answer(lambda: self._client.set(key, _EMPTY + text))

    def write_once(self, key: str, text: str) -> str:
        """Set the text of a key unless a rank has already done so; returns the text it now has."""
        return _read(self._answer(lambda: self._client.compare_set(key, _EMPTY, _EMPTY + text)))

    def read(self, keys: Sequence[str]) -> list[str]:
        """The current text of each key."""
        return [_read(text) for text in self._answer(lambda: self._client.multi_get(list(keys)))]

    def _answer(self, request: Callable[[], Any]) -> Any:
        """The answer of the store, waited for in a thread.

        A frozen server makes a request wait beyond the timeout of the store itself.
        """
        answers: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_put_answer, args=(request, answers), daemon=True).start()
        try:
            answer = answers.get(timeout=self._timeout.total_seconds())
        except Empty:
            raise StoreLost(f"no answer within {self._timeout.total_seconds():g} s") from None
        if isinstance(answer, RuntimeError):
            raise StoreLost(str(answer)) from answer
        return answer


# The store cannot tell an empty value from a missing one, so every value has this prefix.
_EMPTY = "-"


def _read(text: bytes) -> str:
    return text.decode().removeprefix(_EMPTY)


def _put_answer(request: Callable[[], Any], answers: "SimpleQueue[Any]") -> None:
    try:
        answers.put(request())
    except RuntimeError as error:  # DistNetworkError and DistStoreError are both RuntimeErrors
        answers.put(error)


def _store(host: str, port: int, timeout: timedelta, *, is_server: bool = False) -> Any:
    store = td.TCPStore  # type: ignore[attr-defined]
    return store(host, port, is_master=is_server, timeout=timeout, wait_for_workers=False)


def leave() -> None:
    """End the process group, so that no rank prints a warning about it at exit."""
    if td.is_initialized():
        td.destroy_process_group()


def is_joined() -> bool:
    """Whether this process is in a process group."""
    return td.is_initialized()
