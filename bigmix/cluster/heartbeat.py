"""Beats of ranks and a clock go in, what is wrong with them comes out: who is silent, and who holds
up the others.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from bigmix.errors import FAILED

_QUIET_S = 3.0  # beats come once a second
_MOST_NAMED = 8  # ranks in a message; of a thousand nobody wants to read them all


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds without a sign of life after which a rank counts as dead, and without progress
    anywhere as a hang.
    """

    dead_s: float
    hang_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a rank tells: a number that grows with each beat, how many activities it has begun, and
    the newest.
    """

    serial: int
    count: int
    doing: str
    has_left: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ShutdownReason:
    """Why all ranks end and with which code; `silent` are those that cannot say it themselves.

    `is_error`: a rank has told an error of its own, which others may well have too.
    """

    text: str
    code: int = FAILED
    silent: Sequence[int] = ()
    is_error: bool = False


AT_FIRST = Heartbeat(serial=0, count=0, doing="start-up")


def to_text(record: Heartbeat | ShutdownReason) -> str:
    """A record as it is written on the board."""
    return json.dumps(asdict(record))


def heartbeat_of(text: str) -> Heartbeat:
    """The beat that was written; the first one where there is none yet."""
    return Heartbeat(**json.loads(text)) if text else AT_FIRST


def shutdown_reason_of(text: str) -> ShutdownReason:
    """The verdict that was written."""
    return ShutdownReason(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """The newest beat of a rank, and when a new one and a new activity were last seen, by the clock
    of who looks.
    """

    beat: Heartbeat
    beat_at: float
    count_at: float


class HeartbeatMonitor:
    """The newest beats of some ranks. Only the clock of who looks counts, those of machines
    differ.
    """

    def __init__(self, ranks: Iterable[int], limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        now = clock()
        self._known = {rank: _Known(beat=AT_FIRST, beat_at=now, count_at=now) for rank in ranks}

    def take(self, beats: Mapping[int, Heartbeat]) -> None:
        """Take in what was read from the board."""
        now = self._clock()
        for rank, beat in beats.items():
            old = self._known[rank]
            self._known[rank] = _Known(
                beat=beat,
                beat_at=now if beat.serial != old.beat.serial else old.beat_at,
                count_at=now if beat.count != old.beat.count else old.count_at,
            )

    def newest(self, rank: int) -> Heartbeat:
        """The newest beat of one of the ranks."""
        return self._known[rank].beat

    def has_left(self, rank: int) -> bool:
        """Whether a rank has said that it ends."""
        return self._known[rank].beat.has_left

    def silence(self) -> ShutdownReason | None:
        """A verdict where ranks have given no sign of life for too long."""
        now = self._clock()
        silent = [
            rank
            for rank, known in self._known.items()
            if not known.beat.has_left and now - known.beat_at > self._limits.dead_s
        ]
        if not silent:
            return None
        return ShutdownReason(
            text=(
                f"{_named(silent)} gave no sign of life for {self._limits.dead_s:g} s, the last at "
                f"{self.newest(silent[0]).doing}; the process or its machine is dead or frozen"
            ),
            silent=silent,
        )

    def hang(self) -> ShutdownReason | None:
        """A verdict where no rank has begun anything new for too long; it names those that have
        come least far.
        """
        now = self._clock()
        moving = {rank: known for rank, known in self._known.items() if not known.beat.has_left}
        if not moving or now - max(k.count_at for k in moving.values()) <= self._limits.hang_s:
            return None
        least = min(known.beat.count for known in moving.values())
        behind = [rank for rank, known in moving.items() if known.beat.count == least]
        # Of those at the same place a frozen one holds up the others.
        quiet = [rank for rank in behind if now - moving[rank].beat_at > _QUIET_S]
        behind = quiet or behind
        others = [rank for rank in moving if rank not in behind]
        frozen = ", frozen" if quiet else ""
        text = (
            f"no rank has come further for {self._limits.hang_s:g} s: {_named(behind)} at"
            f" {self.newest(behind[0]).doing}{frozen}"
        )
        if others:
            text += f"; {_named(others)} at {self.newest(others[0]).doing}"
        return ShutdownReason(
            text=f"{text}; where this is no fault but slow, raise health.hang_minutes"
        )


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_NAMED]))
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
