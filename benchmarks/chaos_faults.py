"""A fault goes in; a rank does it to itself, once, at its step and place, and writes down the rows
that it trains.

The wrappers stand around functions of bigmix, which does the rest itself. `install` is called in a
rank before it runs, by a fork of the benchmark or, where a rank is an executable of its own, by a
`sitecustomize.py` with `SITE`.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_data import damage

from bigmix.cluster.watchdog import Watchdog
from bigmix.data import loader
from bigmix.model.engine import Engine
from bigmix.runs import checkpoints, state_file
from bigmix.train import step

NOTES = "notes"  # of the benchmark, beside the run's output
FAULT = "fault.json"
VARIABLE = "CHAOS"  # names the folder of a run to a rank that is an executable of its own
SITE = f"""\
import os
if "RANK" in os.environ and "{VARIABLE}" in os.environ:
    import pathlib, chaos_faults
    folder = pathlib.Path(os.environ["{VARIABLE}"])
    chaos_faults.install(folder, chaos_faults.read(folder / "{FAULT}"), os.environ)
"""
FULL_STEPS = 4  # for which a disk stays full: at least one save falls into them


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What is done, to whom and when; `place` begins what a rank tells the watchdog, `part` is 0 ..
    1.
    """

    name: str
    place: str = "forward"
    step: int = 0
    rank: int = 0
    part: float = 0.0
    shard: str = ""

    def write(self, path: Path) -> None:
        """Keep it where `read` finds it."""
        path.write_text(json.dumps(asdict(self)))


def read(path: Path) -> Fault:
    """The fault that `write` kept."""
    return Fault(**json.loads(path.read_text()))


def install(folder: Path, fault: Fault, environment: Mapping[str, str]) -> None:
    """Put the wrappers into the rank of this environment; `folder` has the run and the notes."""
    notes, rank = folder / NOTES, int(environment["RANK"])
    # A port is of one start: all of its ranks have it, and no rank of another start.
    start = environment["MASTER_PORT"]
    path = notes / f"process-{start}-{rank}"
    beside = notes / f"own-{path.name}"
    beside.write_text(str(os.getpid()))
    beside.rename(path)
    # A step's rows are read when they are due: a shard that goes bad is met in the middle of a run
    # of a few steps.
    loader.ASSEMBLED_ROWS = 1
    at = _At()
    _note_rows(notes / f"rows-{start}-{rank}.jsonl", at)
    if fault.name in INSIDE and (rank == fault.rank or fault.name in ON_ALL_RANKS):
        INSIDE[fault.name](folder, fault, at)
    elif rank == fault.rank and fault.place != "start":
        _tell_when_there(notes, fault)


class _At:
    """The step that this rank is at, and what it does before each."""

    def __init__(self) -> None:
        self.step = 0
        self.before: Callable[[], None] = lambda: None


def is_first(notes: Path) -> bool:
    """Whether the fault has not happened yet; from now on it has."""
    try:
        (notes / "happened").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def hashes(ids_BT: Any) -> list[str]:
    """The rows of a micro-batch by a checksum of their tokens."""
    return [hashlib.sha1(ids_T.astype("<i4").tobytes()).hexdigest()[:12] for ids_T in ids_BT]


def _note_rows(path: Path, at: _At) -> None:
    real = step.run

    def run(engine: Any, cluster: Any, ready: Any, *given: Any) -> Any:
        at.step = ready.batch.step
        at.before()
        result = real(engine, cluster, ready, *given)
        rows = [found for micro in ready.batch.micro_batches for found in hashes(micro.ids_BT)]
        line = {"at": time.monotonic(), "step": at.step, "rows": [] if result.skipped else rows}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    step.run = run


def _tell_when_there(notes: Path, fault: Fault) -> None:
    """Tell the benchmark that this rank is where the fault is to happen; it sends the signal."""
    real, awaited = Watchdog.doing, f"step {fault.step}"

    def doing(self: Watchdog, text: str) -> None:
        real(self, text)
        if text.startswith(fault.place) and text.partition(",")[0].endswith(awaited):
            is_first(notes)

    Watchdog.doing = doing  # type: ignore[method-assign]


def _kill_in_save(folder: Path, fault: Fault, at: _At) -> None:
    """kill -9 in the middle of one of the writes of a state file."""
    del at
    real, left = state_file._write_all, [int(fault.part * 7)]

    def write_all(file: Any, content: Any) -> None:
        is_here = f"step-{fault.step:06d}" in file.name
        if is_here and not left[0] and is_first(folder / NOTES):
            file.write(memoryview(content)[: int(len(content) * fault.part)])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= is_here
        real(file, content)

    state_file._write_all = write_all


def _kill_before_latest(folder: Path, fault: Fault, at: _At) -> None:
    del at
    real = checkpoints.replace_text

    def replace_text(path: Path, text: str) -> None:
        is_here = path.name == checkpoints.LATEST and text == f"step-{fault.step:06d}\n"
        if is_here and is_first(folder / NOTES):
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, text)

    checkpoints.replace_text = replace_text


def _fill_disk(folder: Path, fault: Fault, at: _At) -> None:
    """The disk of the checkpoints is full for some steps: before a save looks at it, or only once
    it writes.
    """
    folder_of_checkpoints, real = folder / "run" / checkpoints.FOLDER, state_file._write_all
    filler = folder_of_checkpoints / f"filler-{os.getpid()}"

    def is_full() -> bool:
        return fault.step <= at.step < fault.step + FULL_STEPS

    def fill() -> None:
        is_first(folder / NOTES)
        with filler.open("wb") as file:
            while free := shutil.disk_usage(folder_of_checkpoints).free:
                # The other rank may be writing, and then there is less room than there was.
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), file.tell(), free)
                    file.seek(free, os.SEEK_CUR)

    def before() -> None:
        if not is_full():
            filler.unlink(missing_ok=True)
        elif fault.part < 0.5 and not filler.exists():
            fill()

    def write_all(file: Any, content: Any) -> None:
        if is_full() and shutil.disk_usage(folder_of_checkpoints).free:
            fill()
        real(file, content)

    at.before = before
    if fault.part >= 0.5:
        state_file._write_all = write_all


def _limit_files(folder: Path, fault: Fault, at: _At) -> None:
    """No file may grow beyond a size for some steps, where no small disk can be made."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def before() -> None:
        is_full = fault.step <= at.step < fault.step + FULL_STEPS
        if is_full:
            is_first(folder / NOTES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if is_full else most, most))

    at.before = before


def _no_finite_loss(num_steps: int) -> Callable[[Path, Fault, _At], None]:
    def put_in(folder: Path, fault: Fault, at: _At) -> None:
        real = Engine.forward

        def forward(self: Engine, batch: Any) -> Any:
            value, sums = real(self, batch)
            if not fault.step <= at.step < fault.step + num_steps:
                return value, sums
            is_first(folder / NOTES)
            return value * float("nan"), sums

        Engine.forward = forward  # type: ignore[method-assign]

    return put_in


def _damage_shard(folder: Path, fault: Fault, at: _At) -> None:
    def before() -> None:
        if at.step >= fault.step and is_first(folder / NOTES):
            damage(folder / fault.shard, removed=fault.part < 0.5)

    at.before = before


INSIDE: Mapping[str, Callable[[Path, Fault, _At], None]] = {
    "kill-in-save": _kill_in_save,
    "kill-before-latest": _kill_before_latest,
    "disk-full": _fill_disk,
    "file-limit": _limit_files,
    "nan-once": _no_finite_loss(1),
    "nan-three": _no_finite_loss(3),
    "shard-fail": _damage_shard,
    "shard-replace": _damage_shard,
}
ON_ALL_RANKS = {"file-limit"}
