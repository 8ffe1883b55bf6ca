"""Paths go in; a file that was written in one step, or the checksum of one, comes out."""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO, Any

import xxhash

CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal."""
    return _hexdigest(path, hashlib.sha256())


def checksum_of(path: Path) -> str:
    """The XXH3 checksum of a file's content, 128 bits in hexadecimal: against accidents, at the
    speed of memory.
    """
    return _hexdigest(path, xxhash.xxh3_128())


def _hexdigest(path: Path, digest: Any) -> str:
    """A file's content in an empty digest."""
    with path.open("rb", buffering=0) as file:
        while part := file.read(16 * CHUNK):
            digest.update(part)
    return str(digest.hexdigest())


def lock(file: IO[Any]) -> bool:
    """Hold an open file until it is closed or the process ends; False where another process holds
    it.

    True as well on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk and not only on their way there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
    put_in_place(beside, path)


def put_in_place(beside: Path, path: Path) -> None:
    """Give a file that is whole its name, once it is on the disk and not only on its way there."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
