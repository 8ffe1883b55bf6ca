"""Faults that a rank causes in itself, once, at a step and place; it also records its rows.

They wrap functions of bigmix, and the rest is what bigmix does. `install` is called in a rank
before it runs: by a fork of the benchmark or, in a new interpreter, by a `sitecustomize.py` that
holds `SITE`.
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

from bigmix import files
from bigmix.cluster.watchdog import Watchdog
from bigmix.data import run_plan
from bigmix.model.engine import Engine
from bigmix.runs import checkpoints, state_file
from bigmix.train import step

NOTES = "notes"  # the folder of the benchmark's own files, next to the run's output
FAULT = "fault.json"
VARIABLE = "CHAOS"  # gives a rank in a new interpreter the folder of its run
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
    """What happens to which rank, and when.

    place: how the activity begins that the rank then reports to its watchdog
    part: a random number from 0 to 1, of which each fault makes its own use
    """

    name: str
    place: str = "forward"
    step: int = 0
    rank: int = 0
    part: float = 0.0
    shard: str = ""

    def write(self, path: Path) -> None:
        """Write the fault to a file that `read` reads."""
        path.write_text(json.dumps(asdict(self)))


def read(path: Path) -> Fault:
    """The fault that `write` has written."""
    return Fault(**json.loads(path.read_text()))


def install(folder: Path, fault: Fault, environment: Mapping[str, str]) -> None:
    """Install the wrappers in the rank of this environment; `folder` has the run and the notes."""
    notes, rank = folder / NOTES, int(environment["RANK"])
    # All ranks of a start have the same port, and those of another start have another.
    start = environment["MASTER_PORT"]
    path = notes / f"process-{start}-{rank}"
    # The benchmark looks for names that begin with process-, and must not read half a number.
    temporary = notes / f"own-{path.name}"
    temporary.write_text(str(os.getpid()))
    temporary.rename(path)
    # Rows are read when their step is due, so that even a run of a few steps meets a bad shard in
    # the middle.
    run_plan.ASSEMBLED_ROWS = 1
    at = _At()
    _record_rows(notes / f"rows-{start}-{rank}.jsonl", at)
    if fault.name in INSIDE and (rank == fault.rank or fault.name in ON_ALL_RANKS):
        INSIDE[fault.name](folder, fault, at)
    elif rank == fault.rank and fault.place != "start":
        _report_when_there(notes, fault)


class _At:
    """The current step of this rank, and what it does before each step."""

    def __init__(self) -> None:
        self.step = 0
        self.before: Callable[[], None] = lambda: None


def is_first(notes: Path) -> bool:
    """Note that the fault happens; False if it has already happened."""
    try:
        (notes / "happened").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def hashes(ids_BT: Any) -> list[str]:
    """A checksum of the tokens of each row of a micro-batch."""
    return [hashlib.sha1(ids_T.astype("<i4").tobytes()).hexdigest()[:12] for ids_T in ids_BT]


def _record_rows(path: Path, at: _At) -> None:
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

    step.run = run  # type: ignore[assignment]


def _report_when_there(notes: Path, fault: Fault) -> None:
    """Report to the benchmark, which sends the signal, that this rank is at the fault's place."""
    real, awaited = Watchdog.doing, f"step {fault.step}"

    def doing(self: Watchdog, text: str) -> None:
        real(self, text)
        if text.startswith(fault.place) and text.partition(",")[0].endswith(awaited):
            is_first(notes)

    Watchdog.doing = doing  # type: ignore[method-assign]


def _kill_in_save(folder: Path, fault: Fault, at: _At) -> None:
    """kill -9 in the middle of a write to a state file."""
    del at
    real, left = state_file._write_all, [int(fault.part * 7)]

    def write_all(file: Any, content: Any) -> None:
        is_here = f"step-{fault.step:06d}" in file.name
        if is_here and not left[0] and is_first(folder / NOTES):
            file.write(memoryview(content)[: int(len(content) * fault.part)])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= is_here
        real(file, content)

    state_file._write_all = write_all  # type: ignore[assignment]


def _kill_before_latest(folder: Path, fault: Fault, at: _At) -> None:
    del at
    real = files.replace_text

    def replace_text(path: Path, text: str) -> None:
        is_here = path.name == checkpoints.LATEST and text == f"step-{fault.step:06d}\n"
        if is_here and is_first(folder / NOTES):
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, text)

    checkpoints.replace_text = replace_text  # type: ignore[attr-defined]


def _fill_disk(folder: Path, fault: Fault, at: _At) -> None:
    """Fill the disk of the checkpoints for some steps.

    Either before a save checks its free space, or once the save writes.
    """
    folder_of_checkpoints, real = folder / "run" / checkpoints.FOLDER, state_file._write_all
    filler = folder_of_checkpoints / f"filler-{os.getpid()}"

    def is_full() -> bool:
        return fault.step <= at.step < fault.step + FULL_STEPS

    def fill() -> None:
        is_first(folder / NOTES)
        with filler.open("wb") as file:
            while free := shutil.disk_usage(folder_of_checkpoints).free:
                # The other rank may be writing, so that there is less room than a moment ago.
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
        state_file._write_all = write_all  # type: ignore[assignment]


def _limit_files(folder: Path, fault: Fault, at: _At) -> None:
    """Limit the size of files for some steps, in place of a small disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def before() -> None:
        is_full = fault.step <= at.step < fault.step + FULL_STEPS
        if is_full:
            is_first(folder / NOTES)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if is_full else most, most))

    at.before = before


def _no_finite_loss(num_steps: int) -> Callable[[Path, Fault, _At], None]:
    def install_it(folder: Path, fault: Fault, at: _At) -> None:
        real = Engine.forward

        def forward(self: Engine, batch: Any) -> Any:
            value, sums = real(self, batch)
            if not fault.step <= at.step < fault.step + num_steps:
                return value, sums
            is_first(folder / NOTES)
            return value * float("nan"), sums

        Engine.forward = forward  # type: ignore[method-assign]

    return install_it


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
