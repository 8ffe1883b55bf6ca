"""An evaluation's numbers go in; out comes a run that goes on with the shares that its controllers
decide on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from bigmix.data.records import Decision
from bigmix.data.share_rules import Reading, decide, rule_of
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe import Recipe
from bigmix.runs.metrics_log import Line
from bigmix.train.inputs import Inputs
from bigmix.train.setup import Parts, position_of


def progress(step: int, steps: int, decisions: Sequence[Decision]) -> float:
    """The part of a run of now `steps` steps that is done after `step`.

    From the last decision, which may have changed the number of steps, it grows evenly to 1.
    """
    if not decisions:
        return step / steps
    last = decisions[-1]
    return last.progress + (1 - last.progress) * (step - last.step) / max(steps - last.step, 1)


class RuleFailed(BigmixError):
    """A controller's rule fails, or gives no share that is allowed; every rank raises it after the
    same step.
    """


def shares_from(inputs: Inputs, recipe: Recipe, step: int) -> Line:
    """What the line of an evaluation after a step says of the shares from there on; nothing where
    none moves.
    """
    if not recipe.controllers:
        return {}
    return {f"share/{name}": share for name, share in inputs.shares_of_step(step + 1).rows.items()}


def steer(parts: Parts, at_step: int, line: Line) -> Parts:
    """The same parts, with shares that are decided on the line of an evaluation; a collective.

    The same parts as they are where no decision is due. Raises RuleFailed on every rank where a
    rule fails.
    """
    if not _is_due(parts, at_step):
        return parts
    own = _shares(parts, at_step, line) if parts.cluster.world.is_first else None
    shares, *_ = parts.cluster.gather(own)
    if isinstance(shares, str):
        raise RuleFailed(shares)
    steered = _with_shares(parts, at_step, line, shares)
    parts.report.begin_interval()
    parts.report.follow(steered.inputs.plan.epochs)
    return steered


def _is_due(parts: Parts, at_step: int) -> bool:
    """Decisions fall on evaluations between steps; one that was taken before a resume stands."""
    is_between = 0 < at_step < parts.inputs.steps
    is_taken = bool(parts.decisions) and parts.decisions[-1].step >= at_step
    falls_here = is_between and at_step % parts.recipe.train.evaluate_every == 0
    return bool(parts.recipe.controllers) and falls_here and not is_taken


def _current(recipe: Recipe, decisions: Sequence[Decision]) -> dict[str, float]:
    decided = decisions[-1].shares if decisions else {}
    return {name: decided.get(name, c.start) for name, c in recipe.controllers.items()}


def _shares(parts: Parts, at_step: int, line: Line) -> dict[str, float] | str:
    """The share of each controller, or what went wrong."""
    try:
        return {
            name: decide(
                rule_of(controller, parts.recipe.looked_at(controller)),
                controller.controller,
                _reading(parts, name, at_step, line),
            )
            for name, controller in parts.recipe.controllers.items()
        }
    except BigmixError as error:
        return str(error)


def _reading(parts: Parts, name: str, at_step: int, line: Line) -> Reading:
    controller = parts.recipe.controllers[name]
    return Reading(
        name=name,
        step=at_step,
        steps=parts.inputs.steps,
        share=_current(parts.recipe, parts.decisions)[name],
        least=controller.least,
        most=controller.most,
        limit=controller.limit,
        shares=MappingProxyType(parts.inputs.shares_of_step(at_step).rows),
        losses=MappingProxyType(parts.report.interval_losses()),
        held_out=MappingProxyType(_numbers(line, "held_out_loss")),
        forgetting=MappingProxyType(_numbers(line, "forgetting")),
        earlier=tuple(map(_read_only, parts.decisions)),
    )


def _read_only(decision: Decision) -> Decision:
    return replace(
        decision,
        shares=MappingProxyType(decision.shares),
        forgetting=MappingProxyType(decision.forgetting),
    )


def _numbers(line: Line, key: str) -> dict[str, float]:
    """The numbers KEY/NAME of a line by name; those that are not finite are left out, as
    metrics.jsonl has them.
    """
    found = {k.removeprefix(f"{key}/"): v for k, v in line.items() if k.startswith(f"{key}/")}
    return {name: v for name, v in found.items() if isinstance(v, float) and math.isfinite(v)}


def _with_shares(parts: Parts, at_step: int, line: Line, shares: Mapping[str, float]) -> Parts:
    """The parts from a decision on; where the sources do not allow it, the shares stay, and it is
    told.
    """
    before = _current(parts.recipe, parts.decisions)
    decision = Decision(
        step=at_step,
        progress=progress(at_step, parts.inputs.steps, parts.decisions),
        shares=shares,
        forgetting=_numbers(line, "forgetting"),
    )
    decided = replace(parts, decisions=(*parts.decisions, decision))
    try:
        inputs = parts.inputs.decided(parts.recipe, position_of(decided, at_step))
    except BadInput as error:
        parts.terminal.warning(f"after step {at_step} shares stay as they are: {error}")
        return replace(parts, decisions=(*parts.decisions, replace(decision, shares=before)))
    for note in inputs.notes:
        if note not in parts.inputs.notes:
            parts.terminal.note(note)
    moves = ", ".join(f"{n} {before[n]:.2%} -> {share:.2%}" for n, share in shares.items())
    parts.terminal.note(f"after step {at_step}: {moves} of the rows; {inputs.steps:,} steps in all")
    return replace(decided, inputs=inputs)
