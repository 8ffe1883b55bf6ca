"""Signals go in, one flag comes out: the run is asked to save and stop at the next step boundary."""

import ctypes
import os
import signal
import sys
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Whether a signal has asked this process to stop. A second signal ends it at once; checkpoints stay whole."""

    def __init__(self) -> None:
        self.is_set = False
        for number in _ASKING:
            signal.signal(number, self._receive)
        _die_with_parent()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.is_set:
            os._exit(128 + number)
        self.is_set = True


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies: killed with -9 it would leave its ranks running."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
