"""Work of another thread goes in; out comes whether it is done, or its result is not waited for any longer."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

_LOOK_UP_S = 0.2


def is_done(work: "Future[Any]", gives_up: Callable[[], bool]) -> bool:
    """Wait until work is done, or until `gives_up` says to stop waiting: then False, and the work goes on."""
    while not wait([work], timeout=_LOOK_UP_S).done:
        if gives_up():
            return False
    return True
