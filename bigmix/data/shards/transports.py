"""Opens a web address, or the output of a command, at an offset; a fault says what to do."""

import base64
import http.client
import os
import select
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from bigmix.data.shards.location import PIPE, shown
from bigmix.data.shards.retry import Ask, Body, Changed, Opened, Transient, missing, refused
from bigmix.errors import BadInput, BigmixError

_PART_BYTES = 1 << 18  # one read of a socket gives no more, and each allocates a buffer
_GONE = (404, 410)
_REFUSED = (401, 403, 407)
_BUSY = (408, 425, 429)


def open_http(url: str, ask: Ask) -> Opened:
    """Open a web address at `ask.start`, also on servers that know no ranges."""
    try:
        answer = urllib.request.urlopen(_request(url, ask), timeout=ask.timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _fault(url, error, ask) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise refused(url, str(error.reason)) from error
        raise Transient(str(error.reason)) from error
    except http.client.InvalidURL as error:
        raise BadInput(f"{shown(url)} is not a web address ({error}); correct the path") from error
    except http.client.HTTPException as error:
        raise Transient(f"{type(error).__name__} {error}") from error
    try:
        return _opened(url, answer, ask)
    except BaseException:
        answer.close()
        raise


def _request(url: str, ask: Ask) -> urllib.request.Request:
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host, fragment="").geturl())
    if at:
        # Unredirected: a password is for this host, not for the one that it may redirect to.
        coded = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {coded}")
    if ask.start or ask.stop is not None:
        last = "" if ask.stop is None else ask.stop - 1
        request.add_header("Range", f"bytes={ask.start}-{last}")
        if ask.tag is not None:
            request.add_header("If-Range", ask.tag)
    return request


def _opened(url: str, answer: Any, ask: Ask) -> Opened:
    body = _Body(answer)
    tag = answer.headers.get("ETag")
    if tag is not None and tag.startswith("W/"):
        tag = None  # a weak tag marks a meaning, not bytes
    if answer.status == 206:
        return Opened(body=body, size=_size_of_range(url, answer.headers, ask), tag=tag)
    if ask.tag is not None and tag is not None and tag != ask.tag:
        raise Changed(
            f"{shown(url)} changed while it was read: its ETag went from {ask.tag} to {tag}; run"
            " the command again"
        )
    length = answer.headers.get("Content-Length")
    chunked = "chunked" in (answer.headers.get("Transfer-Encoding") or "").lower()
    _skip(body, ask.start)
    size = int(length) if length is not None and not chunked else None
    return Opened(body=body, size=size, tag=tag, has_known_end=chunked)


def _size_of_range(url: str, headers: Message, ask: Ask) -> int | None:
    """The size of the whole file from `Content-Range: bytes 5-9/100`, which must begin at the
    requested byte.
    """
    given = str(headers.get("Content-Range", ""))
    unit, _, rest = given.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit.lower() != "bytes" or first.strip() != str(ask.start):
        raise BigmixError(
            f"{shown(url)} answers a request for byte {ask.start} with Content-Range {given!r}; its"
            " server is broken, serve the files with another"
        )
    return int(total) if total.strip().isdigit() else None


def _skip(body: Body, num_bytes: int) -> None:
    """Skip what was read before, on a server that ignores Range and begins at the first byte."""
    while num_bytes:
        part = body.read1(num_bytes)
        if not part:
            raise Transient(f"the response ended {num_bytes} bytes before the one that was reached")
        num_bytes -= len(part)


class _Body:
    """The bytes of a response as they arrive, so that a break loses none that came before it."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def read1(self, most: int, /) -> bytes:
        try:
            return bytes(self._answer.read1(min(most, _PART_BYTES)))
        except http.client.HTTPException as error:
            raise Transient(f"the response broke off ({type(error).__name__})") from error
        except TimeoutError as error:
            raise Transient("the server sent nothing for too long") from error

    def close(self) -> None:
        self._answer.close()


def _fault(url: str, error: urllib.error.HTTPError, ask: Ask) -> Exception:
    reason = f"HTTP status {error.code} {error.reason}"
    if error.code in _GONE:
        return missing(url, reason)
    if error.code in _REFUSED:
        return refused(url, reason)
    if error.code == 416:
        return Changed(f"{shown(url)} has no byte {ask.start} ({reason}); prepare the source again")
    if error.code in _BUSY or error.code >= 500:
        return Transient(reason, _asked_wait_s(error.headers.get("Retry-After")))
    return BigmixError(f"{shown(url)} cannot be read: {reason}; check the path of its source")


def _asked_wait_s(text: str | None) -> float:
    """The seconds of a Retry-After, which is a number or a date; 0 where it is neither."""
    if text is None:
        return 0.0
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


_PIPE_PART_BYTES = 1 << 18
_LINES_SHOWN = 5
_NO_COMMAND = (126, 127)  # bash: not executable, not found


def open_pipe(url: str, ask: Ask) -> Opened:
    """Start the command of `pipe:COMMAND`, in bash with pipefail, and skip its first `ask.start`
    bytes.
    """
    body = _CommandOutput(url, ask.timeout_s)
    try:
        left = ask.start
        while left:
            part = body.read1(left)
            if not part:
                raise Transient(f"the command ended {left} bytes before the one that was reached")
            left -= len(part)
    except BaseException:
        body.close()
        raise
    return Opened(body=body, size=None)


class _CommandOutput:
    """The output of a running command; it is whole only once the command has ended with code 0."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        # In its own session, so that close ends all commands of a pipeline.
        self._process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", url.removeprefix(PIPE)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN | select.POLLHUP)

    def read1(self, most: int, /) -> bytes:
        if not self._poll.poll(self._timeout_s * 1000):
            raise Transient(f"the command printed nothing for {self._timeout_s:g} s")
        part = os.read(self._out.fileno(), min(most, _PIPE_PART_BYTES))
        if not part:
            self._check_end()
        return part

    def _check_end(self) -> None:
        try:
            code = self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Transient(
                f"the command closed its output but did not end in {self._timeout_s:g} s"
            ) from error
        if code == 0:
            return
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        reason = f"exit code {code}: " + (" / ".join(lines[-_LINES_SHOWN:]) or "no message")
        if code in _NO_COMMAND:
            raise BadInput(f"{self._url} cannot be run ({reason}); correct the command")
        raise Transient(f"the command failed with {reason}")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()
        self._errors.close()
