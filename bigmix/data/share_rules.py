"""The rules by which controllers decide shares after an evaluation: our own, or the user's."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bigmix.data.records import Decision
from bigmix.errors import BadInput, BigmixError
from bigmix.recipe.shares import FORGETTING, Controller

SHARE_DIGITS = 6
# Of the share at one decision. It must rise at once, since what is forgotten is learned again
# slowly, and may fall slowly.
_MOST_DOUBLINGS, _MOST_HALVINGS = 2.0, 1.0
_FEW_DOUBLINGS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerInput:
    """What a rule decides a share on, after `step` of `steps`.

    `share` is the present one, as a fraction of its group or of the run; it must stay between
    `least` and `most`. By source: `shares`, fractions of the run's rows, and `losses`, the training
    loss since the decision before, where a token was trained. By held-out set: `held_out`, its
    loss, and `forgetting`, that loss minus the one at step 0; losses are in nats per token.
    `earlier` are the decisions so far, oldest first, with the shares of all controllers.
    """

    name: str
    step: int
    steps: int
    share: float
    least: float
    most: float
    limit: float | None
    shares: Mapping[str, float]
    losses: Mapping[str, float]
    held_out: Mapping[str, float]
    forgetting: Mapping[str, float]
    earlier: Sequence[Decision]


Rule = Callable[[ControllerInput], float]


def rule_of(controller: Controller, watched_sets: Sequence[str]) -> Rule:
    """The rule of a controller that looks at these held-out sets.

    Raises BadInput where it is a rule of the user that cannot be imported.
    """
    if controller.controller == FORGETTING:
        return partial(hold_forgetting, controller, watched_sets)
    place, _, name = controller.controller.rpartition(":")
    try:
        rule = getattr(_module(place), name, None)
    # The user's module may raise anything while it is imported.
    except Exception as error:
        raise BadInput(
            f"controller {controller.controller}: {place} cannot be imported"
            f" ({type(error).__name__}: {error}); give the path of a Python file that exists, or"
            " the dotted name of a module that is installed"
        ) from error
    if not callable(rule):
        raise BadInput(
            f"controller {controller.controller}: {place} has no function {name}; define it, or"
            " name another one"
        )
    return rule  # type: ignore[no-any-return]


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(f"bigmix_rule_{Path(place).stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look the module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def decide(rule: Rule, rule_name: str, reading: ControllerInput) -> float:
    """The share that a rule gives, to six digits; `rule_name` is its name in the recipe.

    Raises BigmixError where the rule fails, gives no number within the bounds, or gives another one
    when it is called again.
    """
    first, second = _called(rule, rule_name, reading), _called(rule, rule_name, reading)
    if first != second:
        raise BigmixError(
            f"{rule_name} gives {first} for the share of {reading.name} after step {reading.step},"
            f" and {second} when it is called again; a rule must depend on what it is given alone,"
            " keep no state and draw nothing at random"
        )
    if not reading.least <= first <= reading.most:
        raise BigmixError(
            f"{rule_name} gives {first} for the share of {reading.name} after step {reading.step},"
            f" must be between least = {reading.least:g} and most = {reading.most:g}; change the"
            " rule or the bounds, the same command goes on"
        )
    return min(max(round(first, SHARE_DIGITS), reading.least), reading.most)


def _called(rule: Rule, rule_name: str, reading: ControllerInput) -> float:
    try:
        share = rule(reading)
    # The user's function may raise anything.
    except Exception as error:
        raise BigmixError(
            f"{rule_name} failed on the share of {reading.name} after step {reading.step}:"
            f" {type(error).__name__}: {error}"
        ) from error
    if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share):
        raise BigmixError(
            f"{rule_name} gives {share!r} for the share of {reading.name} after step"
            f" {reading.step}, must be a finite number; change the rule, the same command goes on"
        )
    return float(share)


def hold_forgetting(
    controller: Controller, watched_sets: Sequence[str], reading: ControllerInput
) -> float:
    """The share that keeps forgetting at or under the limit, by a power law in the forgetting that
    is expected at the next evaluation.

    Forgetting falls with the share p about as forgetting(p) = forgetting(0) (1 + B p)^-alpha, so
    that to change it by a factor f, p must change by about f^(-1/alpha). `gain` is in the place of
    1/alpha. It is smaller, since a step that is too small is corrected by the next one, and one
    that is too large overshoots.
    """
    assert controller.limit is not None, "a recipe without it is refused"
    now = _judged(controller, watched_sets, reading.forgetting)
    before = reading.earlier[-1].forgetting if reading.earlier else dict.fromkeys(watched_sets, 0.0)
    last = _judged(controller, watched_sets, before)
    if now is None:
        return reading.share
    aim = controller.aim * controller.limit
    # Of 0 or less there is no ratio to the aim.
    expected = max(_expected(now, now if last is None else last), aim * 2.0**-_FEW_DOUBLINGS)
    doublings = controller.gain * math.log2(expected / aim)
    share = reading.share * 2 ** min(max(doublings, -_MOST_HALVINGS), _MOST_DOUBLINGS)
    return min(max(share, reading.least), reading.most)


def _expected(now: float, last: float) -> float:
    """Forgetting at the next evaluation: it answers late, and is still moving.

    A straight line where it rises. Where it falls it does so more and more slowly, by the same
    factor again: a straight line would be below 0 after one good step.
    """
    return now * now / last if 0 < now < last else now + (now - last)


def _judged(
    controller: Controller, watched_sets: Sequence[str], forgetting: Mapping[str, float]
) -> float | None:
    """The worst or the mean forgetting of the sets; None where the loss of one was not finite."""
    found = [forgetting[name] for name in watched_sets if name in forgetting]
    if len(found) < len(watched_sets):
        return None
    return max(found) if controller.judge == "worst" else sum(found) / len(found)
