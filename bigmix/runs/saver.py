"""States of an engine go in; checkpoints appear while the training goes on, each whole on all ranks
or absent.

The loop waits for a copy into host memory, a thread of each rank writes it. Once every rank has
told, between two steps, that its file is on the disk, the first one lists the files and gives the
checkpoint its name. What cannot be written is told and left out; the run and the checkpoints before
it stand.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bigmix.cluster.collectives import Cluster
from bigmix.runs.checkpoints import FileEntry, Position, clear_unfinished, prune, publish
from bigmix.runs.state_file import (
    AVERAGE,
    MOMENTS,
    WEIGHTS,
    FlatState,
    file_of_rank,
    tensors_of,
    write_state,
)

_SPARE_BYTES = 64 << 20  # room on the disk for logs and exports beside a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionPolicy:
    """Which checkpoints stay: the newest `newest`, and those of every `every`-th step (0: of
    none).
    """

    newest: int
    every: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Write:
    """A checkpoint on its way."""

    position: Position
    beside: Path
    sealed: Future[FileEntry]


class Saver:
    """Writes the checkpoints of a run; every method is a collective."""

    def __init__(
        self,
        folder: Path,
        cluster: Cluster,
        keeping: RetentionPolicy,
        *,
        in_background: bool,
        tell: Callable[[str], None],
    ) -> None:
        """`tell` is given what the user must know of a checkpoint that could not be written."""
        self.wait_s = 0.0
        self.last_step: int | None = None  # of the newest checkpoint that is whole
        self.begun_step = 0  # of the newest one that was begun
        self._folder = folder
        self._cluster = cluster
        self._keeping = keeping
        self._in_background = in_background
        self._tell = tell
        self._copies: dict[str, Tensor] = {}
        self._write: _Write | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        if cluster.world.is_first:
            clear_unfinished(folder)

    def resume(self, step: int) -> None:
        """The newest checkpoint is that of a step, from which the run goes on."""
        self.last_step = self.begun_step = step

    def is_due(self, step: int, every: int) -> bool:
        """Whether a multiple of `every` steps (0: never) has come since the last checkpoint was
        begun.
        """
        return every > 0 and step // every > self.begun_step // every

    def save(self, flats: Iterator[FlatState], position: Position) -> None:
        """Begin a checkpoint; returns once this rank's states are copied, or written where not in
        the background.
        """
        self.finish()
        began = time.perf_counter()
        self.begun_step = position.step
        beside = self._folder / f".tmp-step-{position.step:06d}"
        copies = (self._in_host_memory(index, flat) for index, flat in enumerate(flats))
        tensors, metadata = tensors_of(copies)
        if self._make_room(beside, sum(4 * tensor.numel() for tensor in tensors.values())):
            path = beside / file_of_rank(self._cluster.world.rank)
            sealed = self._thread.submit(write_state, path, tensors, metadata)
            self._write = _Write(position=position, beside=beside, sealed=sealed)
        self.wait_s += time.perf_counter() - began
        if not self._in_background:
            self.finish()

    def settle(self) -> None:
        """Between two steps: give the checkpoint on its way its name if all ranks have written
        their files.
        """
        if self._write is None:
            return
        (written,) = self._cluster.sum_counts([self._write.sealed.done()])
        if written == self._cluster.world.size:
            self._close(self._write)

    def finish(self) -> None:
        """Wait until the checkpoint on its way is whole on all ranks."""
        if self._write is None:
            return
        began = time.perf_counter()
        self._write.sealed.exception()
        self._close(self._write)
        self.wait_s += time.perf_counter() - began

    def close(self) -> None:
        """Finish and end the thread."""
        self.finish()
        self._thread.shutdown()

    def _in_host_memory(self, index: int, flat: FlatState) -> FlatState:
        """The same in memory that the next steps do not touch; where the loop waits for the disk, a
        CPU's own memory will do.
        """
        if self._in_background:
            copies = {key: self._copy(f"{index}.{key}", t) for key, t in flat.tensors.items()}
        else:
            copies = {key: tensor.cpu() for key, tensor in flat.tensors.items()}
        return replace(
            flat,
            weights=copies[WEIGHTS],
            moments={key: copies[key] for key in MOMENTS},
            average=copies.get(AVERAGE),
        )

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(key)
        if copy is None:
            on_gpu = tensor.device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._copies[key] = copy
        return copy.copy_(tensor)

    def _make_room(self, beside: Path, own_bytes: int) -> bool:
        """Make the folder to write in; False on all ranks where the disk has no room."""
        needed = sum(self._cluster.gather(own_bytes))
        fault = self._folder_fault(beside, needed) if self._cluster.world.is_first else None
        fault, *_ = self._cluster.gather(fault)
        if fault is not None:
            self._give_up(fault)
        return fault is None

    def _folder_fault(self, beside: Path, needed: int) -> str | None:
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            free = shutil.disk_usage(beside).free
        except OSError as error:
            return f"{beside} cannot be made ({error.strerror})"
        if free < needed + _SPARE_BYTES:
            shutil.rmtree(beside, ignore_errors=True)
            return (
                f"{self._folder} has {free / 2**30:.2f} GiB free and a checkpoint needs"
                f" {(needed + _SPARE_BYTES) / 2**30:.2f} GiB; free space, or keep fewer with"
                " train.keep_checkpoints"
            )
        return None

    def _close(self, write: _Write) -> None:
        self._write = None
        error = write.sealed.exception()
        own = str(error) if error is not None else write.sealed.result()
        files = self._cluster.gather(own)
        faults = [f"rank {r}: {file}" for r, file in enumerate(files) if isinstance(file, str)]
        fault = "; ".join(faults) or None
        if self._cluster.world.is_first:
            fault = fault or self._publish(write, files)
            if fault is not None:
                shutil.rmtree(write.beside, ignore_errors=True)
        fault, *_ = self._cluster.gather(fault)
        if fault is None:
            self.last_step = write.position.step
        else:
            self._give_up(f"the checkpoint of step {write.position.step} was not written: {fault}")

    def _publish(self, write: _Write, files: list[FileEntry]) -> str | None:
        final = self._folder / f"step-{write.position.step:06d}"
        try:
            publish(write.beside, final, self._cluster.world.size, files, write.position)
        except OSError as error:
            return str(error)
        # Deleting many gigabytes takes a while, and nobody needs to wait for it.
        self._thread.submit(
            prune, self._folder, keep=self._keeping.newest, keep_every=self._keeping.every
        )
        return None

    def _give_up(self, fault: str) -> None:
        last = (
            "there is none yet"
            if self.last_step is None
            else f"the last is of step {self.last_step}"
        )
        self._tell(f"{fault}; the run goes on ({last})")
