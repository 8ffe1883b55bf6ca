"""A recipe and its inputs go in, a trained model comes out: the whole run, from joining the cluster
to the export.

The runs of a sweep go in; they are trained one after another in one process group, and those that
fail are told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from bigmix.cluster.collectives import Cluster, leave
from bigmix.cluster.heartbeat import Limits
from bigmix.cluster.signals import StopFlag
from bigmix.cluster.watchdog import Watchdog
from bigmix.cluster.world import World
from bigmix.errors import BadInput, BigmixError, Interrupted
from bigmix.evaluation.evaluator import FirstEvaluation
from bigmix.model.checks import read_configs
from bigmix.model.engine import Engine, give_back_memory, join
from bigmix.model.export import export
from bigmix.recipe import Recipe, SweepRun
from bigmix.runs.layout import EXPORT, begin_attempt, end_attempt, fails_again, is_through, state_of
from bigmix.runs.metrics_log import METRICS, read_lines
from bigmix.runs.resume import ENDING_S, LOG, Beginning, alone, beginning
from bigmix.terminal import Terminal
from bigmix.text.chat_template import PLAIN, PLAIN_SHA256
from bigmix.train.export import LARGEST_GIB, check_generation, model_card, prompt_of, size_gib
from bigmix.train.inputs import Inputs, look_at_all, open_inputs
from bigmix.train.loop import train
from bigmix.train.setup import Parts, set_up


@dataclass(frozen=True, slots=True)
class Shared:
    """What runs in one process leave to those after them: evaluations before the first step,
    engines that are to be closed.
    """

    first_evaluations: dict[str, FirstEvaluation] = field(default_factory=dict)
    engines: list[Engine] = field(default_factory=list)


def run(recipe: Recipe, inputs: Inputs, world: World, terminal: Terminal, flag: StopFlag) -> None:
    """Train to the end of the budget, from the newest whole checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a whole checkpoint when the flag is
    set.
    """
    cluster = join(world)
    with alone(Path(recipe.output), cluster, wait_s=ENDING_S) as is_ours:
        if not is_ours:
            raise BadInput(
                f"output {recipe.output} is being trained in by another command; wait for it or"
                " stop it, or give another output"
            )
        run_in(cluster, recipe, inputs, terminal, flag, Shared())
    leave()


def run_in(
    cluster: Cluster,
    recipe: Recipe,
    inputs: Inputs,
    terminal: Terminal,
    flag: StopFlag,
    shared: Shared,
) -> None:
    """The same in a process group that is there and stays, with what runs before it have left."""
    limits = Limits(dead_s=recipe.train.dead_after_s, hang_s=60 * recipe.train.hang_minutes)
    watchdog = Watchdog(cluster, flag, limits, Path(recipe.output) / LOG)
    try:
        _go_on(recipe, inputs, cluster, terminal, flag, watchdog, shared)
    except BaseException as error:
        watchdog.fail(error)
        raise
    finally:
        terminal.close()
    watchdog.close()


def _go_on(
    recipe: Recipe,
    inputs: Inputs,
    cluster: Cluster,
    terminal: Terminal,
    flag: StopFlag,
    watchdog: Watchdog,
    shared: Shared,
) -> None:
    """Do what a run has still to do; what is done already is left as it is."""
    start = beginning(recipe, inputs.content, cluster)
    if start.checkpoint is not None:
        position = start.checkpoint.position
        moves_rows = any(change.moves_rows for change in start.changes)
        inputs = inputs.going_on(recipe, position, new_chapter=moves_rows)
    if _is_finished(recipe, inputs, cluster, start):
        terminal.note(f"{recipe.output} is finished: all {inputs.steps} steps are done")
        return
    # Now, so that a tokenizer that cannot be fetched is not found out at the end.
    tokenizer_folder = inputs.tokenizer_folder if recipe.train.export else None
    parts = replace(
        set_up(recipe, inputs, cluster, terminal, flag, watchdog, start),
        first_evaluations=shared.first_evaluations,
    )
    shared.engines.append(parts.engine)
    try:
        parts = train(parts, first=start.step + 1)
        if tokenizer_folder is not None:
            _export(parts, tokenizer_folder)
        if parts.saver.last_step != parts.inputs.steps:
            raise BigmixError(
                f"all {parts.inputs.steps} steps are done, but the checkpoint of the last one could"
                f" not be written; free space in {recipe.output}, the same command goes on after"
                f" step {parts.saver.last_step or 0}"
            )
    finally:
        if parts.log is not None:
            parts.log.close()


def _export(parts: Parts, tokenizer_folder: Path) -> None:
    """Write the model with its card, and let what was written say something; a collective."""
    recipe, inputs, is_first = parts.recipe, parts.inputs, parts.cluster.world.is_first
    folder = Path(recipe.output) / EXPORT
    parts.watchdog.doing(f"describing {folder}")
    texts = {}
    if is_first:
        lines = read_lines(Path(recipe.output) / METRICS)
        texts = {"README.md": model_card(recipe, inputs, lines), **_template(inputs)}
    export(
        parts.engine,
        parts.cluster,
        tokenizer_folder,
        folder,
        shard_bytes=int(recipe.train.export_shard_gib * 2**30),
        texts=texts,
        doing=parts.watchdog.doing,
    )
    parts.terminal.note(f"model written to {folder}")
    if is_first:
        parts.watchdog.doing(f"loading {folder}")
        _check(parts, folder)
    parts.cluster.barrier()


def _template(inputs: Inputs) -> dict[str, str]:
    """The built-in chat template where all chats are rendered with it; another one lies with the
    tokenizer already.
    """
    templates = [source.manifest.template for source in inputs.sources.values()]
    found = {template.sha256 for template in templates if template is not None}
    return {"chat_template.jinja": PLAIN} if found == {PLAIN_SHA256} else {}


def _check(parts: Parts, folder: Path) -> None:
    if size_gib(folder) > LARGEST_GIB:
        parts.terminal.note(
            f"generation check left out: the model has {size_gib(folder):.1f} GiB, up to"
            f" {LARGEST_GIB:g} are loaded again"
        )
        return
    held_out, plan = parts.inputs.held_out, parts.inputs.plan
    tasks = [name for name in parts.recipe.task_names if name in held_out]
    streams = [*(held_out[name] for name in tasks), *held_out.values(), *plan.streams.values()]
    prompt = prompt_of(streams)
    if not prompt:
        parts.terminal.note("generation check left out: no document can be read for a prompt")
        return
    try:
        said = check_generation(folder, prompt)
    except (OSError, ValueError, RuntimeError) as error:
        parts.terminal.warning(f"generation check: {folder} does not load and generate ({error})")
        return
    parts.terminal.note(
        f"generation check, from {folder} loaded anew: {said.prompt!r} -> {said.continuation!r}"
    )


def _is_finished(recipe: Recipe, inputs: Inputs, cluster: Cluster, start: Beginning) -> bool:
    """Whether nothing is left to do, as the first rank sees it: folders may look older from other
    machines.
    """
    has_all = cluster.world.is_first and is_through(
        recipe, step=start.step, steps=inputs.steps, evaluates=inputs.has_exam
    )
    return bool(cluster.gather(has_all)[0])


def run_all(runs: Sequence[SweepRun], world: World, terminal: Terminal, flag: StopFlag) -> None:
    """Train every run that is not done, those last that failed before; a failure leaves the others
    as they are.

    A run that another command trains is passed over, and tried once more after the others. Raises
    BadInput before the first one, Interrupted after a whole checkpoint when the flag is set, and
    BigmixError at the end where runs have failed.
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
            raise Interrupted(
                f"stopped on request before {run.name}; the same command goes on from there"
            )
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
            f"{len(failures)} of {len(runs)} runs failed, the others are done; the same command"
            f" tries them again{told}"
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
    """Those that are not done, as the first rank sees it: folders may look older from other
    machines.
    """
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
