"""Evaluations in a run, and the decisions on shares that follow them."""

from pathlib import Path

from bigmix.cluster.signals import Activity
from bigmix.evaluation.behaviour.measure import BehaviourResult, write_pairs
from bigmix.evaluation.evaluator import BaselineEvaluation, EvaluationResult
from bigmix.evaluation.held_out import Baseline
from bigmix.evaluation.tables import samples_as_markdown, show_evaluation
from bigmix.evaluation.tasks.runner import write_samples
from bigmix.runs.layout import BEHAVIOUR
from bigmix.runs.metrics_log import METRICS, MetricsRecord, evaluation_at
from bigmix.train.inputs import baseline_cache_key
from bigmix.train.saving import save, save_and_stop, save_finished
from bigmix.train.share_control import RuleFailed, decide_shares, shares_from
from bigmix.train.state import Run, TrainState, asked_after, evaluates_after


def catch_up(run: Run, state: TrainState) -> TrainState:
    """Do the evaluation, or the decision after it, that a run was stopped in; a collective.

    Does nothing where both are done: it may be called whenever a loader has ended.
    """
    if not evaluates_after(run, state):
        return state
    path = Path(run.recipe.output) / METRICS
    own = evaluation_at(path, state.step) if run.cluster.world.is_first else None
    line, *_ = run.cluster.gather(own)
    return evaluate(run, state) if line is None else _decide(run, state, line)


def evaluate(run: Run, state: TrainState) -> TrainState:
    """Evaluate after a step, or before the first; a collective.

    Returns the same state, or the one after a decision on shares. Raises Interrupted on a stop
    request, once everything trained so far is saved.
    """
    run.metrics.flush(state.plan.steps)
    base = run.metrics.report.base
    known = set(base.losses)
    found = _result(run, state, base) if state.step else _baseline_result(run, state, base)
    _show(run, state, found)
    decided = _decide(run, state, found.line)
    if asked_after(run, decided) != asked_after(run, state):
        # The decision has made this step the last one, where the model answers more.
        found = _result(run, decided, base)
        _show(run, state, found)
    if run.cluster.world.is_first:
        folder = Path(run.recipe.output)
        if set(base.losses) != known:
            base.write(folder)
        write_samples(folder, state.step, found.tasks)
        if found.behaviour is not None:
            _keep_behaviour(run, state, found.behaviour)
        run.metrics.write(found.line | shares_from(decided.plan, run.recipe, state.step))
    return decided


def _keep_behaviour(run: Run, state: TrainState, found: BehaviourResult) -> None:
    """Write the answers of an evaluation down, before the line that counts it as done."""
    folder, base = Path(run.recipe.output), run.metrics.report.base
    if not state.step and base.answers is not None:
        base.answers.write(folder)
    write_pairs(folder, state.step, found)
    if found.samples:
        run.metrics.show_text(f"{BEHAVIOUR}/samples", samples_as_markdown(found), state.step)


def _show(run: Run, state: TrainState, found: EvaluationResult) -> None:
    show_evaluation(run.terminal, run.recipe, f"step {state.step:,}", found)


def _baseline_result(run: Run, state: TrainState, base: Baseline) -> EvaluationResult:
    """The evaluation before the first step, taken from an earlier run of this process where that
    must find the same; a collective.
    """
    folder = Path(run.recipe.output)
    key = baseline_cache_key(run.recipe, run.inputs, run.cluster.world.size)
    first = run.baselines.get(key)
    if first is None:
        found = _result(run, state, base)
        run.baselines[key] = BaselineEvaluation(found=found, base=base.copy(), folder=folder)
        return found
    if first.folder != folder:
        run.terminal.note(
            f"the evaluation before the first step is that of {first.folder}: same model, same data"
        )
    base.take_over(first.base)
    return first.found


def _result(run: Run, state: TrainState, base: Baseline) -> EvaluationResult:
    """The evaluation after a step; a collective.

    Raises Interrupted on a stop request, once everything trained so far is saved.
    """
    activity = Activity(
        begin=lambda what: run.watchdog.doing(f"{what}, after step {state.step}"),
        stop_requested=run.stop_signal.is_set,
    )
    found = run.evaluator.evaluate(state.step, base, activity, asked_after(run, state))
    if found is None:
        save_and_stop(run, state)
    return found


def _decide(run: Run, state: TrainState, line: MetricsRecord) -> TrainState:
    """Take the decision that is due after an evaluation; where its shares have reached the budget
    the run is complete.
    """
    try:
        decided = decide_shares(run, state, line)
    except RuleFailed:
        save_finished(run, state)
        raise
    if decided is not state and decided.is_last:
        save(run, decided)
    return decided
