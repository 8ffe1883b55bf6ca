"""Runs a function of tests/workers.py on several real gloo processes and returns what each rank gave back."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, function, json.dumps(arguments or {}), str(output)],
            env=environment(rank, ranks, port),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return [json.loads(output.read_text()) for output in outputs]
