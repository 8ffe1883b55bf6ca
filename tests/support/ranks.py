"""Starts real gloo processes from ones that have the libraries already: whole runs, or a function
of tests/support/workers.
"""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What ranks import, and what transformers imports once a model is made.
_IMPORTED = [
    "support.workers.engines",
    "support.workers.checkpoints",
    "support.workers.tasks",
    "bigmix.commands.main",
    "bigmix.train.run",
    "bigmix.evaluation.standalone",
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("llama", "qwen2", "gpt2", "gemma2")
    ),
]

_NUMBERS = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return os.environ | {
        **{name: str(value) for name, value in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
    }


class Started:
    """A process that was started here, as subprocess.Popen tells of one; what it says on either
    stream is one text.
    """

    def __init__(self, work: Callable[..., None], environment: dict, folder: Path, **given) -> None:
        self._said = Path(_kept_folder().name) / f"{next(_NUMBERS)}.log"
        self._process = _starter().Process(
            target=_begin, args=(work, environment, folder, self._said), kwargs=given
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout, self._said.read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._said.read_text(), None


def start_script(script: Path, folder: Path, environment: dict, *words: str) -> Started:
    """`python script words...` in a folder, without the seconds that its imports take."""
    return Started(_be_script, environment, folder, script=script, words=words)


def run_on_ranks(
    function: str,
    ranks: int,
    folder: Path,
    arguments: dict | None = None,
    *,
    module: str = "support.workers.engines",
) -> list:
    """The JSON that `module.function(rank, **arguments)` returns on each of `ranks` processes."""
    port = free_port()
    outputs = [folder / f"{function}-{ranks}-{rank}.json" for rank in range(ranks)]
    processes = [
        Started(
            _be_worker,
            environment(rank, ranks, port),
            folder,
            module=module,
            words=[function, json.dumps(arguments or {}), str(output)],
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [json.loads(output.read_text()) for output in outputs]


@functools.cache
def _kept_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bigmix-said-")


def _starter():
    """Starts processes that have torch, deepspeed and transformers already: their import takes
    longer than most tests.
    """
    starter = multiprocessing.get_context("forkserver")
    starter.set_forkserver_preload(_IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = environment(0, 1, 0)["PYTHONPATH"]
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return starter


def _begin(work, environment: dict, folder: Path, said: Path, **given) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Here, as those who only start ranks need no torch; OMP_NUM_THREADS comes too late for one that
    # is imported.
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    try:
        work(**given)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _be_script(script: Path, words: list) -> None:
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def _be_worker(module: str, words: list) -> None:
    sys.argv = [module, *words]
    run = importlib.import_module(module)
    run.main(vars(run))
