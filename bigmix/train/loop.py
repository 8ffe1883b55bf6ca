"""The training loop.

A run is a sequence of optimizer steps. After a step the loop may log, save or evaluate; before one
it may learn that it must stop, or that a shard cannot be read. Whatever changes the rows to come
ends the inner loop, and the outer loop opens a new loader at the new position.
"""

from dataclasses import replace

from bigmix.data.loader import Batches
from bigmix.train import evaluations, recovery, saving, step
from bigmix.train.state import Run, TrainState, due_after, step_settings


def train(run: Run, state: TrainState) -> TrainState:
    """Train until the budget is spent; a collective.

    Raises Interrupted on a stop request, once everything trained so far is saved.
    """
    state = evaluations.catch_up(run, state)
    while state.step < state.plan.steps:
        with run.open_loader(state) as batches:
            state = take_steps(run, state, batches)
        state = evaluations.catch_up(run, state)
    run.saver.close()
    return state


def take_steps(run: Run, state: TrainState, batches: Batches) -> TrainState:
    """Train with one loader; returns when the run is complete or the rows to come have changed."""
    for number in range(state.step + 1, state.plan.steps + 1):
        with run.clock.loading(number):
            batch = next(batches)
        run.saver.settle()
        stop = run.clock.must_stop()
        synced = step.sync(run.cluster, batch, run.objective, run.rank_rows, stop=stop)
        if synced.bad_shards:
            batches.close()
            return recovery.replace_shards(run, state, synced.bad_shards)
        if synced.ready is None:
            saving.save_and_stop(run, state)
        if number in state.skipped_steps:
            run.metrics.skip(number, state.plan.steps)
        else:
            run.watchdog.must_save(True)
            settings = step_settings(run, state, number)
            result = step.run(
                run.engine, run.cluster, synced.ready, run.objective, settings, run.watchdog.doing
            )
            recovery.observe(run, state, result)
            run.metrics.add(result, run.clock.lap(), run.engine.peak_gib())
        state = replace(state, step=number)
        due = due_after(run, state)
        if due.log:
            run.metrics.flush(state.plan.steps)
        if rollback := run.health.take_rollback():
            batches.close()
            return recovery.roll_back(run, state, rollback)
        if due.save:
            saving.save(run, state)
        if due.evaluate:
            evaluated = evaluations.evaluate(run, state)
            if evaluated is not state:
                return evaluated
    return state
