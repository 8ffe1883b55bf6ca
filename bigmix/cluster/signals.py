"""Stop requests: by a signal, by the end of the launcher, or by the clock.

Nothing heavy is imported here, since the handlers are installed before anything else is loaded. A
thread reads the signals as they arrive: Python runs its own handlers only once the main thread is
back from a collective or a read.
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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Sent by the kernel when the launcher dies; a stop signal could pass for a second request.
_ORPHANED = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1
# Ctrl-C under a launcher is one request: SIGINT from the terminal, then SIGTERM from the launcher.
_ONE_REQUEST_S = 2.0
_LAUNCHER_CHECK_S = 1.0
NOTHING_LOST = "nothing was trained since the last checkpoint; run the same command to resume"


class StopSignal:
    """Whether a stop of this process is requested, by a signal, its launcher's end or the clock.

    Made before anything else, in the main thread. Until `defer_signals` is called a signal ends the
    process at once with 75, since there is nothing in memory to save; from then on it sets a flag.
    A second signal more than two seconds after the first ends the process at once with 128 plus its
    number; checkpoints stay complete.
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
        `stop_requests_here` receives reaches it by `request_stop`.
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
        threading.Thread(target=self._listen, name="stop-signal", daemon=True).start()

    @property
    def reason(self) -> str | None:
        """What requested the stop, other than the clock; None as long as nothing did."""
        return self._reason

    def is_set(self, needed_s: float = 0.0) -> bool:
        """Whether to stop: on a request, or as work of `needed_s` seconds would end too late."""
        late = self._ends_at is not None and time.monotonic() + needed_s >= self._ends_at
        return late or self._reason is not None

    def request_stop(self, reason: str) -> None:
        """Set the flag: the run is to stop at the next step boundary."""
        self._reason = self._reason or reason

    def defer_signals(self) -> None:
        """From now on a request sets the flag, and the caller sees to it that the run stops."""
        self._exits_at_once = False

    def set_end(self, max_minutes: float | None, job_ends_at: float | None) -> None:
        """Stop `max_minutes` after this process began, and before `job_ends_at`, in Unix seconds.

        None is no limit.
        """
        ends = [] if max_minutes is None else [self._began_at + 60 * max_minutes]
        if job_ends_at is not None:
            ends.append(time.monotonic() + job_ends_at - time.time())
        self._ends_at = min(ends, default=None)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._read_end], [], [], _LAUNCHER_CHECK_S)
            for number in os.read(self._read_end, 64) if ready else b"":
                if number in STOP_SIGNALS:
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
        self.request_stop(reason)
        if self._exits_at_once:
            end_process(
                f"stopped: requested by {reason} on rank {self._rank} during start-up:"
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
        stop_signal.request_stop(signal.Signals(number).name)

    with handlers_put_back():
        if is_main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, receive)
        yield stop_signal


@contextmanager
def handlers_put_back() -> Iterator[None]:
    """What handles the signals that request a stop is afterwards as it was before."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
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
    """How long-running work reports what it begins, and learns that a stop is requested.

    `begin` is given the name of each activity, for the watchdog.
    """

    begin: Callable[[str], None]
    stop_requested: Callable[[], bool]


UNWATCHED = Activity(begin=lambda _: None, stop_requested=lambda: False)


def end_process(message: str | None, code: int) -> None:
    """Print a last message and end the process, from any thread and whatever the others wait for.

    It is written past the standard streams, whose locks the main thread may hold; what is still in
    their buffers is lost.
    """
    if message is not None:
        cursor = b"\n\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides it
        with contextlib.suppress(OSError):
            os.write(2, cursor + message.encode(errors="replace") + b"\n")
    os._exit(code)


def _signals_as_bytes() -> int:
    """A file descriptor from which the number of each signal can be read as one byte."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # Before the handlers, so that no signal is missed between the two.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (*STOP_SIGNALS, _ORPHANED):
        signal.signal(number, _ignore)
    return read_end


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wakeup descriptor has the number, which SIG_IGN would keep from it."""
    del number, frame


class _Launcher:
    """The process that started this rank; of deepspeed's launcher, which has two, both."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        is_second = "deepspeed.launcher.launch" in command_of(self._parent)
        self._runner = parent_of(self._parent) if is_second else None
        _die_with_parent()

    def has_gone(self) -> bool:
        """Whether one of them has ended: deepspeed's second process runs on without its first."""
        if os.getppid() != self._parent:
            return True
        return self._runner is not None and parent_of(self._parent) != self._runner


def _die_with_parent() -> None:
    """Have Linux send a signal when the launcher dies, which may not end its ranks itself.

    One that is killed with -9 cannot.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _ORPHANED)


_WAIT_S = 0.2


def is_done(work: "Future[Any]", gives_up: Callable[[], bool]) -> bool:
    """Wait until work in another thread is done; False if `gives_up` returns True before it is.

    The work goes on all the same.
    """
    while not wait([work], timeout=_WAIT_S).done:
        if gives_up():
            return False
    return True
