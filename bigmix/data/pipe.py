"""A command and an offset go in, what the command prints from that offset comes out; its failure is a fault."""

import os
import select
import signal
import subprocess
import tempfile

from bigmix.data.shards.location import PIPE
from bigmix.data.shards.retry import Ask, Opened, Transient
from bigmix.errors import BadInput

_PART_BYTES = 1 << 18
_LINES_TOLD = 5
_NO_COMMAND = (126, 127)  # bash: not executable, not found


def open_pipe(url: str, ask: Ask) -> Opened:
    """Start the command of `pipe:COMMAND` and pass over its first `ask.start` bytes; it is run by bash with pipefail."""
    body = _Output(url, ask.timeout_s)
    try:
        left = ask.start
        while left:
            part = body.read1(left)
            if not part:
                raise Transient(f"the command ended {left} bytes before the place that was reached")
            left -= len(part)
    except BaseException:
        body.close()
        raise
    return Opened(body=body, size=None)


class _Output:
    """The output of a running command; its end counts only once the command has ended well."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        # A session of its own, so that close ends all commands of a pipeline.
        self._process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", url.removeprefix(PIPE)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._out = self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN | select.POLLHUP)

    def read1(self, most: int, /) -> bytes:
        if not self._poll.poll(self._timeout_s * 1000):
            raise Transient(f"the command printed nothing for {self._timeout_s:g} s")
        part = os.read(self._out.fileno(), min(most, _PART_BYTES))
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
        reason = f"exit code {code}: " + (" / ".join(lines[-_LINES_TOLD:]) or "no message")
        if code in _NO_COMMAND:
            raise BadInput(f"{self._url} cannot be run ({reason}); correct the command")
        raise Transient(f"the command failed with {reason}")

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._out.close()
        self._errors.close()
