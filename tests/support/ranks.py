"""Starts real gloo processes that have imported the libraries already.

They run a script such as launch/train.py, or a function of tests/support/workers.
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
# What ranks import, and what transformers imports when a model is made.
_IMPORTED = [
    "support.workers.engines",
    "support.workers.checkpoints",
    "support.workers.behaviour",
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


def environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The environment of a rank, as torchrun would set it on one machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank}
    sizes = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return os.environ | {
        **{name: str(value) for name, value in (ranks | sizes).items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
    }


class Started:
    """A process with the interface of subprocess.Popen; its two output streams are one text."""

    def __init__(self, work: Callable[..., None], environment: dict, folder: Path, **given) -> None:
        self._output = Path(_output_folder().name) / f"{next(_NUMBERS)}.log"
        self._process = _starter().Process(
            target=_begin, args=(work, environment, folder, self._output), kwargs=given
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
            raise subprocess.TimeoutExpired(str(self.pid), timeout, self._output.read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._output.read_text(), None


def start_script(script: Path, folder: Path, environment: dict, *arguments: str) -> Started:
    """`python script arguments...` in a folder, without the seconds that its imports take."""
    return Started(_be_script, environment, folder, script=script, arguments=arguments)


def run_on_ranks(
    function: str,
    num_ranks: int,
    folder: Path,
    arguments: dict | None = None,
    *,
    module: str = "support.workers.engines",
) -> list:
    """What `module.function(rank, **arguments)` returns on each of some processes, through JSON."""
    port = free_port()
    outputs = [folder / f"{function}-{num_ranks}-{rank}.json" for rank in range(num_ranks)]
    processes = [
        Started(
            _be_worker,
            environment(rank, num_ranks, port),
            folder,
            module=module,
            arguments=[function, json.dumps(arguments or {}), str(output)],
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=300)
            assert process.returncode == 0, printed
    finally:
        for process in processes:
            process.kill()
    return [json.loads(output.read_text()) for output in outputs]


@functools.cache
def _output_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="bigmix-output-")


def _starter():
    """What forks processes that have imported torch, deepspeed and transformers already.

    Their import takes longer than most tests.
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


def _begin(work, environment: dict, folder: Path, output: Path, **given) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Imported here, as what only starts ranks needs no torch. OMP_NUM_THREADS has no effect on a
    # torch that is already imported.
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    try:
        work(**given)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _be_script(script: Path, arguments: list) -> None:
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _be_worker(module: str, arguments: list) -> None:
    sys.argv = [module, *arguments]
    worker = importlib.import_module(module)
    worker.main(vars(worker))
