"""Signals and the clock go in, one flag comes out: the run is asked to save and stop at the next
step boundary.

Nothing heavy is imported here: the guard stands before anything else is loaded. A thread reads the
signals as they come, since Python's own handlers wait until the main thread is back from a
collective or a read.

Work of another thread goes in; out comes whether it is done, or its result is not waited for any
longer.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bigmix.cluster.processes import command_of, parent_of
from bigmix.errors import REQUEUE

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Of the kernel: were it one that asks, it could pass for the second request.
_ORPHANED = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1
# Ctrl-C under a launcher: SIGINT of the terminal, then SIGTERM of the launcher.
_ONE_REQUEST_S = 2.0
_PARENT_EVERY_S = 1.0
NOTHING_LOST = "nothing was trained since the last checkpoint; the same command goes on from there"


class StopSignal:
    """Whether a signal, the end of the launcher or the clock asks this process to stop.

    Made first of all, in the main thread. Until `defer_signals` a signal ends the process at once
    with 75, since nothing new is in memory. A second signal, later than the doubles of the first,
    ends it at once; checkpoints stay whole.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        nothing_lost: str = NOTHING_LOST,
        owns_process: bool = True,
    ) -> None:
        """`nothing_lost` says what an end at once leaves behind, in its last words.

        `owns_process`: whether the process is there for this run alone. Where it is someone else's,
        such as a notebook's, a stop request never ends the process and nothing is listened to: what
        `stop_requests_here` receives reaches it by `ask`.
        """
        self.nothing_lost = nothing_lost
        self.owns_process = owns_process
        environment = os.environ if environment is None else environment
        self._reason: str | None = None
        self._first_signal_at: float | None = None
        self._ends_at: float | None = None
        self._began_at = time.monotonic()
        self._exits_at_once = owns_process
        self._rank = environment.get("RANK") or environment.get("SLURM_PROCID") or "0"
        if not owns_process:
            return
        self._launcher = _Launcher() if {"RANK", "SLURM_PROCID"} & set(environment) else None
        self._read_end = _signals_as_bytes()
        threading.Thread(target=self._listen, name="guard", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Who asked to stop, the clock left out; None as long as nobody did."""
        return self._reason

    def is_set(self, needed_s: float = 0.0) -> bool:
        """Whether to stop: somebody asked, or what takes `needed_s` would end after the time that
        is left.
        """
        late = self._ends_at is not None and time.monotonic() + needed_s >= self._ends_at
        return late or self._reason is not None

    def ask(self, reason: str) -> None:
        """Ask this process to stop at the next step boundary."""
        self._reason = self._reason or reason

    def defer_signals(self) -> None:
        """From now on a request is a flag for somebody else to act on."""
        self._exits_at_once = False

    def set_end(self, max_minutes: float | None, job_ends_at: float | None) -> None:
        """Stop by itself so many minutes after this process began, and before a time in seconds
        since 1970.
        """
        ends = [] if max_minutes is None else [self._began_at + 60 * max_minutes]
        if job_ends_at is not None:
            ends.append(time.monotonic() + job_ends_at - time.time())
        self._ends_at = min(ends, default=None)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._read_end], [], [], _PARENT_EVERY_S)
            for number in os.read(self._read_end, 64) if ready else b"":
                if number in ASKING:
                    self._receive(number)
            if self._reason is None and self._launcher is not None and self._launcher.has_gone():
                self._request("the end of its launcher")

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first_signal_at is None:
            self._first_signal_at = now
            self._request(signal.Signals(number).name)
        elif now - self._first_signal_at > _ONE_REQUEST_S:
            os._exit(128 + number)

    def _request(self, reason: str) -> None:
        self.ask(reason)
        if self._exits_at_once:
            end_process(
                f"stopped: asked by {reason} on rank {self._rank} during start-up:"
                f" {self.nothing_lost}",
                REQUEUE,
            )


@contextmanager
def stop_requests_here() -> Iterator[StopSignal]:
    """The stop signal of a run inside of a process that is not the run's own.

    In the main thread the first SIGINT, SIGTERM or SIGUSR1 requests a stop and a later one raises
    KeyboardInterrupt. In another thread, where Python sets no handlers, signals go where they went
    before and only the clock stops the run.
    """
    stop_signal = StopSignal(owns_process=False)

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        if stop_signal.reason is not None:
            raise KeyboardInterrupt
        stop_signal.ask(signal.Signals(number).name)

    with handlers_put_back():
        if is_main_thread():
            for number in ASKING:
                signal.signal(number, receive)
        yield stop_signal


@contextmanager
def handlers_put_back() -> Iterator[None]:
    """What handles the signals that request a stop is afterwards as it was before."""
    before = {number: signal.getsignal(number) for number in ASKING}
    try:
        yield
    finally:
        if is_main_thread():
            for number, handler in before.items():
                # None is a handler that C code has set, which Python cannot put back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def is_main_thread() -> bool:
    """Whether this thread may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """How long work reports what begins (to the watchdog), and learns that a stop was requested."""

    begin: Callable[[str], None]
    stop_requested: Callable[[], bool]


UNWATCHED = Activity(begin=lambda _: None, stop_requested=lambda: False)


def end_process(last_words: str | None, code: int) -> None:
    """Say a last line and end the process from any thread, whatever the others wait for."""
    # The main thread may hold the locks of the standard streams, so they are flushed only if they
    # let us.
    if last_words is not None:
        cursor = b"\n\x1b[?25h" if os.isatty(2) else b""  # a live bar hides it
        with contextlib.suppress(OSError):
            os.write(2, cursor + last_words.encode(errors="replace") + b"\n")
    os._exit(code)


def _signals_as_bytes() -> int:
    """Where the number of each signal that asks can be read as a byte."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # First, so that no signal falls between the two.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (*ASKING, _ORPHANED):
        signal.signal(number, _ignore)
    return read_end


def _ignore(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has the number; SIG_IGN would keep it from there."""
    del number, frame


class _Launcher:
    """The process that started this rank, and where it is deepspeed's second process the first one
    too.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        is_second = "deepspeed.launcher.launch" in command_of(self._parent)
        self._runner = parent_of(self._parent) if is_second else None
        _die_with_parent()

    def has_gone(self) -> bool:
        """Whether one of them has ended; without its first process deepspeed's second one would go
        on for ever.
        """
        if os.getppid() != self._parent:
            return True
        return self._runner is not None and parent_of(self._parent) != self._runner


def _die_with_parent() -> None:
    """Ask Linux for a signal when the launcher dies: killed with -9 it would leave its ranks
    running.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _ORPHANED)


_LOOK_UP_S = 0.2


def is_done(work: "Future[Any]", gives_up: Callable[[], bool]) -> bool:
    """Wait until work is done, or until `gives_up` says to stop waiting: then False, and the work
    goes on.
    """
    while not wait([work], timeout=_LOOK_UP_S).done:
        if gives_up():
            return False
    return True
