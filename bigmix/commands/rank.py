"""One rank of a run or an evaluation: `python -m bigmix.commands.rank train|evaluate RECIPE.yaml
...`; launch/*.py are the same.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from bigmix.cluster.signals import NOTHING_LOST, StopSignal
from bigmix.errors import DONE, FAILED

_NOTHING_KEPT = "an evaluation keeps nothing until its end; the same command begins it again"


def main(arguments: Sequence[str]) -> int:
    """Let signals end this process well from now on, then run the recipe; returns 0, or ends with
    another code.
    """
    return _end_well(arguments, _train, NOTHING_LOST)


def evaluate(arguments: Sequence[str]) -> int:
    """The same for an evaluation."""
    return _end_well(arguments, _evaluate, _NOTHING_KEPT)


def _end_well(
    arguments: Sequence[str], work: Callable[[Sequence[str], StopSignal], int], nothing_lost: str
) -> int:
    stop_signal = StopSignal(nothing_lost=nothing_lost)
    # Nothing that is imported is garbage, and to look for some takes a sixth of a start: not before
    # there is an engine.
    gc.disable()
    try:
        code = work(arguments, stop_signal)
    except Exception:  # told as any program tells it, but ended as below
        traceback.print_exc()
        code = FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if code != DONE:
        # What Python does at exit waits for threads and ranks, and these may wait for what never
        # comes.
        os._exit(code)
    return code


def _train(arguments: Sequence[str], stop_signal: StopSignal) -> int:
    # Seconds of imports, during which a signal must find the guard.
    from bigmix.commands.train_rank import main as train

    return train(arguments, stop_signal)


def _evaluate(arguments: Sequence[str], stop_signal: StopSignal) -> int:
    from bigmix.commands.evaluate import main as evaluate_rank

    return evaluate_rank(arguments, stop_signal)


if __name__ == "__main__":
    sys.exit({"train": main, "evaluate": evaluate}[sys.argv[1]](sys.argv[2:]))
