"""Plans a run from a recipe and its opened sources: the rows, the number of steps and the shares.

Shares that follow from the sizes of sources become numbers, a budget becomes a number of steps, and
limits of epochs are kept, or the recipe is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np
import numpy.typing as npt

from bigmix.data.mixture import Mixture
from bigmix.data.records import RecipeSegment
from bigmix.data.run_plan import FIRST_SEGMENT, RunPlan, SequenceLengthStage
from bigmix.data.shares import (
    Shares,
    apportion,
    by_temperature,
    levels_of_unimax,
    recipe_loss_shares,
    recipe_shares,
    unimax,
)
from bigmix.errors import BadInput
from bigmix.recipe import Recipe
from bigmix.types import Floats

_SHARES_TRIED = 20
_STEPS_TRIED = 20


def mix(
    recipe: Recipe, stages: Sequence[SequenceLengthStage], segment: RecipeSegment = FIRST_SEGMENT
) -> RunPlan:
    """The plan of a run, or of the rest of it from the beginning of a segment on.

    Raises BadInput with every fault: shares of which none is left, a budget that is never reached,
    a source that would be used for more epochs than its limit.
    """
    sizes = _sizes(recipe, stages, segment)
    shares = recipe_shares(recipe, sizes, segment.shares)
    loss_shares = recipe_loss_shares(recipe, sizes, segment.shares)
    shares, loss_shares = shares.later(segment.after), loss_shares.later(segment.after)
    faults = [
        *_empty_steps("share", shares, segment),
        *_empty_steps("loss_share", loss_shares, segment),
    ]
    if faults:
        raise BadInput(*faults)
    return _within_epochs(recipe, stages, shares, loss_shares, segment)


def _sizes(
    recipe: Recipe, stages: Sequence[SequenceLengthStage], segment: RecipeSegment
) -> dict[str, float]:
    """The shares that follow from the sizes of sources.

    What UniMax gives depends on the rows of the run, which depend on it where the budget is in
    tokens: beginning with even shares, the two are found in turn.
    """
    tokens = {name: stream.manifest.tokens for name, stream in stages[-1].streams.items()}
    sizes = by_temperature(recipe, tokens)
    levels = list(levels_of_unimax(recipe))
    sizes |= {name: 1.0 for epochs in levels for name in epochs}
    if not levels:
        return sizes
    seen: list[int] = []
    budgets: list[_RowBudget] = []
    for _ in range(_STEPS_TRIED):
        shares = recipe_shares(recipe, sizes, segment.shares).later(segment.after)
        seen.append(count_steps(recipe, stages, shares, segment))
        # Where the same numbers of steps come again and again, the largest keeps all limits.
        steps = max(seen) if seen[-1] in seen[:-1] else seen[-1]
        budgets = [_row_budget(recipe, stages, shares, segment, epochs, steps) for epochs in levels]
        given = [unimax(budget.capacities, budget.num_rows) for budget in budgets]
        found = {name: float(rows) for level in given for name, rows in level.items()}
        if found.items() <= sizes.items():
            break
        sizes |= found
    faults = [fault for budget in budgets for fault in _too_small(budget)]
    if faults:
        raise BadInput(*faults)
    return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowBudget:
    """How many rows some sources have together from the beginning of a segment on, and how many
    each of them can give within its epochs.
    """

    num_rows: int
    capacities: Mapping[str, int]


def _row_budget(
    recipe: Recipe,
    stages: Sequence[SequenceLengthStage],
    shares: Shares,
    segment: RecipeSegment,
    epochs: Mapping[str, float],
    steps: int,
) -> _RowBudget:
    after = segment.after
    table = shares.table(np.arange(max(steps - after, 1)))
    together = sum((table[name] for name in epochs), np.zeros(max(steps - after, 1)))
    firsts = [stage.first_step - 1 - after for stage in stages]
    rows = [recipe.rows_per_step * part.sum() for part in np.split(together, firsts[1:])]
    capacities = {}
    for name, limit in epochs.items():
        per_epoch = [stage.streams[name].rows_per_epoch for stage in stages]
        left = limit - segment.rows.get(name, 0) / per_epoch[0]
        # The epochs of this source if it gave all the rows.
        alone = sum(n / of for n, of in zip(rows, per_epoch, strict=True))
        # Where rows change their length, a source goes on at the next whole row.
        capacities[name] = max(0, floor(left * sum(rows) / alone + 1e-6) - len(stages) + 1)
    return _RowBudget(num_rows=ceil(sum(rows) - 1e-6), capacities=capacities)


def _too_small(budget: _RowBudget) -> Iterator[str]:
    most = sum(budget.capacities.values())
    if most < budget.num_rows:
        names = ", ".join(f"sources.{name}.share" for name in budget.capacities)
        yield (
            f"{names}: unimax lets these sources give {most:,} rows together, and the run needs"
            f" {budget.num_rows:,}; raise unimax in the same ratio or more, lower the budget, or"
            " give other sources a larger share"
        )


def _empty_steps(kind: str, shares: Shares, segment: RecipeSegment) -> Iterator[str]:
    empty = _first_empty(shares)
    if empty is not None:
        yield (
            f"{kind} of every source is 0 at step {segment.after + empty}; at each step one must be"
            " above 0, move a point or add a constant share"
        )


def _first_empty(shares: Shares) -> int | None:
    """The first step in which no source has a share."""
    table = shares.table(np.arange(shares.last_change + 1))
    empty = np.flatnonzero(sum(table.values()) == 0)
    return int(empty[0]) if len(empty) else None


def _within_epochs(
    recipe: Recipe,
    stages: Sequence[SequenceLengthStage],
    shares: Shares,
    loss_shares: Shares,
    segment: RecipeSegment,
) -> RunPlan:
    """Apply the limits of epochs in the order in which they are reached: the recipe is refused, the
    run ends there, or the source is left out from there on.

    Shares count from the beginning of the segment, steps from that of the run.
    """
    after = segment.after
    while True:
        steps = count_steps(recipe, stages, shares, segment)
        plan = _plan(recipe, stages, shares, loss_shares, segment, steps)
        ends = {
            n: end for n in recipe.sources if (end := _last_step(recipe, plan, n, steps)) < steps
        }
        notes = [
            _left_out(recipe, name, after + end)
            for name, end in shares.ends.items()
            if after + end < steps
        ]
        if not ends:
            return plan.ending(steps, notes)
        # Of limits at the same step a stop comes first: no other source then goes beyond its own.
        first = min(ends, key=lambda n: (ends[n], recipe.sources[n].when_exhausted != "stop"))
        end, source = ends[first], recipe.sources[first]
        if source.when_exhausted == "error":
            raise BadInput(*_refused(recipe, plan, ends, steps))
        if source.when_exhausted == "stop":
            _check_not_empty(end - after, first)
            notes.append(
                f"the run ends after {end:,} steps and not {steps:,}: {first} has then reached its"
                f" max_epochs = {source.max_epochs:g}"
            )
            return plan.ending(end, notes)
        if first in shares.ends:
            # The mixture still owes it part of a row, and gives it that row when several sources
            # have left: it leaves a row earlier.
            earlier = _last_step(recipe, plan, first, steps, spare_rows=1)
            end = min(earlier, after + shares.ends[first] - 1)
        _check_not_empty(end - after, first)
        shares = replace(shares, ends={**shares.ends, first: end - after})
        loss_shares = replace(loss_shares, ends=shares.ends)
        faults = [
            *_nothing_left("share", shares, steps, after),
            *_nothing_left("loss_share", loss_shares, steps, after),
        ]
        if faults:
            raise BadInput(faults[0])


def _left_out(recipe: Recipe, name: str, end: int) -> str:
    return (
        f"from step {end + 1:,} on {name} is left out and its share given to the others: it has"
        f" then reached its max_epochs = {recipe.sources[name].max_epochs:g}"
    )


def _nothing_left(kind: str, shares: Shares, steps: int, after: int) -> Iterator[str]:
    """The fault that no source has a share from a step on because sources have left.

    The step may be after the end of the run: the mixture gives rows away in blocks.
    """
    empty = _first_empty(shares)
    if empty is None:
        return
    gone = ", ".join(shares.ends)
    if len(shares.ends) == len(shares.names):
        yield (
            f"every source ({gone}) has reached its max_epochs after {after + empty:,} of {steps:,}"
            " steps; raise a max_epochs, lower the budget, or set when_exhausted: stop"
        )
    else:
        yield (
            f"{kind} of every source is 0 at step {after + empty:,}, since {gone} has reached its"
            " max_epochs; raise it, set when_exhausted: stop, or move a point of the others"
        )


def _check_not_empty(end: int, name: str) -> None:
    if end == 0:
        raise BadInput(
            f"sources.{name}.max_epochs is used up within the first step; raise it, or lower"
            " rows_per_step or the share"
        )


def _last_step(recipe: Recipe, plan: RunPlan, name: str, steps: int, *, spare_rows: int = 0) -> int:
    """The last step after which a source is within its limit less `spare_rows`, at most `steps`."""
    limit = recipe.sources[name].max_epochs
    if limit is None or _epochs(plan, name, steps, spare_rows) <= limit:
        return steps
    within, beyond = plan.segment.after, steps
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if _epochs(plan, name, middle, spare_rows) <= limit:
            within = middle
        else:
            beyond = middle
    return within


def _epochs(plan: RunPlan, name: str, step: int, more_rows: int) -> float:
    return plan.epochs(step)[name] + more_rows / plan.streams_at(step)[name].rows_per_epoch


def _refused(recipe: Recipe, plan: RunPlan, ends: Mapping[str, int], steps: int) -> Iterator[str]:
    """A fault for every source that goes beyond its limit before another one stops the run, and
    must not.
    """
    stops = [end for n, end in ends.items() if recipe.sources[n].when_exhausted == "stop"]
    for name, end in ends.items():
        if recipe.sources[name].when_exhausted == "error" and end < min([*stops, steps]):
            yield _too_many(recipe, plan, name, steps)


def _too_many(recipe: Recipe, plan: RunPlan, name: str, steps: int) -> str:
    source = recipe.sources[name]
    needed, limit = plan.epochs(steps)[name], source.max_epochs
    assert limit is not None
    fewer = _smaller_share(recipe, plan, name, limit / needed)
    return (
        f"sources.{name}.max_epochs is {limit:g} and the run goes through it {needed:.4g} times in"
        f" {steps:,} steps; set sources.{name}.max_epochs to"
        f" {ceil(needed * 100) / 100:.15g}{fewer}, lower the budget, or choose when_exhausted: stop"
        " or renormalise"
    )


def _smaller_share(recipe: Recipe, plan: RunPlan, name: str, factor: float) -> str:
    """The advice to set the share that draws `factor` times the rows while the other shares stay;
    empty where one of them is not a number.
    """
    source = recipe.sources[name]
    others = [s.share for n, s in recipe.sources.items() if n != name and s.group == source.group]
    others += [g.share for g in recipe.groups.values() if g.group == source.group]
    numbers = [share for share in others if isinstance(share, float)]
    if not isinstance(source.share, float) or len(numbers) < len(others) or not numbers:
        return ""
    part = source.share / (source.share + sum(numbers)) * factor
    # A prefix is within one row of the share, and the steps of a budget change with the share: only
    # a share that was tried is advised.
    guess, fits, too_many = part * sum(numbers) / (1 - part), 0.0, source.share
    for _ in range(_SHARES_TRIED):
        share = float(f"{guess:.2e}")
        if _fits(recipe, plan, name, share):
            fits = max(fits, share)
        else:
            too_many = min(too_many, share)
        guess = (fits + too_many) / 2 if fits else share * 0.9
    return f", or sources.{name}.share to {fits:.3g} or less" if fits else ""


def _fits(recipe: Recipe, plan: RunPlan, name: str, share: float) -> bool:
    """Whether a source stays within its limit with this share."""
    sources = dict(recipe.sources)
    sources[name] = sources[name].model_copy(update={"share": share})
    changed = recipe.model_copy(update={"sources": sources})
    limit, stages = sources[name].max_epochs, plan.stages
    assert limit is not None
    segment, ends = plan.segment, plan.mixture.shares.ends
    shares = recipe_shares(changed, _sizes(changed, stages, segment), segment.shares).later(
        segment.after
    )
    shares = replace(shares, ends=ends)
    steps = count_steps(changed, stages, shares, segment)
    fitting = _plan(changed, stages, shares, shares, segment, steps)
    return fitting.epochs(steps)[name] <= limit


def _plan(
    recipe: Recipe,
    stages: Sequence[SequenceLengthStage],
    shares: Shares,
    loss_shares: Shares,
    segment: RecipeSegment,
    steps: int,
) -> RunPlan:
    return RunPlan(
        mixture=Mixture(shares, recipe.rows_per_step, _whole_rows(recipe, shares, segment)),
        stages=stages,
        seed=recipe.seed,
        steps=steps,
        loss_shares=loss_shares,
        segment=segment,
    )


def _whole_rows(recipe: Recipe, shares: Shares, segment: RecipeSegment) -> dict[str, int] | None:
    """The number of rows of each source until the next decision, where shares were decided and are
    constant until then; else None.

    What a source is owed is counted in, so that a small share is met over many decisions.
    """
    if not segment.shares or shares.last_change:
        return None
    every = recipe.evaluate.every
    rows = recipe.rows_per_step * (every - segment.after % every)
    due = {name: share * rows + segment.owed.get(name, 0.0) for name, share in shares.at(0).items()}
    return apportion(due, rows)


def count_steps(
    recipe: Recipe,
    stages: Sequence[SequenceLengthStage],
    shares: Shares,
    segment: RecipeSegment = FIRST_SEGMENT,
) -> int:
    """The optimizer steps of the run that the budget allows, from the mean tokens of a row of each
    source.

    What was trained before the segment counts, for the sources that the recipe names. Raises
    BadInput where the shares end at 0 before a budget in tokens is reached.
    """
    budget = recipe.budget
    fixed = recipe.train.steps or budget.steps
    if fixed is not None:
        return fixed
    goal = budget.task_tokens or budget.total_tokens
    assert goal is not None
    names = recipe.task_names if budget.task_tokens else tuple(recipe.sources)
    after = segment.after
    goal -= sum(segment.tokens.get(name, 0) for name in names)
    if goal <= 0:
        return after
    last = max(shares.last_change, stages[-1].first_step - 1 - after)
    gains = _gains(recipe.rows_per_step, stages, shares, names, np.arange(last + 1), after)
    reached = np.cumsum(gains[:-1])
    at = int(np.searchsorted(reached, goal))
    if at < len(reached):
        return after + at + 1
    left = goal - (float(reached[-1]) if len(reached) else 0.0)
    if gains[-1] == 0:
        raise BadInput(
            f"budget.task_tokens is {goal:,} and {float(reached[-1]):,.0f} can be reached: the"
            f" shares of {', '.join(names)} end at 0 after step {after + last:,}; raise their last"
            " point or max_epochs, or use budget.steps"
        )
    return after + last + ceil(left / float(gains[-1]))


def _gains(
    rows_per_step: int,
    stages: Sequence[SequenceLengthStage],
    shares: Shares,
    names: Sequence[str],
    steps: npt.NDArray[np.int64],
    after: int,
) -> Floats:
    """The tokens of the named sources that are expected in each step [K]; `steps` are counted from
    the step after the first `after` ones of the run.
    """
    table = shares.table(steps)
    firsts = [stage.first_step for stage in stages]
    stage_of = np.searchsorted(firsts, after + steps + 1, side="right") - 1
    gains = np.zeros(len(steps))
    for name in names:
        streams = [stage.streams[name] for stage in stages]
        row_tokens = np.array([s.tokens_per_epoch / s.rows_per_epoch for s in streams])
        gains += rows_per_step * table[name] * row_tokens[stage_of]
    return gains
