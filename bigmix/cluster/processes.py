"""Reads about this machine and its processes from /proc, which only Linux has."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A process. Those of the same `machine` can look one another up by their process ids."""

    machine: str
    process: int


def identity() -> Identity:
    """The identity of this process.

    A container with process ids of its own counts as a machine; without /proc, each process does.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        machine = f"{socket.gethostname()} {os.getpid()}"
    return Identity(machine=machine, process=os.getpid())


def has_ended(process: int) -> bool:
    """Whether a process of this machine has ended, even if its parent has not yet waited for it."""
    status = _status(process)
    return status is None or status[0] in "ZX"


def parent_of(process: int) -> int | None:
    """The process id of the parent of a process of this machine; None if there is no process."""
    status = _status(process)
    return None if status is None else int(status[1])


def command_of(process: int) -> str:
    """The command line of a process of this machine; empty if there is no such process."""
    try:
        return (_PROC / f"{process}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def available_memory_bytes() -> int:
    """Memory of this machine that can be used without swapping; 0 if unknown."""
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 0


def _status(process: int) -> list[str] | None:
    """The fields of /proc/N/stat after the process name: state, parent, ...

    The name is in brackets and may itself hold spaces and brackets.
    """
    try:
        return (_PROC / f"{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
