"""Reads a file whose transfer may break off: each byte is given once, however often it does.

Every protocol is read by this one loop: after a fault the file is opened again at the byte that was
reached.
"""

import logging
import os
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from bigmix.data.shards.location import shown
from bigmix.errors import BadInput, BigmixError

ASKED_WAIT_S = 300.0  # the longest wait that a server may ask for

_REASON_CHARS = 400  # Google's library repeats one cause three times
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often reading is tried again, and how long it may wait.

    `tries` are tries in a row without one new byte; a read that stalls for `timeout_s` is one of
    them.
    """

    tries: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    timeout_s: float = 30.0

    def wait_s(self, failures: int, key: str) -> float:
        """Seconds to wait after this many failures in a row: doubling, and of that 50 to 100 % so
        that ranks spread out.
        """
        full = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(failures - 1, 60))
        place = f"{key} {socket.gethostname()} {os.getpid()} {failures}"
        return full * (0.5 + zlib.crc32(place.encode()) / 2**33)


class Stopped(BigmixError):
    """A transfer was stopped by the code that started it."""


class Changed(BigmixError):
    """A file changed while it was read, or is not the one that the manifest lists."""


class Transient(Exception):
    """A fault that may be gone at the next try; `wait_s` is the wait that the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Watch:
    """What has been transferred so far, and a way to stop it from another thread."""

    def __init__(self) -> None:
        self.bytes = 0
        self.retries = 0
        self._stop = threading.Event()

    def stop(self) -> None:
        """End all transfers of this watch: they raise Stopped at their next part or wait."""
        self._stop.set()

    def pause(self, seconds: float) -> None:
        """Sleep; raises Stopped as soon as `stop` is called."""
        if self._stop.wait(seconds):
            raise Stopped("the transfer was stopped")


class Body(Protocol):
    """The bytes of one response, in order; an empty part is its end."""

    def read1(self, most: int, /) -> bytes:
        """The next bytes, `most` of them or fewer."""

    def close(self) -> None:
        """Close the connection or file behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What to open: bytes [start, stop) of a file, or up to its end where `stop` is None.

    `tag` marks the content that is known so far.
    """

    start: int
    stop: int | None
    tag: str | None
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A response that begins at the requested byte.

    `size` is that of the whole file. Where it is None, `has_known_end` says whether the protocol
    distinguishes a whole response from one that broke off. `tag` changes with the content.
    """

    body: Body
    size: int | None
    tag: str | None = None
    has_known_end: bool = True


Opener = Callable[[str, Ask], Opened]
PART_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteSpan:
    """Bytes [start, stop) of a file, or up to its end where `stop` is None.

    `size` is that of the whole file, where it is known beforehand.
    """

    start: int = 0
    stop: int | None = None
    size: int | None = None


def parts_of(
    url: str, span: ByteSpan, opener: Opener, *, retry: Retry, watch: Watch
) -> Iterator[bytes]:
    """The bytes of a span in order, each once.

    Raises BadInput for a file that is missing or may not be read, Changed for one of another size
    or content than before, and BigmixError after `retry.tries` tries in a row without a new byte.
    """
    reading = _Reading(url, span)
    failures = 0
    while True:
        watch.pause(0)
        try:
            for part in reading.go_on(opener, retry.timeout_s):
                failures = 0
                watch.pause(0)
                watch.bytes += len(part)
                yield part
            return
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise missing(url, _reason(error)) from error
        except PermissionError as error:
            raise refused(url, _reason(error)) from error
        except (Transient, OSError) as error:
            failures += 1
            if failures >= retry.tries:
                raise BigmixError(
                    f"{shown(url)} could not be read: {failures} tries in a row failed at byte"
                    f" {reading.at}, the last with: {_reason(error)}; check that this machine"
                    " reaches it, then run the command again"
                ) from error
            _wait(url, reading.at, failures, error, retry=retry, watch=watch)


def _wait(
    url: str, at: int, failures: int, error: Exception, *, retry: Retry, watch: Watch
) -> None:
    asked = error.wait_s if isinstance(error, Transient) else 0.0
    seconds = max(retry.wait_s(failures, url), min(asked, ASKED_WAIT_S))
    watch.retries += 1
    _log.warning(
        "%s: %s at byte %d; failure %d of %d in a row, next try in %.1f s",
        shown(url),
        _reason(error),
        at,
        failures,
        retry.tries,
        seconds,
    )
    watch.pause(seconds)


def _reason(error: Exception) -> str:
    return str(error).strip()[:_REASON_CHARS] or type(error).__name__


class _Reading:
    """How far a file has been read, and what is known of it."""

    def __init__(self, url: str, span: ByteSpan) -> None:
        self.at = span.start
        self._url = url
        self._stop = span.stop
        self._size = span.size
        self._tag: str | None = None

    def go_on(self, opener: Opener, timeout_s: float) -> Iterator[bytes]:
        if self._end is not None and self.at >= self._end:
            return
        ask = Ask(start=self.at, stop=self._stop, tag=self._tag, timeout_s=timeout_s)
        opened = opener(self._url, ask)
        try:
            self._accept(opened)
            while self._end is None or self.at < self._end:
                most = PART_BYTES if self._end is None else min(PART_BYTES, self._end - self.at)
                part = opened.body.read1(most)
                if not part:
                    self._check_end(opened)
                    return
                self.at += len(part)
                yield part
            if opened.size is None and self._stop is None and opened.body.read1(1):
                raise Changed(_changed(self._url, f"it has more than {self._end} bytes"))
        finally:
            opened.body.close()

    @property
    def _end(self) -> int | None:
        ends = [end for end in (self._stop, self._size) if end is not None]
        return min(ends, default=None)

    def _accept(self, opened: Opened) -> None:
        if opened.size is not None:
            if self._size is not None and self._size != opened.size:
                raise Changed(
                    _changed(self._url, f"it has {opened.size} bytes, expected were {self._size}")
                )
            self._size = opened.size
        if opened.tag is not None:
            if self._tag is not None and self._tag != opened.tag:
                raise Changed(_changed(self._url, f"its tag went from {self._tag} to {opened.tag}"))
            self._tag = opened.tag

    def _check_end(self, opened: Opened) -> None:
        if self._end is not None:
            raise Transient(f"the response ended {self._end - self.at} bytes early")
        if not opened.has_known_end:
            raise BigmixError(
                f"{shown(self._url)} comes without its length, so that a part cannot be"
                " distinguished from the whole; serve it with a Content-Length"
            )


def _changed(url: str, what: str) -> str:
    return (
        f"{shown(url)} changed while it was read, or is not the listed file: {what}; prepare the"
        " source again"
    )


def missing(url: str, reason: str) -> BadInput:
    """The error for a file that is not there."""
    return BadInput(f"there is no file {shown(url)} ({reason}); check the path of its source")


def refused(url: str, reason: str) -> BadInput:
    """The error for a file that may not be read."""
    return BadInput(
        f"{shown(url)} may not be read ({reason}); give this machine the right to read it, or a"
        " fresh signed URL"
    )
