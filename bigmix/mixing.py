"""A recipe and its opened sources go in; the plan of all rows, the number of steps and the shares of the gradient come out.

Here shares that follow from sizes become numbers, budgets become steps, and limits of epochs are held or refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from bigmix.data.loader import Plan, Stage
from bigmix.data.mixture import Mixture
from bigmix.data.shares import Member, Points, Share, Shares
from bigmix.errors import BadInput
from bigmix.recipe import Recipe
from bigmix.recipe.models import Temperature

SIZE_DIGITS = 6  # shares that follow from sizes are kept to one part in a million
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """What is drawn for how long: `notes` say in words where a limit of epochs changed the run."""

    plan: Plan
    steps: int
    loss_shares: Shares
    notes: Sequence[str] = ()


def mix(recipe: Recipe, stages: Sequence[Stage]) -> Mixing:
    """The plan of a run.

    Raises BadInput with every fault: shares that leave nothing, a budget that is never reached, a source that would
    be gone through more often than it may.
    """
    tokens = {name: stream.manifest.tokens for name, stream in stages[-1].streams.items()}
    shares = _shares(recipe, tokens, lambda member: member.share)
    loss_shares = _shares(recipe, tokens, lambda member: member.loss_share or member.share)
    faults = [*_empty_steps("share", shares), *_empty_steps("loss_share", loss_shares)]
    if faults:
        raise BadInput(*faults)
    return _within_epochs(recipe, stages, shares, loss_shares)


def _shares(recipe: Recipe, tokens: Mapping[str, int], share_of: Callable[..., Any]) -> Shares:
    sizes = _by_size(recipe, tokens)
    sources = {
        name: Member(share=_number(share_of(source), sizes.get(name)), group=source.group)
        for name, source in recipe.sources.items()
    }
    groups = {
        name: Member(share=_number(share_of(group), None), group=group.group)
        for name, group in recipe.groups.items()
    }
    return Shares(sources=sources, groups=groups)


def _number(share: float | Points | Temperature, by_size: float | None) -> Share:
    if isinstance(share, Temperature):
        assert by_size is not None
        return by_size
    return share


def _by_size(recipe: Recipe, tokens: Mapping[str, int]) -> dict[str, float]:
    """The shares of sources with a temperature: tokens to its power, as parts of their group."""
    powers = {
        name: float(tokens[name]) ** source.share.temperature
        for name, source in recipe.sources.items()
        if isinstance(source.share, Temperature)
    }
    total = sum(powers.values())
    least = 10.0**-SIZE_DIGITS
    return {name: max(round(power / total, SIZE_DIGITS), least) for name, power in powers.items()}


def _empty_steps(kind: str, shares: Shares) -> Iterator[str]:
    table = shares.table(np.arange(shares.last_change + 1))
    empty = np.flatnonzero(sum(table.values()) == 0)
    if len(empty):
        yield (
            f"{kind} of every source is 0 at step {empty[0]}; at each step one must be above 0, "
            "move a point or add a constant share"
        )


def _within_epochs(
    recipe: Recipe, stages: Sequence[Stage], shares: Shares, loss_shares: Shares
) -> Mixing:
    """Let sources that come to their limit leave, one after the other, until the rest lasts to the end."""
    notes: list[str] = []
    while True:
        plan = Plan(mixture=Mixture(shares, recipe.rows_per_step), stages=stages, seed=recipe.seed)
        steps = count_steps(recipe, stages, shares)
        ends = {
            n: end for n in recipe.sources if (end := _last_step(recipe, plan, n, steps)) < steps
        }
        refused = [n for n in ends if recipe.sources[n].when_exhausted == "error"]
        if refused:
            raise BadInput(*(_too_many(recipe, plan, name, steps) for name in refused))
        if not ends:
            return Mixing(plan=plan, steps=steps, loss_shares=loss_shares, notes=notes)
        first = min(ends, key=lambda name: ends[name])
        end, limit = ends[first], recipe.sources[first].max_epochs
        if recipe.sources[first].when_exhausted == "stop":
            notes.append(
                f"the run ends after {end:,} steps and not {steps:,}: {first} has then been gone through "
                f"max_epochs = {limit:g} times"
            )
            _check_not_empty(end, first)
            return Mixing(plan=plan, steps=end, loss_shares=loss_shares, notes=notes)
        notes.append(
            f"from step {end + 1:,} on {first} is left out and its share given to the others: it has then been gone "
            f"through max_epochs = {limit:g} times"
        )
        shares = replace(shares, ends={**shares.ends, first: end})
        loss_shares = replace(loss_shares, ends={**loss_shares.ends, first: end})
        _check_not_empty(end, first)
        if not any(shares.at(step)[n] for step in (end, shares.last_change) for n in shares.names):
            raise BadInput(
                f"every source has come to its max_epochs after {end:,} of {steps:,} steps; raise a max_epochs, lower the "
                "budget, or set when_exhausted: stop"
            )


def _check_not_empty(end: int, name: str) -> None:
    if end == 0:
        raise BadInput(
            f"sources.{name}.max_epochs is used up within the first step; raise it, or lower rows_per_step or the share"
        )


def _last_step(recipe: Recipe, plan: Plan, name: str, steps: int) -> int:
    """The last step after which a source is still within its limit, at most `steps`."""
    limit = recipe.sources[name].max_epochs
    if limit is None or plan.epochs(steps)[name] <= limit:
        return steps
    within, beyond = 0, steps
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if plan.epochs(middle)[name] <= limit:
            within = middle
        else:
            beyond = middle
    return within


def _too_many(recipe: Recipe, plan: Plan, name: str, steps: int) -> str:
    source = recipe.sources[name]
    needed, limit = plan.epochs(steps)[name], source.max_epochs
    assert limit is not None
    fewer = _smaller_share(recipe, name, limit / needed)
    return (
        f"sources.{name}.max_epochs is {limit:g} and the run goes through it {needed:.3g} times in {steps:,} steps; set "
        f"sources.{name}.max_epochs to {ceil(needed * 100) / 100:g}{fewer}, lower the budget, or choose when_exhausted: stop "
        "or renormalise"
    )


def _smaller_share(recipe: Recipe, name: str, factor: float) -> str:
    """The share that draws `factor` times the rows while the others keep theirs, in words; nothing where it moves."""
    source = recipe.sources[name]
    others = [s.share for n, s in recipe.sources.items() if n != name and s.group == source.group]
    others += [g.share for g in recipe.groups.values() if g.group == source.group]
    numbers = [share for share in others if isinstance(share, float)]
    if not isinstance(source.share, float) or len(numbers) < len(others) or not numbers:
        return ""
    part = source.share / (source.share + sum(numbers)) * factor
    share = part * sum(numbers) / (1 - part)
    return f", or sources.{name}.share to {share:.3g} or less"


def count_steps(recipe: Recipe, stages: Sequence[Stage], shares: Shares) -> int:
    """Optimizer steps that the budget allows, from the mean number of tokens in a row of each source."""
    budget = recipe.budget
    fixed = recipe.train.steps or budget.steps
    if fixed is not None:
        return fixed
    goal = budget.task_tokens or budget.total_tokens
    assert goal is not None
    names = recipe.task_names if budget.task_tokens else tuple(recipe.sources)
    last = max(shares.last_change, stages[-1].first_step - 1)
    gains = _gains(recipe.rows_per_step, stages, shares, names, np.arange(last + 1))
    reached = np.cumsum(gains[:-1])
    at = int(np.searchsorted(reached, goal))
    if at < len(reached):
        return at + 1
    left = goal - (float(reached[-1]) if len(reached) else 0.0)
    if gains[-1] == 0:
        raise BadInput(
            f"budget.task_tokens is {goal} and cannot be reached: the shares of {', '.join(names)} "
            "end at 0; raise their last point, or use budget.steps"
        )
    return last + ceil(left / float(gains[-1]))


def _gains(
    rows_per_step: int,
    stages: Sequence[Stage],
    shares: Shares,
    names: Sequence[str],
    steps: npt.NDArray[np.int64],
) -> _Floats:
    """Tokens of the named sources that each step is expected to bring."""
    table = shares.table(steps)
    stage_of = np.searchsorted([stage.first_step for stage in stages], steps + 1, side="right") - 1
    gains = np.zeros(len(steps))
    for name in names:
        streams = [stage.streams[name] for stage in stages]
        row_tokens = np.array([s.tokens_per_epoch / s.rows_per_epoch for s in streams])
        gains += rows_per_step * table[name] * row_tokens[stage_of]
    return gains
