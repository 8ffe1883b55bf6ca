"""The decisions of controllers on shares, taken after an evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from bigmix.data.records import Decision
from bigmix.data.run_plan import RunPlan
from bigmix.data.share_rules import ControllerInput, decide, rule_of
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import Recipe
from bigmix.recipe.shares import BEHAVIOUR
from bigmix.runs.metrics_log import MetricsRecord
from bigmix.train.state import Run, TrainState, position_of, progress


class RuleFailed(BigmixError):
    """A controller's rule fails, or gives no share that is allowed; every rank raises it after the
    same step.
    """


def shares_from(plan: RunPlan, recipe: Recipe, step: int) -> MetricsRecord:
    """What the line of an evaluation after a step says of the shares from there on; nothing where
    none moves.
    """
    if not recipe.controllers:
        return {}
    return {f"share/{name}": share for name, share in plan.shares_of_step(step + 1).rows.items()}


def decide_shares(run: Run, state: TrainState, line: MetricsRecord) -> TrainState:
    """The state with the shares that controllers decide on from the line of an evaluation; a
    collective.

    The same state where no decision is due. Raises RuleFailed on every rank where a rule fails.
    """
    if not _is_due(run, state):
        return state
    own = _shares(run, state, line) if run.cluster.world.is_first else None
    shares, *_ = run.cluster.gather(own)
    if isinstance(shares, str):
        raise RuleFailed(shares)
    decided = _with_shares(run, state, line, shares)
    run.metrics.report.begin_interval()
    run.metrics.report.follow(decided.plan.epochs)
    return decided


def _is_due(run: Run, state: TrainState) -> bool:
    """Decisions fall on evaluations between steps; one that was taken before a resume holds."""
    is_between = 0 < state.step < state.plan.steps
    is_taken = bool(state.decisions) and state.decisions[-1].step >= state.step
    falls_here = is_between and state.step % run.recipe.evaluate.every == 0
    return bool(run.recipe.controllers) and falls_here and not is_taken


def _current(recipe: Recipe, decisions: Sequence[Decision]) -> dict[str, float]:
    decided = decisions[-1].shares if decisions else {}
    return {name: decided.get(name, c.start) for name, c in recipe.controllers.items()}


def _shares(run: Run, state: TrainState, line: MetricsRecord) -> dict[str, float] | str:
    """The share of each controller, or what went wrong."""
    try:
        return {
            name: decide(
                rule_of(controller, run.recipe.watched_sets(controller)),
                controller.controller,
                _reading(run, state, name, line),
            )
            for name, controller in run.recipe.controllers.items()
        }
    except BigmixError as error:
        return str(error)


def _reading(run: Run, state: TrainState, name: str, line: MetricsRecord) -> ControllerInput:
    controller = run.recipe.controllers[name]
    return ControllerInput(
        name=name,
        step=state.step,
        steps=state.plan.steps,
        share=_current(run.recipe, state.decisions)[name],
        least=controller.least,
        most=controller.most,
        limit=controller.limit,
        shares=MappingProxyType(state.plan.shares_of_step(state.step).rows),
        losses=MappingProxyType(run.metrics.report.interval_losses()),
        held_out=MappingProxyType(_numbers(line, "held_out_loss", f"{BEHAVIOUR}/loss")),
        forgetting=MappingProxyType(_forgetting(line)),
        earlier=tuple(map(_read_only, state.decisions)),
    )


def _read_only(decision: Decision) -> Decision:
    return replace(
        decision,
        shares=MappingProxyType(decision.shares),
        forgetting=MappingProxyType(decision.forgetting),
    )


def _forgetting(line: MetricsRecord) -> dict[str, float]:
    return _numbers(line, "forgetting", f"{BEHAVIOUR}/forgetting")


def _numbers(line: MetricsRecord, key: str, of_behaviour: str) -> dict[str, float]:
    """The numbers KEY/NAME of a line by name, and that of behaviour under its own key; those that
    are not finite are left out, as metrics.jsonl has them.
    """
    found = {k.removeprefix(f"{key}/"): v for k, v in line.items() if k.startswith(f"{key}/")}
    found |= {BEHAVIOUR: line[of_behaviour]} if of_behaviour in line else {}
    return {name: v for name, v in found.items() if isinstance(v, float) and math.isfinite(v)}


def _with_shares(
    run: Run, state: TrainState, line: MetricsRecord, shares: Mapping[str, float]
) -> TrainState:
    """The state from a decision on; where the sources do not allow it, the shares stay, and the
    terminal says so.
    """
    before = _current(run.recipe, state.decisions)
    decision = Decision(
        step=state.step,
        progress=progress(state.step, state.plan.steps, state.decisions),
        shares=shares,
        forgetting=_forgetting(line),
    )
    decided = replace(state, decisions=(*state.decisions, decision))
    try:
        plan = run.inputs.decided_plan(run.recipe, state.plan, position_of(run, decided))
    except BadInput as error:
        run.terminal.warning(f"after step {state.step} shares stay as they are: {error}")
        kept = replace(decision, shares=before)
        return replace(state, decisions=(*state.decisions, kept))
    for note in plan.notes:
        if note not in (*run.inputs.notes, *state.plan.notes):
            run.terminal.note(note)
    moves = ", ".join(f"{n} {before[n]:.2%} -> {share:.2%}" for n, share in shares.items())
    run.terminal.note(f"after step {state.step}: {moves} of the rows; {plan.steps:,} steps in all")
    return replace(decided, plan=plan)
