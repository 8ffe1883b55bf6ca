"""What can go wrong, as exceptions; out goes the exit code of a command."""

from collections.abc import Sequence

DONE = 0
FAILED = 1
BAD_INPUT = 2
REQUEUE = 75


class BigmixError(Exception):
    """A failure that is told to the user in its own words, without a traceback."""

    exit_code = FAILED


class BadInput(BigmixError):
    """Input that cannot be used; nothing was started.

    Holds every fault that was found, not the first.
    """

    exit_code = BAD_INPUT

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults: Sequence[str] = faults


class Interrupted(BigmixError):
    """The run stopped on request, after a whole checkpoint; the same command goes on from there."""

    exit_code = REQUEUE
