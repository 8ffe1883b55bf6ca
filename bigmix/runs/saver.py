"""Writes checkpoints while training goes on, each of them complete on all ranks or absent.

The training loop waits only for a copy of the state into host memory, which a thread of each rank
then writes. Once every rank has reported, between two steps, that its file is on the disk, the
first rank writes the manifest and gives the checkpoint its name. A checkpoint that cannot be
written is reported and left out; the run goes on, and the checkpoints before it stay.
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
from bigmix.runs.checkpoints import CheckpointFile, Position, clear_unfinished, prune, publish
from bigmix.runs.state_file import (
    AVERAGE,
    MOMENTS,
    WEIGHTS,
    FlatState,
    file_of_rank,
    tensors_of,
    write_state,
)
from bigmix.terminal import gib

_SPARE_BYTES = 64 << 20  # left free on the disk for logs and other files of the run


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionPolicy:
    """Which checkpoints are kept.

    newest: how many of the newest
    every: those whose step is a multiple of this as well; 0: none
    """

    newest: int
    every: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Write:
    """A checkpoint that is being written to the folder `temporary`.

    `file` is the file of this rank, once it is complete on the disk.
    """

    position: Position
    temporary: Path
    file: Future[CheckpointFile]


class Saver:
    """Writes the checkpoints of a run.

    All ranks must make the same calls in the same order; `save`, `settle`, `finish` and `close` are
    collectives.

    wait_s: seconds that the training loop has waited for saves
    last_step: step of the newest complete checkpoint, None if there is none
    begun_step: step of the newest checkpoint that was begun, 0 if none was
    """

    def __init__(
        self,
        folder: Path,
        cluster: Cluster,
        retention: RetentionPolicy,
        *,
        in_background: bool,
        report: Callable[[str], None],
    ) -> None:
        """`report` is given a message for each checkpoint that could not be written.

        Where not `in_background`, `save` returns once the checkpoint is written. Checkpoints that
        an earlier process has left incomplete are deleted.
        """
        self.wait_s = 0.0
        self.last_step: int | None = None
        self.begun_step = 0
        self._folder = folder
        self._cluster = cluster
        self._retention = retention
        self._in_background = in_background
        self._report = report
        self._copies: dict[str, Tensor] = {}
        self._write: _Write | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        if cluster.world.is_first:
            clear_unfinished(folder)

    def resume(self, step: int) -> None:
        """Note that the run resumes from the checkpoint of a step, which is now the newest."""
        self.last_step = self.begun_step = step

    def is_due(self, step: int, every: int) -> bool:
        """Whether a multiple of `every` steps has passed since the last checkpoint was begun.

        Never if `every` is 0.
        """
        return every > 0 and step // every > self.begun_step // every

    def save(self, flats: Iterator[FlatState], position: Position) -> None:
        """Begin a checkpoint of this rank's flat states at a position; a collective.

        Returns once the states are copied; where not in the background, once the checkpoint is
        written or given up. First finishes the checkpoint before it.
        """
        self.finish()
        began = time.perf_counter()
        self.begun_step = position.step
        temporary = self._folder / f".tmp-step-{position.step:06d}"
        copies = (self._in_host_memory(index, flat) for index, flat in enumerate(flats))
        tensors, metadata = tensors_of(copies)
        if self._make_room(temporary, sum(4 * tensor.numel() for tensor in tensors.values())):
            path = temporary / file_of_rank(self._cluster.world.rank)
            file = self._thread.submit(write_state, path, tensors, metadata)
            self._write = _Write(position=position, temporary=temporary, file=file)
        self.wait_s += time.perf_counter() - began
        if not self._in_background:
            self.finish()

    def settle(self) -> None:
        """Publish the checkpoint that is being written, if all ranks have written their files.

        Called between two steps; it does not wait for a disk.
        """
        if self._write is None:
            return
        (num_written,) = self._cluster.sum_counts([self._write.file.done()])
        if num_written == self._cluster.world.size:
            self._close(self._write)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete on all ranks, or given up."""
        if self._write is None:
            return
        began = time.perf_counter()
        self._write.file.exception()
        self._close(self._write)
        self.wait_s += time.perf_counter() - began

    def close(self) -> None:
        """Finish and end the thread."""
        self.finish()
        self.stop()

    def stop(self) -> None:
        """End the thread, once what it writes is written; a checkpoint without a name stays without
        one.
        """
        self._thread.shutdown()

    def _in_host_memory(self, index: int, flat: FlatState) -> FlatState:
        """A copy of a flat state in memory that the next steps do not change.

        Where the loop waits for the disk, tensors that are in host memory need no copy.
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

    def _make_room(self, temporary: Path, own_bytes: int) -> bool:
        """Make the folder to write to; False on all ranks where the disk has no room."""
        needed_bytes = sum(self._cluster.gather(own_bytes))
        fault = None
        if self._cluster.world.is_first:
            fault = self._folder_fault(temporary, needed_bytes)
        fault, *_ = self._cluster.gather(fault)
        if fault is not None:
            self._give_up(fault)
        return fault is None

    def _folder_fault(self, temporary: Path, needed_bytes: int) -> str | None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            free_bytes = shutil.disk_usage(temporary).free
        except OSError as error:
            return f"{temporary} cannot be created ({error.strerror})"
        if free_bytes < needed_bytes + _SPARE_BYTES:
            shutil.rmtree(temporary, ignore_errors=True)
            return (
                f"{self._folder} has {gib(free_bytes, 2)} free and a checkpoint needs"
                f" {gib(needed_bytes + _SPARE_BYTES, 2)}; free space, or keep fewer with"
                " checkpoint.keep"
            )
        return None

    def _close(self, write: _Write) -> None:
        self._write = None
        error = write.file.exception()
        own = str(error) if error is not None else write.file.result()
        files = self._cluster.gather(own)
        faults = [f"rank {r}: {file}" for r, file in enumerate(files) if isinstance(file, str)]
        fault = "; ".join(faults) or None
        if self._cluster.world.is_first:
            fault = fault or self._publish(write, files)
            if fault is not None:
                shutil.rmtree(write.temporary, ignore_errors=True)
        fault, *_ = self._cluster.gather(fault)
        if fault is None:
            self.last_step = write.position.step
        else:
            self._give_up(f"the checkpoint of step {write.position.step} was not written: {fault}")

    def _publish(self, write: _Write, files: list[CheckpointFile]) -> str | None:
        final = self._folder / f"step-{write.position.step:06d}"
        try:
            publish(write.temporary, final, self._cluster.world.size, files, write.position)
        except OSError as error:
            return str(error)
        # Deleting many gigabytes takes a while, and nothing needs to wait for it.
        self._thread.submit(
            prune, self._folder, keep=self._retention.newest, keep_every=self._retention.every
        )
        return None

    def _give_up(self, fault: str) -> None:
        last = (
            "there is no checkpoint yet"
            if self.last_step is None
            else f"the last checkpoint is of step {self.last_step}"
        )
        self._report(f"{fault}; the run continues ({last})")
