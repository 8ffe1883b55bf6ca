"""The exceptions that end a command, and their exit codes."""

from collections.abc import Sequence

DONE = 0
FAILED = 1
BAD_INPUT = 2
REQUEUE = 75


class BigmixError(Exception):
    """A failure that is reported to the user by its message alone, without a traceback."""

    exit_code = FAILED


class BadInput(BigmixError):
    """Input that cannot be used; nothing was started.

    Holds every fault that was found, not only the first.
    """

    exit_code = BAD_INPUT

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults: Sequence[str] = faults


class Interrupted(BigmixError):
    """The run stopped on request, after a complete checkpoint from which the command resumes."""

    exit_code = REQUEUE
