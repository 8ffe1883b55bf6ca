"""Prepared sources behind a server that counts what is fetched."""

import fcntl
from collections import Counter


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def serve(server, folder):
    server.files |= {f"/{p.relative_to(folder)}": p.read_bytes() for p in files_of(folder)}


def downloads(server):
    """How often each shard was asked for."""
    return Counter(path for path, _, _ in server.requests if path.endswith(".tar"))


def in_use(folder):
    """The files of the cache that somebody holds."""
    found = []
    for path in (folder / "cache").glob("*.shard"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path)
    return found
