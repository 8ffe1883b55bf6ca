"""Starts the ranks of one machine, and starts them again after a failure.

An end that is no failure is passed on: 0 done, 2 bad input, 75 stopped on request. After a failure
the run is started again as long as the restart before has brought it further.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from bigmix.cluster.signals import STOP_SIGNALS, is_main_thread
from bigmix.errors import BAD_INPUT, DONE, FAILED, REQUEUE

Process = subprocess.Popen[bytes]
_CHECK_S = 0.05
_GRACE_S = 30.0  # after the first rank has ended, for the others to notice and end
_MAX_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSpec:
    """How a run is started, how often at most it is started again, and how far it is.

    `newest_step` is the step of the newest checkpoint, 0 if there is none. Where several runs are
    trained it is any number that grows as long as they make progress.
    """

    start: Callable[[], Sequence[Process]]
    newest_step: Callable[[], int]
    max_restarts: int


class StopRequests:
    """The stop signals that this process has received; none in another thread than the main one,
    where Python sets no handlers.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._num_passed_on = 0
        if is_main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received.append(number)

    def new(self) -> Sequence[int]:
        """The signals since the last call."""
        new = self.received[self._num_passed_on :]
        self._num_passed_on += len(new)
        return new


def supervise(spec: LaunchSpec, requests: StopRequests, report: Callable[[str], None]) -> int:
    """Run to the end, with the restarts that are allowed and bring progress; returns the exit code.

    `report` is given a line for each restart, and one when the run is given up.
    """
    stuck_at: int | None = None
    for restart in range(spec.max_restarts + 1):
        with _started(spec.start()) as ranks:
            ended = _watch(ranks, requests)
        code = outcome(ended, stop_requested=bool(requests.received))
        if code != FAILED or requests.received:
            return code
        failure, step = _first_failure(ended), spec.newest_step()
        if step == stuck_at:
            report(
                f"{failure}, with no checkpoint after that of step {step} since the last restart;"
                " given up"
            )
            return FAILED
        if restart == spec.max_restarts:
            report(f"{failure}; given up after {restart} restarts")
            return FAILED
        stuck_at = step
        wait_s = min(2.0**restart, _MAX_WAIT_S)
        report(
            f"{failure}; restart {restart + 1} of {spec.max_restarts} from step {step} in"
            f" {wait_s:.0f} s"
        )
        if _stop_requested_within(wait_s, requests):
            return REQUEUE
    raise AssertionError("the last round returns")


def outcome(ended: Mapping[int, int], *, stop_requested: bool) -> int:
    """The exit code of a run whose ranks have ended with these codes, by rank.

    As in subprocess, a code below 0 is the signal that has ended a rank.
    """
    codes = set(ended.values())
    if codes == {DONE}:
        return DONE
    if BAD_INPUT in codes:
        return BAD_INPUT
    stopped = {DONE, REQUEUE}
    if stop_requested:
        # A signal ends a rank that has no handler yet, and a second signal any rank.
        stopped |= {-number for number in STOP_SIGNALS} | {128 + number for number in STOP_SIGNALS}
    return REQUEUE if codes <= stopped else FAILED


@contextmanager
def _started(ranks: Sequence[Process]) -> Iterator[Sequence[Process]]:
    """Ranks that were started; at the end of the block those still running are killed."""
    try:
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _watch(ranks: Sequence[Process], requests: StopRequests) -> dict[int, int]:
    """Pass signals on to the ranks until all have ended; their codes in the order of their ends.

    Once the first has ended, the others have `_GRACE_S` seconds before they are killed.
    """
    ended: dict[int, int] = {}
    kill_at: float | None = None
    while len(ended) < len(ranks):
        for number in requests.new():
            for process in ranks:
                process.send_signal(number)  # which sends none to a process that has ended
        new = [rank for rank, p in enumerate(ranks) if rank not in ended and p.poll() is not None]
        # Of those that one check finds ended, a rank that was killed ended before the ranks that
        # failed because it was gone.
        for rank in sorted(new, key=lambda rank: ranks[rank].returncode >= 0):
            ended[rank] = ranks[rank].returncode
            kill_at = kill_at or time.monotonic() + _GRACE_S
        if kill_at is not None and time.monotonic() > kill_at:
            return ended | _end_by_force(ranks, ended)
        time.sleep(_CHECK_S)
    return ended


def _end_by_force(ranks: Sequence[Process], ended: Mapping[int, int]) -> dict[int, int]:
    """Kill the ranks that are still running; returns their exit codes.

    Where all others were stopped on request, those count as stopped too: waiting for others is no
    failure.
    """
    running = {rank: process for rank, process in enumerate(ranks) if rank not in ended}
    for process in running.values():
        process.kill()
    codes = {rank: process.wait() for rank, process in running.items()}
    return dict.fromkeys(running, REQUEUE) if set(ended.values()) == {REQUEUE} else codes


def _first_failure(ended: Mapping[int, int]) -> str:
    rank, code = next((r, c) for r, c in ended.items() if c not in (DONE, REQUEUE))
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"rank {rank} {how}"


def _stop_requested_within(wait_s: float, requests: StopRequests) -> bool:
    until = time.monotonic() + wait_s
    while time.monotonic() < until and not requests.received:
        time.sleep(_CHECK_S)
    return bool(requests.received)
