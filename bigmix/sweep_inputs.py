"""The runs of a sweep go in; each is opened and looked at before the first one is trained. No torch here."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from bigmix.errors import BadInput
from bigmix.recipe import SweepRun
from bigmix.train.inputs import Inputs, open_inputs

T = TypeVar("T")


def look_at_all(
    runs: Sequence[SweepRun],
    look: Callable[[SweepRun, Inputs], T],
    *,
    ranks: int,
    verify: bool,
    machines: int = 1,
) -> list[T]:
    """What `look` makes of each run and its inputs, which are let go before the next ones are opened.

    Raises BadInput with all faults of all runs, those of `look` too, each with the points that have it.
    """
    found: list[T] = []
    faults: dict[str, list[str]] = {}
    verified: set[str] = set()
    for run in runs:
        sources = [source.path for source in run.recipe.sources.values()]
        paths = {*sources, *run.recipe.held_out_paths.values()}
        # Shards that most runs share are read through once.
        is_new = verify and not paths <= verified
        try:
            inputs = open_inputs(run.recipe, ranks=ranks, verify=is_new, machines=machines)
            verified |= paths
            found.append(look(run, inputs))
        except BadInput as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(run.point)
    if faults:
        raise BadInput(
            *(f"point {', '.join(dict.fromkeys(points))}: {fault}" for fault, points in faults.items())
        )  # fmt: skip
    return found
