"""Signals and the clock go in, one flag comes out: the run is asked to save and stop at the next step boundary."""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Whether a signal or the end of `max_minutes` asks this process to stop.

    A second signal ends it at once; checkpoints stay whole.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._asked = False
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        for number in _ASKING:
            signal.signal(number, self._receive)
        _die_with_parent()

    @property
    def is_set(self) -> bool:
        """Whether to stop."""
        return self._asked or (self._until is not None and time.monotonic() >= self._until)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked:
            os._exit(128 + number)
        self._asked = True


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies: killed with -9 it would leave its ranks running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
