"""Prepared sources behind a server that counts what is fetched."""

import fcntl
import logging
from collections import Counter

from bigmix.data.shards import prefetch


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def serve(server, folder):
    server.files |= {f"/{p.relative_to(folder)}": p.read_bytes() for p in files_of(folder)}


def downloads(server):
    """How often each shard was requested."""
    return Counter(path for path, _, _ in server.requests if path.endswith(".tar"))


def log_unforeseen(caplog):
    """From now on the log names each file that is fetched and was not among the next ones."""
    caplog.set_level(logging.DEBUG, logger=prefetch.__name__)


def unforeseen(caplog):
    """How many files were fetched and were not among the next ones, by the log."""
    assert logging.getLogger(prefetch.__name__).isEnabledFor(logging.DEBUG)
    return sum(record.name == prefetch.__name__ for record in caplog.records)


def in_use(folder):
    """The files of the cache that are in use."""
    found = []
    for path in (folder / "cache").glob("*.shard"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path)
    return found
