"""Runs a function of tests/workers.py on several real gloo processes and returns what each rank gave back."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What ranks import, and what transformers and deepspeed import once a model and an optimizer are made.
_IMPORTED = [
    "workers", "state_workers", "task_workers", "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.original_muon",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "gpt2", "gemma2")),
]  # fmt: skip


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


def run_on_ranks(
    function: str,
    ranks: int,
    folder: Path,
    arguments: dict | None = None,
    *,
    module: str = "workers",
) -> list:
    """The JSON that `module.function(rank, **arguments)` returns on each of `ranks` processes."""
    port = free_port()
    outputs = [folder / f"{function}-{ranks}-{rank}.json" for rank in range(ranks)]
    said = [output.with_suffix(".log") for output in outputs]
    started = _starter()
    processes = [
        started.Process(
            target=_be_rank,
            args=(environment(rank, ranks, port), folder, said[rank]),
            kwargs={
                "module": module,
                "words": [function, json.dumps(arguments or {}), str(output)],
            },
        )
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    for process, log in zip(processes, said, strict=True):
        process.kill()
        assert process.exitcode == 0, log.read_text()
    return [json.loads(output.read_text()) for output in outputs]


def _starter():
    """Starts processes that have torch, deepspeed and transformers already: their import takes longer than most tests."""
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


def _be_rank(environment: dict, folder: Path, said: Path, *, module: str, words: list) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *words]
    # Here, as those who only start ranks need no torch; OMP_NUM_THREADS comes too late for one that is imported.
    import torch

    torch.set_num_threads(1)
    run = importlib.import_module(module)
    try:
        run.main(vars(run))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
