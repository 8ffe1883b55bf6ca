"""Judges from heartbeats and a clock which ranks are dead, frozen or behind."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from bigmix.errors import FAILED

_FROZEN_S = 3.0  # a rank writes a heartbeat once a second
_MAX_NAMED = 8  # ranks that a message names; a list of a thousand would be unreadable


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When a run counts as lost.

    dead_s: seconds without a heartbeat after which a rank counts as dead
    hang_s: seconds without a new activity on any rank after which the run counts as hanging
    """

    dead_s: float
    hang_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a rank reports about itself once a second.

    `serial` grows with each heartbeat. `num_activities` is how many activities the rank has begun,
    `activity` the newest of them, such as "forward of step 12, micro-batch 3".
    """

    serial: int
    num_activities: int
    activity: str
    has_left: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ShutdownReason:
    """Why all ranks end, and with which exit code.

    `silent` are the ranks that cannot report the reason themselves. `is_error`: it is an exception
    of one rank, which the others may be about to raise as well.
    """

    text: str
    code: int = FAILED
    silent: Sequence[int] = ()
    is_error: bool = False


NO_HEARTBEAT_YET = Heartbeat(serial=0, num_activities=0, activity="start-up")


def to_text(record: Heartbeat | ShutdownReason) -> str:
    """A record as a text for the store that the ranks share."""
    return json.dumps(asdict(record))


def heartbeat_of(text: str) -> Heartbeat:
    """The heartbeat that `to_text` wrote; NO_HEARTBEAT_YET if the text is empty."""
    return Heartbeat(**json.loads(text)) if text else NO_HEARTBEAT_YET


def shutdown_reason_of(text: str) -> ShutdownReason:
    """The reason that `to_text` wrote."""
    return ShutdownReason(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """The newest heartbeat of a rank, and when a new one and a new activity were last seen.

    Both times are by the clock of the rank that monitors.
    """

    heartbeat: Heartbeat
    heartbeat_at: float
    activity_at: float


class HeartbeatMonitor:
    """The newest heartbeats of some ranks.

    Only the clock of the rank that monitors counts, since the clocks of machines differ.
    """

    def __init__(self, ranks: Iterable[int], limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        now = clock()
        self._seen = {
            rank: _Seen(heartbeat=NO_HEARTBEAT_YET, heartbeat_at=now, activity_at=now)
            for rank in ranks
        }

    def update(self, heartbeats: Mapping[int, Heartbeat]) -> None:
        """Take in the heartbeats that were just read from the store."""
        now = self._clock()
        for rank, heartbeat in heartbeats.items():
            old = self._seen[rank]
            is_new = heartbeat.serial != old.heartbeat.serial
            is_further = heartbeat.num_activities != old.heartbeat.num_activities
            self._seen[rank] = _Seen(
                heartbeat=heartbeat,
                heartbeat_at=now if is_new else old.heartbeat_at,
                activity_at=now if is_further else old.activity_at,
            )

    def newest(self, rank: int) -> Heartbeat:
        """The newest heartbeat of one of the ranks."""
        return self._seen[rank].heartbeat

    def has_left(self, rank: int) -> bool:
        """Whether a rank has reported that it is ending."""
        return self._seen[rank].heartbeat.has_left

    def silence(self) -> ShutdownReason | None:
        """The reason to end where ranks have sent no heartbeat for too long, else None."""
        now = self._clock()
        silent = [
            rank
            for rank, seen in self._seen.items()
            if not seen.heartbeat.has_left and now - seen.heartbeat_at > self._limits.dead_s
        ]
        if not silent:
            return None
        return ShutdownReason(
            text=(
                f"{_named(silent)} gave no sign of life for {self._limits.dead_s:g} s, the last at "
                f"{self.newest(silent[0]).activity}; the process or its machine is dead or frozen"
            ),
            silent=silent,
        )

    def hang(self) -> ShutdownReason | None:
        """The reason to end where no rank has begun anything new for too long, else None.

        It names the ranks that have made the least progress.
        """
        now = self._clock()
        present = {rank: seen for rank, seen in self._seen.items() if not seen.heartbeat.has_left}
        newest_at = max((seen.activity_at for seen in present.values()), default=now)
        if now - newest_at <= self._limits.hang_s:
            return None
        least = min(seen.heartbeat.num_activities for seen in present.values())
        behind = [rank for rank, s in present.items() if s.heartbeat.num_activities == least]
        # Of ranks at the same activity, a frozen one is what the others wait for.
        frozen = [rank for rank in behind if now - present[rank].heartbeat_at > _FROZEN_S]
        behind = frozen or behind
        others = [rank for rank in present if rank not in behind]
        text = (
            f"no rank has made progress for {self._limits.hang_s:g} s: {_named(behind)} at"
            f" {self.newest(behind[0]).activity}{', frozen' if frozen else ''}"
        )
        if others:
            text += f"; {_named(others)} at {self.newest(others[0]).activity}"
        return ShutdownReason(
            text=f"{text}; if this is only slow and no fault, raise health.hang_minutes"
        )


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MAX_NAMED]))
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
