"""A run from joining the process group to the exported model, and the runs of a sweep."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from bigmix.cluster.collectives import Cluster, is_joined, leave
from bigmix.cluster.heartbeat import Limits
from bigmix.cluster.signals import StopSignal
from bigmix.cluster.watchdog import Watchdog
from bigmix.cluster.world import World
from bigmix.data.run_plan import RunPlan
from bigmix.errors import BadInput, BigmixError, Interrupted
from bigmix.evaluation.evaluator import BaselineEvaluation
from bigmix.model.checks import read_configs
from bigmix.model.engine import Engine, end_process_group, join, release_memory
from bigmix.recipe import Recipe, SweepRun
from bigmix.runs.layout import (
    LOG,
    begin_attempt,
    end_attempt,
    fails_again,
    is_through,
    state_of,
)
from bigmix.runs.resume import ENDING_S, ResumePoint, find_resume_point, locked_folder
from bigmix.runs.saver import Saver
from bigmix.terminal import Terminal
from bigmix.train.export import export_model
from bigmix.train.inputs import RunInputs, open_each, open_inputs
from bigmix.train.loop import train
from bigmix.train.setup import RunContext, set_up
from bigmix.train.state import Run, TrainState


@dataclass(frozen=True, slots=True)
class Shared:
    """What runs in one process leave to those after them: evaluations before the first step, and
    the engines and savers that are to be closed.
    """

    baselines: dict[str, BaselineEvaluation] = field(default_factory=dict)
    engines: list[Engine] = field(default_factory=list)
    savers: list[Saver] = field(default_factory=list)

    def close(self) -> None:
        """Close what a run has left, however it ended, and free its memory for the next one."""
        while self.savers:
            self.savers.pop().stop()
        while self.engines:
            self.engines.pop().close()
        release_memory()


def run(
    recipe: Recipe, inputs: RunInputs, world: World, terminal: Terminal, stop_signal: StopSignal
) -> None:
    """Train to the end of the budget, from the newest complete checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a complete checkpoint when a stop
    was requested.
    """
    cluster = join(world)
    with _held_output(recipe, cluster):
        run_in(cluster, recipe, inputs, terminal, stop_signal, Shared())
    leave()


def run_here(
    recipe: Recipe, inputs: RunInputs, terminal: Terminal, stop_signal: StopSignal
) -> None:
    """Train on one rank, in a process that continues afterwards: the engine and the process group
    end with the run, however it ends.

    Raises BadInput where the process is in a process group already.
    """
    if is_joined():
        raise BadInput(
            "this process is in a process group of torch.distributed, and the run needs one of its"
            " own; end it with torch.distributed.destroy_process_group(), or train in another"
            " process, such as with num_ranks=2"
        )
    cluster, shared = join(World(rank=0, local_rank=0, size=1, local_size=1)), Shared()
    try:
        with _held_output(recipe, cluster):
            run_in(cluster, recipe, inputs, terminal, stop_signal, shared)
    finally:
        shared.close()
        end_process_group()


@contextmanager
def _held_output(recipe: Recipe, cluster: Cluster) -> Iterator[None]:
    """Inside, no other command trains in the output of a recipe; a collective.

    Raises BadInput where one does already.
    """
    with locked_folder(Path(recipe.output), cluster, wait_s=ENDING_S) as is_ours:
        if not is_ours:
            raise BadInput(
                f"output {recipe.output} is being trained in by another command; wait for it or"
                " stop it, or give another output"
            )
        yield


def run_in(
    cluster: Cluster,
    recipe: Recipe,
    inputs: RunInputs,
    terminal: Terminal,
    stop_signal: StopSignal,
    shared: Shared,
) -> None:
    """Train in a process group that exists and stays, with what earlier runs have left."""
    with _watched(cluster, recipe, terminal, stop_signal) as watchdog:
        start = find_resume_point(recipe, inputs.content, cluster)
        plan = _plan_from(start, recipe, inputs)
        if _is_finished(recipe, inputs, plan, cluster, start):
            terminal.note(f"{recipe.output} is complete: all {plan.steps} steps are done")
            return
        # Now, so that a tokenizer that cannot be fetched is not found out at the end.
        tokenizer_folder = inputs.tokenizer_folder if recipe.checkpoint.export else None
        context = RunContext(
            cluster=cluster,
            terminal=terminal,
            stop_signal=stop_signal,
            watchdog=watchdog,
            baselines=shared.baselines,
        )
        run, state = set_up(recipe, inputs, plan, start, context)
        shared.engines.append(run.engine)
        shared.savers.append(run.saver)
        with closing(run.metrics):
            state = train(run, state)
            if tokenizer_folder is not None:
                export_model(run, state, tokenizer_folder)
            _check_saved(run, state)


@contextmanager
def _watched(
    cluster: Cluster, recipe: Recipe, terminal: Terminal, stop_signal: StopSignal
) -> Iterator[Watchdog]:
    """Inside, the ranks are watched; where one fails, all end. A collective."""
    limits = Limits(dead_s=recipe.health.dead_after_s, hang_s=60 * recipe.health.hang_minutes)
    watchdog = Watchdog(cluster, stop_signal, limits, Path(recipe.output) / LOG)
    try:
        yield watchdog
    except BaseException as error:
        watchdog.fail(error)
        raise
    finally:
        terminal.close()
    watchdog.close()


def _plan_from(start: ResumePoint, recipe: Recipe, inputs: RunInputs) -> RunPlan:
    """The plan of the steps that are left."""
    if start.checkpoint is None:
        return inputs.plan
    moves_rows = any(change.moves_rows for change in start.changes)
    return inputs.resumed_plan(recipe, start.checkpoint.position, new_segment=moves_rows)


def _is_finished(
    recipe: Recipe, inputs: RunInputs, plan: RunPlan, cluster: Cluster, start: ResumePoint
) -> bool:
    """Whether nothing is left to do, as the first rank sees it: folders may look older from other
    machines.
    """
    has_all = cluster.world.is_first and is_through(
        recipe, step=start.step, steps=plan.steps, evaluates=inputs.has_evaluation
    )
    return bool(cluster.gather(has_all)[0])


def _check_saved(run: Run, state: TrainState) -> None:
    if run.saver.last_step != state.plan.steps:
        raise BigmixError(
            f"all {state.plan.steps} steps are done, but the checkpoint of the last one could not"
            f" be written; free space in {run.recipe.output}, the same command goes on after step"
            f" {run.saver.last_step or 0}"
        )


def run_all(
    runs: Sequence[SweepRun], world: World, terminal: Terminal, stop_signal: StopSignal
) -> None:
    """Train every run that is not done, those last that failed before; a failure leaves the others
    as they are.

    A run that another command trains is skipped, and tried once more after the others. Raises
    BadInput before the first run, Interrupted after a complete checkpoint when a stop was
    requested, and BigmixError at the end where runs have failed.
    """
    done = open_each(
        runs, _look, ranks=world.size, verify=world.local_rank == 0, machines=_machines(world)
    )
    cluster = join(world)
    waiting = _in_order(runs, done, cluster)
    terminal.note(f"sweep: {len(runs) - len(waiting)} of {len(runs)} runs are done")
    failures: dict[str, str] = {}
    shared = Shared()
    passed, elsewhere = list[SweepRun](), list[SweepRun]()
    # Runs that another command trained are tried once more: it may have been ending.
    for wait_s, run in chain(((0, run) for run in waiting), ((ENDING_S, run) for run in passed)):
        if any(cluster.gather(stop_signal.is_set())):
            raise Interrupted(
                f"stopped on request before {run.name}; the same command goes on from there"
            )
        with locked_folder(Path(run.recipe.output), cluster, wait_s=wait_s) as is_ours:
            if not is_ours:
                (elsewhere if wait_s else passed).append(run)
                terminal.note(
                    f"\nsweep: run {run.number}, {run.name}, is trained by another command"
                )
                continue
            terminal.note(f"\nsweep: run {run.number}, {run.name}")
            failure = _attempt(run, cluster, stop_signal, shared)
        if failure is not None:
            failures[run.name] = failure
            terminal.warning(f"run {run.name} failed: {failure}")
    leave()
    if failures:
        reasons = "".join(f"\n{name}: {reason}" for name, reason in failures.items())
        raise BigmixError(
            f"{len(failures)} of {len(runs)} runs failed, the others are done; the same command"
            f" tries them again{reasons}"
        )
    others = f" but {len(elsewhere)}, which other commands train," if elsewhere else ""
    terminal.note(f"sweep: all {len(runs)} runs{others} are done")


def _attempt(
    run: SweepRun, cluster: Cluster, stop_signal: StopSignal, shared: Shared
) -> str | None:
    """One run, and back with all that it has taken; why it failed, if it did."""
    failure = None
    try:
        _run(run, cluster, stop_signal, shared)
    except Interrupted:
        _write(cluster, run, is_ended=True)
        raise
    except BigmixError as error:
        failure = str(error)
        _write(cluster, run, reason=failure)
    shared.close()
    return failure


def _look(run: SweepRun, inputs: RunInputs) -> bool:
    """Whether a run is done; raises BadInput where its models do not fit."""
    read_configs(run.recipe, inputs.manifest)
    return (
        state_of(run.recipe, steps=inputs.plan.steps, evaluates=inputs.has_evaluation).kind
        == "done"
    )


def _machines(world: World) -> int:
    return world.size // world.local_size


def _in_order(
    runs: Sequence[SweepRun], done: Sequence[bool], cluster: Cluster
) -> Sequence[SweepRun]:
    """Those that are not done, as the first rank sees it: folders may look older from other
    machines.
    """
    left = [index for index, is_done in enumerate(done) if not is_done]
    order = sorted(left, key=lambda index: fails_again(runs[index].recipe))
    return [runs[index] for index in cluster.gather(order)[0]]


def _run(
    run: SweepRun,
    cluster: Cluster,
    stop_signal: StopSignal,
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
    run_in(cluster, run.recipe, inputs, terminal, stop_signal, shared)
    _write(cluster, run, is_ended=True)


def _write(cluster: Cluster, run: SweepRun, *, is_ended: bool = False, reason: str = "") -> None:
    folder = Path(run.recipe.output)
    if cluster.world.is_first and is_ended:
        end_attempt(folder)
    elif cluster.world.is_first:
        begin_attempt(folder, reason)
