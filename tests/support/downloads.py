"""Prepared sources behind a web server, and what was fetched from it."""

from collections import Counter

from bigmix.files import try_lock


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def serve(server, folder):
    server.files |= {f"/{p.relative_to(folder)}": p.read_bytes() for p in files_of(folder)}


def downloads(server):
    """How often each shard was requested."""
    return Counter(path for path, _, _ in server.requests if path.endswith(".tar"))


def in_use(folder):
    """The files of the cache that a process has locked."""
    found = []
    for path in (folder / "cache").glob("*.shard"):
        with path.open("rb") as file:
            if not try_lock(file):
                found.append(path)
    return found
