"""A program that a model has written goes in, whether it ends well within its limits comes out.

The limits hold back what runs wild. They are no jail: the program may read files and use the
network as this user can.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile

_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.S)
# Limits are set by the child itself: a function between fork and exec can hang where threads are.
# Only a program that comes to its end says so: one that exits before its test has not passed it.
_RUNNER = """\
import os, resource, sys, types
memory, seconds, said = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
program = sys.modules["program"] = types.ModuleType("program")
exec(compile(sys.stdin.read(), "program", "exec"), program.__dict__)
os.write(said, b"end")
"""


def program_of(output: str, prompt: str | None, test: str) -> str:
    """The program to judge: the code of an output with its test behind it, and before it a prompt
    that it continues.
    """
    if prompt is not None:
        return f"{prompt}{output}\n{test}\n"
    fenced = _FENCED.search(output)
    return f"{fenced[1] if fenced else output}\n{test}\n"


def passes(program: str, *, timeout_s: float, memory_mib: int) -> bool:
    """Whether a Python program comes to its end without an error: in a process of its own, an empty
    folder and environment.
    """
    heard, said = os.pipe()
    limits = [str(memory_mib << 20), str(int(timeout_s) + 1), str(said)]
    with (
        tempfile.TemporaryDirectory(prefix="bigmix-program-") as folder,
        os.fdopen(heard, "rb") as end,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER, *limits],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[said],
            start_new_session=True,
        )
        os.close(said)
        try:
            process.communicate(program.encode(errors="replace"), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_all(process)
        os.set_blocking(heard, False)
        return process.returncode == 0 and end.read() == b"end"


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    """End the process and what it has started, unless that has left for a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
