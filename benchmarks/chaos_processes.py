"""A run's folder and number of ranks go in; its processes come out: forked, so that a start takes a
second, or executed.
"""

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

from bigmix.cluster.signals import ASKING
from bigmix.cluster.supervisor import LaunchSpec, StopRequests, supervise
from bigmix.cluster.world import free_port
from bigmix.commands import rank
from bigmix.runs.checkpoints import FOLDER, newest_step

RESTARTS = 3
MODULES = "modules"


class Forked:
    """A process that does some work, with what the supervisor asks of a process it has started."""

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
        """The exit code, below 0 for a signal; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self) -> int | None:
        """The exit code, once it has ended."""
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


Process = Forked | subprocess.Popen[bytes]


def _become(work: Callable[[], int], folder: Path, environment: Mapping[str, str]) -> None:
    """Be a new process: what this one has said and set about signals is not the child's."""
    code = 1
    try:
        os.setsid()
        for number in ASKING:
            signal.signal(number, signal.SIG_DFL)
        os.chdir(folder)
        os.environ.update(environment)
        log = os.open(folder / NOTES / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing of what the parent does at its end.
        os._exit(code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a run is started: by `bigmix train` or rank by rank, and whether as executables."""

    supervised: bool
    executed: bool


def start(folder: Path, ranks: int, words: Sequence[str], way: Way) -> Sequence[Process]:
    """What a user has then: the supervisor, or all of the ranks."""
    given = ["recipe.yaml", *words]
    if not way.supervised:
        return _ranks(folder, ranks, given, executed=way.executed)
    if way.executed:
        command = [
            "-m",
            "bigmix.commands",
            "train",
            *given,
            "--ranks",
            str(ranks),
            "--restarts",
            str(RESTARTS),
        ]
        return [_execute(folder, command, _common())]
    return [Forked(lambda: _supervise(folder, ranks, given), folder, _common())]


def _supervise(folder: Path, ranks: int, given: Sequence[str]) -> int:
    requests = StopRequests()

    def begin() -> Any:
        return _ranks(folder, ranks, given, executed=False)

    course = LaunchSpec(
        start=begin, newest_step=lambda: newest_step(folder / "run" / FOLDER), restarts=RESTARTS
    )
    return supervise(course, requests, lambda line: print(line, flush=True))


def _ranks(folder: Path, ranks: int, given: Sequence[str], *, executed: bool) -> Sequence[Process]:
    port = free_port()
    environments = [_environment(number, ranks, port) for number in range(ranks)]
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
    code = rank.main("train", given)
    (folder / NOTES / MODULES).write_text("\n".join(sys.modules))
    return code


def import_what_was(folder: Path) -> None:
    """Import here what a run that has ended well has imported while it ran, so that later forks
    have it.
    """
    for name in (folder / NOTES / MODULES).read_text().split():
        if name not in sys.modules:
            # Some are parts of others by another name.
            with suppress(Exception):
                importlib.import_module(name)


def _execute(
    folder: Path, command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    (folder / NOTES / "sitecustomize.py").write_text(SITE)
    paths = {"PYTHONPATH": os.pathsep.join(map(str, [folder / NOTES, ROOT, ROOT / "benchmarks"]))}
    with (folder / NOTES / "said").open("ab") as log:
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


def _environment(number: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    own = {name: str(value) for name, value in numbers.items()}
    return _common() | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
