"""Draws faults, starts the runs that meet them until they are done, and compares the results."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import chaos_faults
from chaos_data import SAVE_EVERY, STEPS, write_data
from chaos_faults import FAULT, FULL_STEPS, NOTES, Fault
from chaos_processes import OUTPUT, Process, Way, import_what_was, start
from chaos_result import (
    Trained,
    first_uses,
    inputs_of,
    last_checkpoint,
    near,
    rows_of,
    rows_wrong,
    trained,
)

from bigmix.cluster.processes import has_ended
from bigmix.runs.checkpoints import FOLDER

MAX_STARTS = 5
MAX_START_S = 120.0
KILL_OTHERS_S = 20.0  # after the first rank has failed, as srun --kill-on-bad-exit does
DISK_BYTES = 80 << 20
OUTPUTS = "outputs"  # the folder with what runs have printed that were not as they must be
OUTSIDE = {  # sent by the benchmark, once a rank is at the fault's place
    "kill-rank": signal.SIGKILL,
    "kill-launcher": signal.SIGKILL,
    "kill-all": signal.SIGKILL,
    "world-size": signal.SIGKILL,
    "sigterm": signal.SIGTERM,
    "sigusr1": signal.SIGUSR1,
}
NAMES = [*OUTSIDE, *(name for name in chaos_faults.INSIDE if name != "file-limit")]
PLACES = ("waiting", "agreement", "forward", "backward", "optimizer", "saving", "start")
ONE_START = {"disk-full", "file-limit", "nan-once", "nan-three", "shard-replace"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A run and what happens to it.

    A fault from outside happens to `victims` (ranks, -1 for the launcher), `delay_s` after a rank
    is at the fault's place.
    """

    fault: Fault
    way: Way
    num_ranks: int
    num_ranks_after: int
    save: str
    victims: Sequence[int] = ()
    delay_s: float = 0.0

    @property
    def is_same_world(self) -> bool:
        """Whether the number of ranks stays the same."""
        return self.num_ranks == self.num_ranks_after


@dataclass(kw_only=True, slots=True)
class Result:
    """How a run has ended; `faults` lists what is not as it must be.

    ends: the exit codes of each start
    identical: whether weights and losses are those of the run without the fault; None if they need
        not be
    """

    case: Case
    happened: bool = False
    ends: list[list[int]] = field(default_factory=list)
    survived: bool = False
    identical: bool | None = None
    steps_lost: int = 0
    rows_wrong: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def draw(name: str, random_: random.Random, *, executed: bool) -> Case:
    """Draw a case for a fault: its place and time, and how the run is started."""
    place = random_.choice(PLACES) if name in OUTSIDE else "inside"
    saves = range(SAVE_EVERY, STEPS - 1, SAVE_EVERY)
    at_save = place == "saving" or name in ("kill-in-save", "kill-before-latest")
    step = random_.choice(saves) if at_save else random_.randint(SAVE_EVERY + 1, STEPS - 3)
    if name in ("disk-full", "file-limit"):
        # There is room again before the last save.
        step = min(step, STEPS - 1 - FULL_STEPS)
    supervised = name == "kill-launcher" or (name != "world-size" and random_.random() < 0.5)
    num_ranks = random_.choice((1, 2, 4)) if name == "world-size" else 2
    others = [number for number in (1, 2, 4) if number != num_ranks]
    return Case(
        fault=Fault(
            name=name,
            place=place,
            step=step,
            part=random_.random(),
            rank=(
                0
                if name == "kill-before-latest" or name.startswith("shard")
                else random_.randrange(num_ranks)
            ),
        ),
        way=Way(supervised=supervised, executed=executed),
        num_ranks=num_ranks,
        num_ranks_after=random_.choice(others) if name == "world-size" else num_ranks,
        save=random_.choice(("background", "blocking")),
        victims=_victims(name, num_ranks, supervised, random_),
        delay_s=random_.random() * (1.5 if place == "start" else 0.05),
    )


def _victims(name: str, num_ranks: int, supervised: bool, random_: random.Random) -> Sequence[int]:
    all_processes = [*range(num_ranks), *([-1] if supervised else [])]
    if name in ("kill-all", "world-size"):
        return all_processes[::-1]
    if name == "kill-launcher":
        return [-1]
    return [random_.choice(all_processes[:num_ranks] if name == "kill-rank" else all_processes)]


class Bench:
    """A folder with the data of all runs, and what runs without a fault have trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[int, Sequence[int]], Trained] = {}
        self._num_runs = 0
        write_data(folder / "data")

    def fault_free(self, num_ranks: int, passed: Sequence[int] = ()) -> Trained:
        """What a run without a fault trains, with `train.pass_over` set to some steps."""
        key = (num_ranks, tuple(passed))
        if key not in self._known:
            case = Case(
                fault=Fault(name="none", rank=-1),
                way=Way(supervised=False, executed=False),
                num_ranks=num_ranks,
                num_ranks_after=num_ranks,
                save="blocking",
            )
            with self._run_folder() as folder:
                run = Run(folder, case, [f"train.pass_over={list(passed)}"])
                run.go()
                assert run.result.survived, run.output()
                import_what_was(folder)
                self._known[key] = trained(folder)
        return self._known[key]

    def run(self, case: Case) -> Result:
        """Start the run of a case until it is done, and compare it."""
        began = time.monotonic()
        with self._run_folder() as folder:
            case = self._with_shard(case)
            run = Run(folder, case, [])
            with _small_disk(folder, case):
                run.go()
                if run.result.survived:
                    self._compare(run)
            result = run.result
            if result.faults:
                (self.folder / OUTPUTS).mkdir(exist_ok=True)
                shutil.copy(folder / NOTES / OUTPUT, self.folder / OUTPUTS / folder.name)
        result.seconds = time.monotonic() - began
        return result

    @contextmanager
    def _run_folder(self) -> Any:
        self._num_runs += 1
        folder = self.folder / f"run-{self._num_runs:04d}"
        shutil.copytree(self.folder / "data", folder)
        (folder / NOTES).mkdir()
        yield folder
        shutil.rmtree(folder)

    def _with_shard(self, case: Case) -> Case:
        """The case with a shard to damage that is first read some steps after the fault."""
        if not case.fault.name.startswith("shard"):
            return case
        firsts = first_uses(inputs_of(self.folder / "data", case.num_ranks).plan)
        late = sorted((at, shard) for shard, at in firsts.items() if at >= 6)
        at, shard = late[int(case.fault.part * 97) % len(late)]
        return replace(case, fault=replace(case.fault, step=at - 4, shard=shard))

    def _compare(self, run: "Run") -> None:
        case, result, own = run.case, run.result, trained(run.folder)
        expected = self._expected(run, own)
        result.steps_lost = own.num_repeated
        result.rows_wrong = rows_wrong(own.rows, expected.rows)
        if result.rows_wrong:
            result.faults.append(f"{result.rows_wrong} rows lost or repeated")
        if case.is_same_world and expected.weights:
            result.identical = own.weights == expected.weights and own.losses == expected.losses
            if not result.identical:
                result.faults.append("the weights differ")
        elif not near(own.losses, expected.losses):
            result.faults.append("the losses differ")
        result.faults += _lost_too_many(case, own.num_repeated)

    def _expected(self, run: "Run", own: Trained) -> Trained:
        """What the run should have trained."""
        fault = run.case.fault
        if fault.name.startswith("nan"):
            steps = [fault.step] if fault.name == "nan-once" else range(fault.step, fault.step + 3)
            return self.fault_free(run.case.num_ranks, tuple(steps))
        if fault.name != "shard-replace":
            return self.fault_free(run.case.num_ranks_after)
        listed = last_checkpoint(run.folder)
        assert not isinstance(listed, str)
        quarantine = listed.position.data.quarantine
        plan = inputs_of(self.folder / "data", run.case.num_ranks).plan.with_quarantine(quarantine)
        if not quarantine.first_steps:
            run.result.faults.append("no shard was replaced")
        elsewhere = self._elsewhere(run.case)
        if elsewhere.rows != own.rows:
            run.result.faults.append("other rows on another number of ranks")
        return Trained(rows=rows_of(plan), losses=elsewhere.losses, weights=(), num_repeated=0)

    def _elsewhere(self, case: Case) -> Trained:
        """What a run with the same fault trains on another number of ranks."""
        with self._run_folder() as folder:
            run = Run(folder, replace(case, num_ranks=4 if case.fault.part < 0.5 else 1), [])
            run.go()
            return trained(folder)


class Run:
    """One run, from its first start until it ends with 0 or is given up."""

    def __init__(self, folder: Path, case: Case, overrides: Sequence[str]) -> None:
        self.folder, self.case = folder, case
        self.result = Result(case=case)
        policy = "replace" if case.fault.name == "shard-replace" else "fail"
        self._overrides = [
            *overrides,
            f"checkpoint.background={str(case.save == 'background').lower()}",
            f"bad_shards={policy}",
        ]
        case.fault.write(folder / FAULT)

    def go(self) -> None:
        """Start the run until it is done, as a user would."""
        for number in range(MAX_STARTS):
            num_ranks = self.case.num_ranks_after if number else self.case.num_ranks
            ended = self._once(num_ranks)
            self.result.ends.append(ended)
            if set(ended) == {0}:
                fault = last_checkpoint(self.folder)
                self.result.survived = not isinstance(fault, str)
                break
            self._restore_shard()
        self.result.happened = self._has_happened()
        self.result.faults += self._wrong_ends()

    def output(self) -> str:
        """What the run has printed."""
        return (self.folder / NOTES / OUTPUT).read_text(errors="replace")

    def _once(self, num_ranks: int) -> list[int]:
        """Start the run once and wait for its end; the exit codes."""
        processes = start(self.folder, num_ranks, self._overrides, self.case.way)
        began, failed_at = time.monotonic(), None
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            self._strike(processes, now - began)
            if failed_at is None and any(process.poll() for process in processes):
                failed_at = now
            late = now - began > MAX_START_S
            if late:
                self.result.faults.append(f"it did not end within {MAX_START_S:.0f} s")
            if late or (failed_at is not None and now - failed_at > KILL_OTHERS_S):
                for process in processes:
                    process.kill()
                    process.wait()
            time.sleep(0.001)
        self._wait_for_orphans()
        return [int(process.returncode or 0) for process in processes]

    def _has_happened(self) -> bool:
        notes, is_outside = self.folder / NOTES, self.case.fault.name in OUTSIDE
        return (notes / ("reached" if is_outside else "happened")).exists()

    def _strike(self, processes: Sequence[Process], since_s: float) -> None:
        """Send the signal of a fault from outside, once, when its time has come."""
        fault, notes = self.case.fault, self.folder / NOTES
        number = OUTSIDE.get(fault.name)
        if number is None or (notes / "sent").exists():
            return
        if fault.place == "start":
            if since_s < self.case.delay_s or not self._have_started():
                return
            chaos_faults.is_first(notes)
        elif not (notes / "happened").exists():
            return
        else:
            time.sleep(self.case.delay_s)
        sent = [self._send(victim, number, processes) for victim in self.case.victims]
        (notes / "sent").touch()
        if any(sent):
            (notes / "reached").touch()

    def _have_started(self) -> bool:
        return len(list((self.folder / NOTES).glob("process-*"))) == self.case.num_ranks

    def _send(self, victim: int, number: int, processes: Sequence[Process]) -> bool:
        """Send a signal; False if the victim had already ended."""
        if victim < 0:
            process = processes[0].pid
        else:
            (path,) = (self.folder / NOTES).glob(f"process-*-{victim}")
            process = int(path.read_text())
        if has_ended(process):
            return False
        with suppress(ProcessLookupError):
            os.kill(process, number)
        return True

    def _wait_for_orphans(self) -> None:
        """Wait for ranks whose launcher was killed: they save and end on their own."""
        until = time.monotonic() + MAX_START_S
        paths = (self.folder / NOTES).glob("process-*")
        left = [process for path in paths if not has_ended(process := int(path.read_text()))]
        while left and time.monotonic() < until:
            left = [process for process in left if not has_ended(process)]
            time.sleep(0.01)
        for process in left:
            self.result.faults.append("a rank outlived its launcher")
            os.kill(process, signal.SIGKILL)

    def _restore_shard(self) -> None:
        """Restore the shard that the fault has damaged, if the run is not to replace it."""
        shard = self.case.fault.shard
        if shard and self.case.fault.name == "shard-fail":
            shutil.copy(self.folder.parent / "data" / shard, self.folder / shard)

    def _codes_after_stop(self) -> set[int]:
        """The exit codes that are right after a stop request."""
        codes = {0, 75, -signal.SIGTERM, -signal.SIGUSR1}
        # Before the ranks have met, one that waits for another is killed by the launcher.
        return codes | {-signal.SIGKILL} if self.case.fault.place == "start" else codes

    def _wrong_ends(self) -> list[str]:
        """What is not as it must be about the exit codes."""
        fault, ends = self.case.fault, self.result.ends
        wrong = [] if self.result.survived else [f"the run ended with {ends}"]
        if fault.name in ONE_START and len(ends) > 1:
            wrong.append(f"the run did not end on its own but with {ends[0]}")
        if fault.name in ("disk-full", "file-limit") and "the run continues (" not in self.output():
            wrong.append("no checkpoint was given up")
        if fault.name in ("sigterm", "sigusr1") and not set(ends[0]) <= self._codes_after_stop():
            wrong.append(f"after a stop request the run ended with {ends[0]}")
        if (
            self.case.way.supervised
            and fault.name in ("kill-rank", "kill-in-save", "kill-before-latest")
            and len(ends) > 1
        ):
            wrong.append(f"the supervisor gave up with {ends[0]}")
        if fault.name == "shard-fail" and not set(ends[0]) <= {1, 2}:
            wrong.append(f"with a bad shard the run ended with {ends[0]}")
        return wrong


@contextmanager
def _small_disk(folder: Path, case: Case) -> Any:
    """Mount a small disk for the checkpoints of a run whose fault fills it."""
    if case.fault.name != "disk-full":
        yield
        return
    checkpoints = folder / "run" / FOLDER
    checkpoints.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(checkpoints)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(checkpoints)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether a small disk can be mounted here."""
    mount = folder / "mount"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)],
        capture_output=True,
        check=False,
    )
    if done.returncode == 0:
        subprocess.run(["umount", str(mount)], check=True)
    mount.rmdir()
    return done.returncode == 0


def _lost_too_many(case: Case, steps: int) -> list[str]:
    # In the background a checkpoint is not complete at once, and the run trains on meanwhile.
    most = SAVE_EVERY if case.save == "blocking" else 2 * SAVE_EVERY - 1
    if case.fault.name in ("sigterm", "sigusr1"):
        most = 0
    return [f"{steps} steps lost, {most} may be"] if steps > most else []
