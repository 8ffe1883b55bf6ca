"""One rank of a run: `python -m bigmix.rank RECIPE.yaml [key=value ...]`; launch/train.py is the same by another name."""

import os
import sys
import traceback
from collections.abc import Sequence

from bigmix.errors import DONE, FAILED
from bigmix.guard import StopFlag


def main(arguments: Sequence[str]) -> int:
    """Let signals end this process well from now on, then run the recipe; returns 0, or ends with another code."""
    flag = StopFlag()
    # Seconds of imports, during which a signal must find the guard.
    from bigmix.cli.train import main as train

    try:
        code = train(arguments, flag)
    except Exception:  # told as any program tells it, but ended as below
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if code != DONE:
        # What Python does at exit waits for threads and ranks, and these may wait for what never comes.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
