"""The ranks of one machine go in; they are started, and where they fail started again, and one exit
code comes out.

Ends that are no failure are passed on: 0 done, 2 bad input, 75 stopped on request. A failure is
tried again as long as a restart has brought the run further than the one before.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from bigmix.cluster.signals import ASKING, is_main_thread
from bigmix.errors import BAD_INPUT, DONE, FAILED, REQUEUE

Process = subprocess.Popen[bytes]
_LOOK_EVERY_S = 0.05
_GRACE_S = 30.0  # after the first rank has ended, for the others to notice and end
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSpec:
    """How a run is started, and the step of its newest checkpoint, 0 as long as there is none.

    Where several runs are trained, another number that grows as long as they come on.
    """

    start: Callable[[], Sequence[Process]]
    newest_step: Callable[[], int]
    restarts: int


class StopRequests:
    """Signals that ask to stop, as they came; none in another thread than the main one, where
    Python sets no handlers.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed_on = 0
        if is_main_thread():
            for number in ASKING:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received.append(number)

    def new(self) -> Sequence[int]:
        """Those since the last call."""
        new = self.received[self._passed_on :]
        self._passed_on += len(new)
        return new


def supervise(course: LaunchSpec, requests: StopRequests, tell: Callable[[str], None]) -> int:
    """Run to the end, through as many restarts as are allowed and of use; `tell` is given one line
    each.
    """
    stuck_at: int | None = None
    for restart in range(course.restarts + 1):
        with _started(course.start()) as ranks:
            ended = _watch(ranks, requests)
        code = outcome(ended, is_asked=bool(requests.received))
        if code != FAILED or requests.received:
            return code
        what, step = _first_failure(ended), course.newest_step()
        if step == stuck_at:
            tell(
                f"{what}, with no checkpoint after that of step {step} since the last restart;"
                " given up"
            )
            return FAILED
        if restart == course.restarts:
            tell(f"{what}; given up after {restart} restarts")
            return FAILED
        stuck_at = step
        wait_s = min(2.0**restart, _LONGEST_WAIT_S)
        tell(
            f"{what}; restart {restart + 1} of {course.restarts} from step {step} in {wait_s:.0f} s"
        )
        if _is_asked_within(wait_s, requests):
            return REQUEUE
    raise AssertionError("the last round returns")


def outcome(ended: Mapping[int, int], *, is_asked: bool) -> int:
    """The exit code of a run whose ranks ended with these codes, below 0 for a signal, as
    subprocess has them.
    """
    codes = set(ended.values())
    if codes == {DONE}:
        return DONE
    if BAD_INPUT in codes:
        return BAD_INPUT
    stopped = {DONE, REQUEUE}
    if is_asked:
        # A rank that has no handler yet, or gets a second signal, ends by it.
        stopped |= {-number for number in ASKING} | {128 + number for number in ASKING}
    return REQUEUE if codes <= stopped else FAILED


@contextmanager
def _started(ranks: Sequence[Process]) -> Iterator[Sequence[Process]]:
    """The ranks, of which none is left behind."""
    try:
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _watch(ranks: Sequence[Process], requests: StopRequests) -> dict[int, int]:
    """Pass signals on until all have ended, those that do not follow the first one by force; their
    codes in that order.
    """
    ended: dict[int, int] = {}
    kill_at: float | None = None
    while len(ended) < len(ranks):
        for number in requests.new():
            for process in ranks:
                process.send_signal(number)  # none to those that have ended
        new = [rank for rank, p in enumerate(ranks) if rank not in ended and p.poll() is not None]
        # Of those seen ended at one look, a rank that was killed ended before those that gave up
        # for want of it.
        for rank in sorted(new, key=lambda rank: ranks[rank].returncode >= 0):
            ended[rank] = ranks[rank].returncode
            kill_at = kill_at or time.monotonic() + _GRACE_S
        if kill_at is not None and time.monotonic() > kill_at:
            return ended | _end_by_force(ranks, ended)
        time.sleep(_LOOK_EVERY_S)
    return ended


def _end_by_force(ranks: Sequence[Process], ended: Mapping[int, int]) -> dict[int, int]:
    """The codes of those that have not followed; to wait for ranks that were stopped on request is
    no failure of theirs.
    """
    left = {rank: process for rank, process in enumerate(ranks) if rank not in ended}
    for process in left.values():
        process.kill()
    codes = {rank: process.wait() for rank, process in left.items()}
    return dict.fromkeys(left, REQUEUE) if set(ended.values()) == {REQUEUE} else codes


def _first_failure(ended: Mapping[int, int]) -> str:
    rank, code = next((r, c) for r, c in ended.items() if c not in (DONE, REQUEUE))
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"rank {rank} {how}"


def _is_asked_within(seconds: float, requests: StopRequests) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not requests.received:
        time.sleep(_LOOK_EVERY_S)
    return bool(requests.received)
