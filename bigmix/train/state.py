"""The state of a run: its services (`Run`) and its position (`TrainState`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from bigmix.cluster.collectives import Cluster
from bigmix.cluster.signals import StopSignal
from bigmix.cluster.watchdog import Watchdog
from bigmix.data.loader import Batches
from bigmix.data.records import Decision, RankRows
from bigmix.data.run_plan import RunPlan
from bigmix.evaluation.evaluator import Asked, BaselineEvaluation, Evaluator
from bigmix.model.engine import Engine
from bigmix.recipe import Recipe, plain
from bigmix.recipe.schedule import LearningRate, warmup_steps
from bigmix.runs.checkpoints import CheckpointManifest, Position
from bigmix.runs.saver import Saver
from bigmix.runs.state_file import StateReader
from bigmix.seeding import key_of
from bigmix.terminal import Terminal
from bigmix.train.inputs import RunInputs
from bigmix.train.step import StepSettings, TrainingObjective
from bigmix.train.step_metrics import Health, RunMetrics, StepClock


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The services of a run, built once by `setup`; no field is replaced while it runs.

    `baselines` are the evaluations before the first step of this run and of those before it in the
    same process, by what they follow from.
    """

    recipe: Recipe
    inputs: RunInputs
    cluster: Cluster
    rank_rows: RankRows
    engine: Engine
    objective: TrainingObjective
    evaluator: Evaluator
    metrics: RunMetrics
    saver: Saver
    health: Health
    clock: StepClock
    terminal: Terminal
    stop_signal: StopSignal
    watchdog: Watchdog
    baselines: dict[str, BaselineEvaluation]

    def open_loader(self, state: "TrainState") -> Batches:
        """What this rank reads from the next step on."""
        return Batches(
            state.plan,
            self.inputs.sources,
            self.inputs.shard_store,
            self.rank_rows,
            first=state.step + 1,
            ahead=self.recipe.train.prefetch_steps,
            gives_up=self.stop_signal.is_set,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """The position of a run after `step`; a change is a new value.

    `skipped_steps` are not trained. `decisions` are those of controllers, oldest first.
    """

    step: int
    plan: RunPlan
    skipped_steps: frozenset[int] = frozenset()
    decisions: tuple[Decision, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether the budget is spent."""
        return self.step == self.plan.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """What follows a step, in this order."""

    log: bool
    save: bool
    evaluate: bool


def due_after(run: Run, state: TrainState) -> Due:
    """What follows the step that was just trained."""
    recipe = run.recipe
    # While steps are skipped the weights may be what is wrong.
    saves = run.saver.is_due(state.step, recipe.checkpoint.every) and run.health.is_well
    save = state.is_last or saves
    return Due(
        log=save or state.step % recipe.train.log_every == 0,
        save=save,
        evaluate=evaluates_after(run, state),
    )


def evaluates_after(run: Run, state: TrainState) -> bool:
    """Whether an evaluation follows a step; one comes before the first step and one after the
    last.
    """
    every = run.recipe.evaluate.every
    is_due = state.step == 0 or state.is_last or (every > 0 and state.step % every == 0)
    return is_due and (bool(run.inputs.held_out) or not asked_after(run, state).is_empty)


def asked_after(run: Run, state: TrainState) -> Asked:
    """What the model answers in the evaluation after a step."""
    last = state.plan.steps
    steps = {"ends": (0, last), "last": (last,), "every": (state.step,)}
    tasks = run.evaluator.tasks.items()
    probed = steps["ends" if run.recipe.behaviour.when == "ends" else "every"]
    return Asked(
        tasks=frozenset(name for name, asked in tasks if state.step in steps[asked.task.when]),
        behaviour=run.evaluator.behaviour is not None and state.step in probed,
    )


def step_settings(run: Run, state: TrainState, number: int) -> StepSettings:
    """The settings of step `number`."""
    return StepSettings(
        shares=state.plan.shares_of_step(number),
        lr=_learning_rate(run, state, number),
        dropout_seed=key_of(run.recipe.seed, "dropout", number, run.rank_rows.rank) >> 1,
    )


def _learning_rate(run: Run, state: TrainState, number: int) -> float:
    """The learning rate of a step; where decisions change the number of steps, by the part of the
    run that is done.
    """
    train, decisions = run.recipe.train, state.decisions
    steps = run.inputs.plan.steps if decisions else state.plan.steps
    rate = LearningRate(
        peak=train.lr,
        steps=steps,
        warmup_steps=warmup_steps(train.warmup, steps),
        shape=train.schedule,
        decay=train.decay,
        final=train.final_lr,
    )
    if not decisions:
        return rate.at(number)
    return rate.at(steps * progress(number, state.plan.steps, decisions))


def progress(step: int, steps: int, decisions: Sequence[Decision]) -> float:
    """The part of a run of now `steps` steps that is done after `step`.

    From the last decision, which may have changed the number of steps, it grows evenly to 1.
    """
    if not decisions:
        return step / steps
    last = decisions[-1]
    return last.progress + (1 - last.progress) * (step - last.step) / max(steps - last.step, 1)


def position_of(run: Run, state: TrainState) -> Position:
    """The state as a checkpoint keeps it; the metrics of every step must have been flushed."""
    return Position(
        step=state.step,
        report=run.metrics.report.state(),
        losses=run.health.state(),
        recipe=plain(run.recipe),
        data=state.plan.position(state.step),
        content=run.inputs.content,
        decisions=state.decisions,
    )


def restore(run: Run, checkpoint: CheckpointManifest) -> None:
    """Put everything that a step changes back to where it was at a checkpoint, whatever number of
    ranks wrote it; a collective.
    """
    run.watchdog.doing(f"reading {checkpoint.path}")
    run.engine.zero_state.put_back(StateReader(checkpoint.path).fill)
    run.metrics.report.resume(checkpoint.position.report)
    run.health.resume(checkpoint.position.losses)
    run.saver.resume(checkpoint.position.step)
