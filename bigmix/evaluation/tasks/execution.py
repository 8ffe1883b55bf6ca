"""Runs programs that a model has written, within limits, and reports whether they pass.

The limits stop accidents. They are not a sandbox: a program can read files and use the network as
this user can.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile

_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.S)
# The child sets its own limits: a function between fork and exec can hang where there are threads.
# It reports a program that reaches its end: one that exits before its test has not passed.
_RUNNER = """\
import os, resource, sys, types
memory, seconds, report = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
program = sys.modules["program"] = types.ModuleType("program")
exec(compile(sys.stdin.read(), "program", "exec"), program.__dict__)
os.write(report, b"end")
"""


def program_of(output: str, prompt: str | None, test: str) -> str:
    """The program to run: the code of an output followed by its test.

    The output continues `prompt` where there is one; else its first fenced block is the code, or
    all of it where there is none.
    """
    if prompt is not None:
        return f"{prompt}{output}\n{test}\n"
    fenced = _FENCED.search(output)
    return f"{fenced[1] if fenced else output}\n{test}\n"


def passes(program: str, *, timeout_s: float, memory_mib: int) -> bool:
    """Whether a Python program reaches its end without an error; it runs in a process of its own
    with an empty folder and environment.
    """
    reading, writing = os.pipe()
    limits = [str(memory_mib << 20), str(int(timeout_s) + 1), str(writing)]
    with (
        tempfile.TemporaryDirectory(prefix="bigmix-program-") as folder,
        os.fdopen(reading, "rb") as end,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER, *limits],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(program.encode(errors="replace"), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_all(process)
        os.set_blocking(reading, False)
        return process.returncode == 0 and end.read() == b"end"


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and those that it started, unless they have a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
