"""Starts the processes of a run: forked, so that a start takes a second, or new interpreters."""

import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_data import ROOT
from chaos_faults import FAULT, NOTES, SITE, VARIABLE, install, read

from bigmix.cluster.signals import STOP_SIGNALS
from bigmix.cluster.supervisor import LaunchSpec, StopRequests, supervise
from bigmix.cluster.world import free_port
from bigmix.commands.rank import main
from bigmix.runs.checkpoints import FOLDER, newest_step

RESTARTS = 3
MODULES, OUTPUT = "modules", "output"  # files in the notes


class Forked:
    """A forked process, with the methods of subprocess.Popen that the supervisor uses."""

    def __init__(
        self, work: Callable[[], int], folder: Path, environment: Mapping[str, str]
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _become(work, folder, environment)

    def poll(self) -> int | None:
        """The exit code, or the negative number of a signal; None while the process runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self) -> int | None:
        """Wait until the process has ended; its exit code."""
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


Process = Forked | subprocess.Popen[bytes]


def _become(work: Callable[[], int], folder: Path, environment: Mapping[str, str]) -> None:
    """Do the work of a forked child and end it.

    It inherits neither the session, the signal handlers nor the output of its parent.
    """
    code = 1
    try:
        os.setsid()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        os.environ.update(environment)
        log = os.open(folder / NOTES / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing that the parent does at its end may happen here.
        os._exit(code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a run is started: by `bigmix train` or rank by rank, and by fork or new interpreter."""

    supervised: bool
    executed: bool


def start(folder: Path, num_ranks: int, overrides: Sequence[str], way: Way) -> Sequence[Process]:
    """Start a run; returns what a user has started: the supervisor, or all ranks."""
    given = ["recipe.yaml", *overrides]
    if not way.supervised:
        return _ranks(folder, num_ranks, given, executed=way.executed)
    if way.executed:
        command = [
            "-m",
            "bigmix.commands",
            "train",
            *given,
            "--ranks",
            str(num_ranks),
            "--restarts",
            str(RESTARTS),
        ]
        return [_execute(folder, command, _common())]
    return [Forked(lambda: _supervise(folder, num_ranks, given), folder, _common())]


def _supervise(folder: Path, num_ranks: int, given: Sequence[str]) -> int:
    requests = StopRequests()

    def begin() -> Any:
        return _ranks(folder, num_ranks, given, executed=False)

    spec = LaunchSpec(
        start=begin, newest_step=lambda: newest_step(folder / "run" / FOLDER), max_restarts=RESTARTS
    )
    return supervise(spec, requests, lambda line: print(line, flush=True))


def _ranks(
    folder: Path, num_ranks: int, given: Sequence[str], *, executed: bool
) -> Sequence[Process]:
    port = free_port()
    environments = [_environment(rank, num_ranks, port) for rank in range(num_ranks)]
    if executed:
        command = [str(ROOT / "launch/train.py"), *given]
        return [_execute(folder, command, environment) for environment in environments]
    return [
        Forked(
            lambda own=environment: _be_rank(folder, given, own),  # type: ignore[misc]
            folder,
            environment,
        )
        for environment in environments
    ]


def _be_rank(folder: Path, given: Sequence[str], environment: Mapping[str, str]) -> int:
    install(folder, read(folder / FAULT), environment)
    code = main("train", given)
    (folder / NOTES / MODULES).write_text("\n".join(sys.modules))
    return code


def import_what_was(folder: Path) -> None:
    """Import what a run that is done has imported while it ran, so that later forks have it."""
    for name in (folder / NOTES / MODULES).read_text().split():
        if name not in sys.modules:
            # Some are known by a name under which they cannot be imported.
            with suppress(Exception):
                importlib.import_module(name)


def _execute(
    folder: Path, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    (folder / NOTES / "sitecustomize.py").write_text(SITE)
    paths = {"PYTHONPATH": os.pathsep.join(map(str, [folder / NOTES, ROOT, ROOT / "benchmarks"]))}
    with (folder / NOTES / OUTPUT).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | environment | paths | {VARIABLE: str(folder)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _common() -> dict[str, str]:
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank}
    sizes = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    own = {name: str(value) for name, value in (ranks | sizes).items()}
    return _common() | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
