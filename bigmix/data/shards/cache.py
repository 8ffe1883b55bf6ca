"""A cache of downloaded shards on a local disk, bounded in bytes and shared by all processes of a
machine.

Files of the folder, where F is the sha256 of the content: `F.shard` is whole and verified,
`F-SIZE.part` is being downloaded and takes SIZE bytes of the bound, `F.failed` says why the last
download failed. Every claim is a flock on an open file, which the kernel drops when its process
ends: a shared lock on a shard while it is in use, an exclusive lock on a part while it is written.
Locks are taken, and files made and deleted, only under the lock of the file `lock`.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bigmix.data.shards.location import shown
from bigmix.data.shards.retry import Changed, Retry, Stopped, Watch
from bigmix.data.shards.storage import copy_to
from bigmix.errors import BadInput, BigmixError
from bigmix.files import sha256_of, try_lock

_POLL_S = 0.05
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}-(\d+)\.part")


class CacheFault(BigmixError):
    """The cache itself is at fault, and not the requested file."""


class CacheFull(CacheFault):
    """A file does not fit next to those that are in use."""


class Lease:
    """The right to read a file of the cache: it is not evicted before `close`, or before the end of
    its process.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Return the file to the cache; a second call does nothing."""
        if self._descriptor is not None:
            os.utime(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A requested file."""

    url: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """A part that only this thread may write, until it closes the descriptor."""

    path: Path
    descriptor: int


class ShardCache:
    """Files of at most `max_bytes` together on a local disk, shared by all processes that name the
    same folder.
    """

    def __init__(self, folder: Path, max_bytes: int, retry: Retry | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._retry = retry or Retry()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._listing():
                pass
        except OSError as error:
            raise BadInput(
                f"cache.folder {folder} cannot be written ({error.strerror}); name a folder on a"
                " local disk"
            ) from error

    def get(self, url: str, *, size: int, sha256: str, watch: Watch | None = None) -> Lease:
        """The whole, verified file, downloaded unless another process of this machine has done so.

        A thread that waits for the download of another fails with it: a second download would take
        as long again.

        Raises Changed where the content is not that of `sha256`, CacheFull where it does not fit
        next to the files in use, CacheFault where it cannot be written, and what `storage` raises
        for a file that cannot be read.
        """
        if not _SHA256.fullmatch(sha256):
            raise BadInput(
                f"{shown(url)} is listed with sha256 {sha256!r}, allowed are 64 hexadecimal digits;"
                " prepare the source again"
            )
        file = _File(url=url, size=size, sha256=sha256)
        watch = watch or Watch()
        asked_ns = time.time_ns()
        while (claim := self._claim(file)) is None:
            watch.pause(_POLL_S)
        if isinstance(claim, Lease):
            return claim
        try:
            with self._failing_together(file, asked_ns):
                return self._fill(file, claim, watch)
        except BaseException:
            os.close(claim.descriptor)
            raise

    @contextmanager
    def _failing_together(self, file: _File, asked_ns: int) -> Iterator[None]:
        """Write down a failure for the threads that wait for the same file; raise one that was
        written down since `asked_ns`.
        """
        failure = self._folder / f"{file.sha256}.failed"
        reason = _text_since(failure, asked_ns)
        if reason is not None:
            raise BigmixError(reason)
        failure.unlink(missing_ok=True)
        try:
            yield
        except (Stopped, CacheFault):
            raise
        except BigmixError as error:
            with suppress(OSError):
                failure.write_text(str(error))
            raise

    def discard(self, lease: Lease) -> None:
        """Delete a file whose content was found damaged, so that the next request downloads it
        again.
        """
        with self._listing():
            lease.path.unlink(missing_ok=True)

    def _claim(self, file: _File) -> Lease | _Part | None:
        """The file where it is in the cache, its part where this thread is to write it, None where
        another one is writing it.
        """
        path = self._folder / f"{file.sha256}.shard"
        part = self._folder / f"{file.sha256}-{file.size}.part"
        with self._listing():
            if path.exists():
                lease = self._lease(path, file.size)
                if lease is not None:
                    return lease
            if not part.exists():
                self._make_room(file)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            if try_lock(descriptor):
                os.utime(descriptor)
                return _Part(path=part, descriptor=descriptor)
            os.close(descriptor)
            return None

    def _lease(self, path: Path, size: int) -> Lease | None:
        if path.stat().st_size != size:
            path.unlink()  # truncated from outside
            return None
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(descriptor)
        return Lease(path, descriptor)

    @contextmanager
    def _listing(self) -> Iterator[None]:
        """The lock of the folder; it is held for a moment only, never during a download."""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _make_room(self, file: _File) -> None:
        """Evict the least recently used files until the file fits; a part that is not being written
        is evicted like a shard.

        Nothing is evicted where all of it would not be enough.
        """
        entries = sorted(self._entries())
        over = sum(size for _, _, size in entries) + file.size - self._max_bytes
        victims: list[Path] = []
        in_use = 0
        for _, path, size in entries:
            if over > 0 and _is_unlocked(path):
                victims.append(path)
                over -= size
            elif over > 0:
                in_use += size
        if over > 0:
            raise CacheFull(
                f"the cache {self._folder} has no room for {shown(file.url)}: {in_use:,} bytes are"
                f" in use and the file has {file.size:,}, but cache.size is {self._max_bytes:,};"
                f" raise cache.size to {in_use + file.size:,} or more"
            )
        for path in victims:
            path.unlink()

    def _entries(self) -> Iterator[tuple[int, Path, int]]:
        """Time of last use, path, and bytes taken of the bound, for every shard and part."""
        for path in self._folder.iterdir():
            part = _PART.fullmatch(path.name)
            if part is not None or path.suffix == ".shard":
                status = path.stat()
                yield status.st_mtime_ns, path, int(part.group(1)) if part else status.st_size

    def _fill(self, file: _File, part: _Part, watch: Watch) -> Lease:
        resumed = part.path.stat().st_size > 0
        while True:
            try:
                self._download(file, part, watch)
                return self._finish(file, part)
            except Changed:
                if not resumed:
                    self._drop(part)
                    raise
                # What an earlier process left may be of another version, or damaged by a power cut:
                # once more from the first byte.
                os.truncate(part.path, 0)
                resumed = False

    def _download(self, file: _File, part: _Part, watch: Watch) -> None:
        if part.path.stat().st_size > file.size:
            raise Changed(f"{part.path} is longer than {file.size} bytes; delete it")
        try:
            copy_to(file.url, part.path, size=file.size, retry=self._retry, watch=watch)
            os.fsync(part.descriptor)
        except OSError as error:
            self._drop(part)
            raise CacheFault(
                f"{shown(file.url)}, {file.size:,} bytes, could not be written to the cache"
                f" {self._folder} ({error.strerror}); free its disk, lower cache.size, or set"
                " cache.folder to a larger disk"
            ) from error
        found = sha256_of(part.path)
        if found != file.sha256:
            raise Changed(
                f"{shown(file.url)} has sha256 {found}, its manifest says {file.sha256}: its"
                " content has changed or is damaged; restore the file or prepare the source again"
            )

    def _drop(self, part: _Part) -> None:
        with self._listing():
            part.path.unlink()

    def _finish(self, file: _File, part: _Part) -> Lease:
        path = self._folder / f"{file.sha256}.shard"
        # Under the lock of the folder: the file is unlocked for a moment between the exclusive lock
        # and the shared one.
        with self._listing():
            os.replace(part.path, path)
            fcntl.flock(part.descriptor, fcntl.LOCK_SH)
        return Lease(path, part.descriptor)


def _text_since(path: Path, time_ns: int) -> str | None:
    """The text of a file that was written at that time or later; None where there is none."""
    try:
        return path.read_text() if path.stat().st_mtime_ns >= time_ns else None
    except FileNotFoundError:
        return None


def _is_unlocked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return try_lock(descriptor)
    finally:
        os.close(descriptor)
