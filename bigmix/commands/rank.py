"""Runs one rank of a training run or an evaluation.

`python -m bigmix.commands.rank train|evaluate RECIPE.yaml ...` does what launch/*.py do. Nothing
heavy is imported here before the signal handlers are installed.
"""

import gc
import os
import sys
import traceback
from collections.abc import Sequence

from bigmix.cluster.signals import NOTHING_LOST, StopSignal
from bigmix.errors import DONE, FAILED

_NOTHING_LOST = {
    "train": NOTHING_LOST,
    "evaluate": "an evaluation keeps nothing before its end; run the same command to repeat it",
}


def main(command: str, arguments: Sequence[str]) -> int:
    """Run the command `train` or `evaluate` on this rank.

    From the first line on a signal ends this process cleanly. Returns 0, or ends the process with
    another exit code.
    """
    stop_signal = StopSignal(nothing_lost=_NOTHING_LOST[command])
    # Nothing that is imported is garbage, and searching it takes a sixth of the start: the engine
    # turns collection on again.
    gc.disable()
    try:
        # These imports take seconds, in which a signal must already find its handler.
        if command == "train":
            from bigmix.commands import train_rank

            code = train_rank.main(arguments, stop_signal)
        else:
            from bigmix.commands import evaluate

            code = evaluate.main(arguments, stop_signal)
    except Exception:  # printed as Python prints it, but the process ends as below
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if code != DONE:
        # What Python does at exit waits for threads and ranks, which may wait for what never
        # comes.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
