"""The runs of a sweep go in; they are trained one after another in one process group, and those that fail are told."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from bigmix.cluster.collectives import Cluster, leave
from bigmix.cluster.signals import StopFlag
from bigmix.cluster.world import World
from bigmix.errors import BigmixError, Interrupted
from bigmix.model.checks import read_configs
from bigmix.model.engine import give_back_memory, join
from bigmix.recipe import SweepRun
from bigmix.runs.layout import begin_attempt, end_attempt, fails_again, state_of
from bigmix.runs.resume import ENDING_S, alone
from bigmix.sweep_inputs import look_at_all
from bigmix.terminal import Terminal
from bigmix.train.inputs import Inputs, open_inputs
from bigmix.train.run import Shared, run_in


def run_all(runs: Sequence[SweepRun], world: World, terminal: Terminal, flag: StopFlag) -> None:
    """Train every run that is not done, those last that failed before; a failure leaves the others as they are.

    A run that another command trains is passed over, and tried once more after the others. Raises BadInput before the
    first one, Interrupted after a whole checkpoint when the flag is set, and BigmixError at the end where runs have failed.
    """
    done = look_at_all(
        runs, _look, ranks=world.size, verify=world.local_rank == 0, machines=_machines(world)
    )
    cluster = join(world)
    waiting = _in_order(runs, done, cluster)
    terminal.note(f"sweep: {len(runs) - len(waiting)} of {len(runs)} runs are done")
    failures: dict[str, str] = {}
    shared = Shared()
    passed, elsewhere = list[SweepRun](), list[SweepRun]()
    # Those that another command trained are asked for once more: it may have been ending.
    for wait_s, run in chain(((0, run) for run in waiting), ((ENDING_S, run) for run in passed)):
        if any(cluster.gather(flag.is_set())):
            raise Interrupted(f"stopped on request before {run.name}; the same command goes on from there")  # fmt: skip
        with alone(Path(run.recipe.output), cluster, wait_s=wait_s) as is_ours:
            if not is_ours:
                (elsewhere if wait_s else passed).append(run)
                terminal.note(
                    f"\nsweep: run {run.number}, {run.name}, is trained by another command"
                )
                continue
            terminal.note(f"\nsweep: run {run.number}, {run.name}")
            failure = _attempt(run, cluster, flag, shared)
        if failure is not None:
            failures[run.name] = failure
            terminal.warning(f"run {run.name} failed: {failure}")
    leave()
    if failures:
        told = "".join(f"\n{name}: {reason}" for name, reason in failures.items())
        raise BigmixError(
            f"{len(failures)} of {len(runs)} runs failed, the others are done; the same command tries them again{told}"
        )
    others = f" but {len(elsewhere)}, which other commands train," if elsewhere else ""
    terminal.note(f"sweep: all {len(runs)} runs{others} are done")


def _attempt(run: SweepRun, cluster: Cluster, flag: StopFlag, shared: Shared) -> str | None:
    """One run, and back with all that it has taken; why it failed, if it did."""
    failure = None
    try:
        _run(run, cluster, flag, shared)
    except Interrupted:
        _write(cluster, run, is_ended=True)
        raise
    except BigmixError as error:
        failure = str(error)
        _write(cluster, run, reason=failure)
    while shared.engines:
        shared.engines.pop().close()
    give_back_memory()
    return failure


def _look(run: SweepRun, inputs: Inputs) -> bool:
    """Whether a run is done; raises BadInput where its models do not fit."""
    read_configs(run.recipe, inputs.manifest)
    return state_of(run.recipe, steps=inputs.steps, evaluates=inputs.has_exam).kind == "done"


def _machines(world: World) -> int:
    return world.size // world.local_size


def _in_order(
    runs: Sequence[SweepRun], done: Sequence[bool], cluster: Cluster
) -> Sequence[SweepRun]:
    """Those that are not done, as the first rank sees it: folders may look older from other machines."""
    left = [index for index, is_done in enumerate(done) if not is_done]
    order = sorted(left, key=lambda index: fails_again(runs[index].recipe))
    return [runs[index] for index in cluster.gather(order)[0]]


def _run(
    run: SweepRun,
    cluster: Cluster,
    flag: StopFlag,
    shared: Shared,
) -> None:
    """One run; raises on every rank alike where any of them cannot open its inputs."""
    inputs = fault = None
    try:
        inputs = open_inputs(
            run.recipe,
            ranks=cluster.world.size,
            verify=False,
            machines=_machines(cluster.world),
        )
    except BigmixError as error:
        fault = str(error)
    found = next((one for one in cluster.gather(fault) if one is not None), None)
    if inputs is None or found is not None:
        raise BigmixError(f"its inputs cannot be opened: {found}")
    if cluster.world.is_first:
        begin_attempt(Path(run.recipe.output))
    terminal = Terminal(enabled=cluster.world.is_first, every=1)
    run_in(cluster, run.recipe, inputs, terminal, flag, shared)
    _write(cluster, run, is_ended=True)


def _write(cluster: Cluster, run: SweepRun, *, is_ended: bool = False, reason: str = "") -> None:
    folder = Path(run.recipe.output)
    if cluster.world.is_first and is_ended:
        end_attempt(folder)
    elif cluster.world.is_first:
        begin_attempt(folder, reason)
