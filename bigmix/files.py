"""Writes files that are complete or absent, locks them, and computes their checksums."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import xxhash

CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The SHA-256 checksum of a file's content, in hexadecimal."""
    return _hexdigest(path, hashlib.sha256())


def checksum_of(path: Path) -> str:
    """The XXH3 checksum of a file's content, 128 bits in hexadecimal.

    It protects against accidents, not against attackers, and is computed at the speed of memory.
    """
    return _hexdigest(path, xxhash.xxh3_128())


def _hexdigest(path: Path, digest: Any) -> str:
    """Feed a file's content to an empty digest."""
    with path.open("rb", buffering=0) as file:
        while part := file.read(16 * CHUNK):
            digest.update(part)
    return str(digest.hexdigest())


def try_lock(file: IO[Any] | int) -> bool:
    """Lock an open file, or a file descriptor, until it is closed or the process ends.

    Returns False at once where another process holds the lock. Raises OSError on a file system
    without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_if_supported(file: IO[Any]) -> bool:
    """`try_lock`, but True on a file system without locks, where nothing can be held."""
    try:
        return try_lock(file)
    except OSError:
        return True


def sync_folder(folder: Path) -> None:
    """Write the names in a folder through to the disk, so that a power cut cannot undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name in the same folder; at the end it replaces `path`.

    Yields the temporary path. A reader sees the old or the new content and never a part, also after
    a power cut: the content is on the disk before the rename. Where the block fails, the temporary
    file is deleted and `path` stays as it was.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def temporary_path(path: Path) -> Path:
    """The name under which a file is written until it is complete."""
    return path.with_name(path.name + ".tmp")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a complete file to its final name, once its content is on the disk.

    For a writer that cannot be a `with` block; the others use `atomic_write`.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 with `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
