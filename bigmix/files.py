"""Paths go in; a file that was written in one step, or the checksum of one, comes out."""

import hashlib
import os
from pathlib import Path

CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """The checksum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
