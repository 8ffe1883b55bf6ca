"""Saves what a run has trained, and stops it once all of it is saved."""

from typing import NoReturn

from bigmix.errors import BigmixError, Interrupted
from bigmix.train.state import Run, TrainState, position_of


def save(run: Run, state: TrainState) -> None:
    """Begin a checkpoint of this step, and wait for it after the last step; a collective."""
    run.watchdog.doing(f"saving step {state.step}")
    run.metrics.flush(state.plan.steps)
    run.metrics.sync()
    run.saver.save(run.engine.zero_state.flats(), position_of(run, state))
    if state.is_last:
        run.saver.finish()
        run.watchdog.must_save(run.saver.last_step != state.step)


def save_finished(run: Run, state: TrainState) -> None:
    """Make sure that everything trained so far is in a complete checkpoint; a collective."""
    saver = run.saver
    saver.finish()
    if state.step and saver.last_step != state.step and (run.health.is_well or not saver.last_step):
        save(run, state)
        saver.finish()


def save_and_stop(run: Run, state: TrainState) -> NoReturn:
    """Save what was trained since the last checkpoint and end; a collective."""
    saver = run.saver
    save_finished(run, state)
    done = f"stopped on request after step {state.step} of {state.plan.steps}"
    if not state.step or saver.last_step == state.step:
        raise Interrupted(f"{done}; the same command goes on from there")
    if not run.health.is_well:
        raise Interrupted(
            f"{done}; it had no finite gradient, so the same command goes on after step"
            f" {saver.last_step}"
        )
    raise BigmixError(
        f"{done}, whose checkpoint could not be written; the same command goes on after step"
        f" {saver.last_step or 0}"
    )
