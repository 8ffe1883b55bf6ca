"""A recipe and its inputs go in, a trained model comes out: the whole run, from joining the cluster to the export."""

from pathlib import Path

from bigmix.beats import Limits
from bigmix.dist import Cluster, leave
from bigmix.engine import join
from bigmix.errors import BigmixError
from bigmix.export import export
from bigmix.guard import StopFlag
from bigmix.inputs import Inputs
from bigmix.loop import train
from bigmix.metrics import METRICS, has_evaluation
from bigmix.recipe import Recipe
from bigmix.run_folder import EXPORT, LOG, Beginning, beginning
from bigmix.set_up import set_up
from bigmix.terminal import Terminal
from bigmix.watchdog import Watchdog
from bigmix.world import World


def run(recipe: Recipe, inputs: Inputs, world: World, terminal: Terminal, flag: StopFlag) -> None:
    """Train to the end of the budget, from the newest whole checkpoint if there is one.

    Raises BadInput before the first step, and Interrupted after a whole checkpoint when the flag is set.
    """
    cluster = join(world)
    limits = Limits(dead_s=recipe.train.dead_after_s, hang_s=60 * recipe.train.hang_minutes)
    watchdog = Watchdog(cluster, flag, limits, Path(recipe.output) / LOG)
    try:
        _go_on(recipe, inputs, cluster, terminal, flag, watchdog)
    except BaseException as error:
        watchdog.fail(error)
        raise
    finally:
        terminal.close()
    watchdog.close()
    leave()


def _go_on(
    recipe: Recipe,
    inputs: Inputs,
    cluster: Cluster,
    terminal: Terminal,
    flag: StopFlag,
    watchdog: Watchdog,
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
    parts = set_up(recipe, inputs, cluster, terminal, flag, watchdog, start)
    try:
        parts = train(parts, first=start.step + 1)
        if tokenizer_folder is not None:
            folder = Path(recipe.output) / EXPORT
            watchdog.doing(f"writing {folder}")
            export(parts.engine, cluster, tokenizer_folder, folder)
            terminal.note(f"model written to {folder}")
        if parts.saver.last_step != parts.inputs.steps:
            raise BigmixError(
                f"all {parts.inputs.steps} steps are done, but the checkpoint of the last one could not be written; free space in "
                f"{recipe.output}, the same command goes on after step {parts.saver.last_step or 0}"
            )
    finally:
        if parts.log is not None:
            parts.log.close()


def _is_finished(recipe: Recipe, inputs: Inputs, cluster: Cluster, start: Beginning) -> bool:
    """Whether nothing is left to do, as the first rank sees it: folders may look older from other machines."""
    has_all = start.step >= inputs.steps
    if cluster.world.is_first and has_all:
        folder = Path(recipe.output)
        has_all = (folder / EXPORT).is_dir() or not recipe.train.export
        has_all &= not inputs.held_out or has_evaluation(folder / METRICS, start.step)
    return bool(cluster.gather(has_all)[0])
