"""Process numbers go in, whether they have ended comes out; only where /proc tells, that is on
Linux.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A process; those of the same `machine` can see one another by their numbers."""

    machine: str
    process: int


def identity() -> Identity:
    """This process.

    Containers that number their processes apart count as machines, and without /proc each process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        machine = f"{socket.gethostname()} {os.getpid()}"
    return Identity(machine=machine, process=os.getpid())


def has_ended(process: int) -> bool:
    """Whether a process of this machine is gone, or ended and not yet asked for its exit code."""
    status = _status(process)
    return status is None or status[0] in "ZX"


def parent_of(process: int) -> int | None:
    """The process that started a process of this machine; None where it is gone."""
    status = _status(process)
    return None if status is None else int(status[1])


def command_of(process: int) -> str:
    """The words that a process of this machine was started with; empty where it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _status(process: int) -> list[str] | None:
    """The fields of /proc/N/stat behind the name in brackets, which may hold anything: state,
    parent, ...
    """
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
