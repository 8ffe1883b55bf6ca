"""A recipe and its inputs go in, a trained model comes out: the whole run, from joining the cluster to the export."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from bigmix.cluster.collectives import Cluster, leave
from bigmix.cluster.heartbeat import Limits
from bigmix.cluster.signals import StopFlag
from bigmix.cluster.watchdog import Watchdog
from bigmix.cluster.world import World
from bigmix.errors import BadInput, BigmixError
from bigmix.first_evaluation import FirstEvaluation
from bigmix.generation_check import LARGEST_GIB, check_generation, prompt_of, size_gib
from bigmix.model.engine import Engine, join
from bigmix.model.export import export
from bigmix.recipe import Recipe
from bigmix.runs.layout import EXPORT, is_through
from bigmix.runs.metrics_log import METRICS, read_lines
from bigmix.runs.resume import ENDING_S, LOG, Beginning, alone, beginning
from bigmix.terminal import Terminal
from bigmix.text.chat_template import PLAIN, PLAIN_SHA256
from bigmix.train.export import model_card
from bigmix.train.inputs import Inputs
from bigmix.train.loop import train
from bigmix.train.setup import Parts, set_up


@dataclass(frozen=True, slots=True)
class Shared:
    """What runs in one process leave to those after them: evaluations before the first step, engines that are to be closed."""

    first_evaluations: dict[str, FirstEvaluation] = field(default_factory=dict)
    engines: list[Engine] = field(default_factory=list)


def run(recipe: Recipe, inputs: Inputs, world: World, terminal: Terminal, flag: StopFlag) -> None:
    """Train to the end of the budget, from the newest whole checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a whole checkpoint when the flag is set.
    """
    cluster = join(world)
    with alone(Path(recipe.output), cluster, wait_s=ENDING_S) as is_ours:
        if not is_ours:
            raise BadInput(
                f"output {recipe.output} is being trained in by another command; wait for it or stop it, or give another output"
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
                f"all {parts.inputs.steps} steps are done, but the checkpoint of the last one could not be written; free space in "
                f"{recipe.output}, the same command goes on after step {parts.saver.last_step or 0}"
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
    """The built-in chat template where all chats are rendered with it; another one lies with the tokenizer already."""
    templates = [source.manifest.template for source in inputs.sources.values()]
    found = {template.sha256 for template in templates if template is not None}
    return {"chat_template.jinja": PLAIN} if found == {PLAIN_SHA256} else {}


def _check(parts: Parts, folder: Path) -> None:
    if size_gib(folder) > LARGEST_GIB:
        parts.terminal.note(
            f"generation check left out: the model has {size_gib(folder):.1f} GiB, up to {LARGEST_GIB:g} are loaded again"
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
    """Whether nothing is left to do, as the first rank sees it: folders may look older from other machines."""
    has_all = cluster.world.is_first and is_through(
        recipe, step=start.step, steps=inputs.steps, evaluates=inputs.has_exam
    )
    return bool(cluster.gather(has_all)[0])
