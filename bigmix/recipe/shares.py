"""The ways to write a share, and the faults of shares next to each other."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from bigmix.recipe.fields import A_NUMBER, Name, NonNegative, Positive, SchedulePoint, Settings

FORGETTING = "forgetting"  # the controller that is built in
BEHAVIOUR = "behaviour"  # what the base's answers to general prompts are called among held-out sets
_OWN_RULE = re.compile(r"[^:]+:[A-Za-z_]\w*")


class Temperature(Settings):
    """A share that follows from the size of the source."""

    temperature: NonNegative
    """The share is the source's tokens to this power: 1 by size, 0 equal for all, between them
    small sources are raised.
    """


class UniMax(Settings):
    """Shares that are as even as the sizes of the sources allow."""

    unimax: Positive
    """Epochs of a source at most: the rows of the run are divided evenly, and what a small source
    cannot take goes to the others.
    """


class Controller(Settings):
    """A share, of a source or a group, that is decided after each held-out evaluation;
    docs/controller.md says how.
    """

    controller: str
    """forgetting: holds forgetting at or under `limit`; or a rule of your own, as
    path/to/rule.py:function or package.module:function.
    """
    limit: Positive | None = None
    """Forgetting that is held to, in nats per loss token; a rule of your own may do without."""
    start: Annotated[float, Field(gt=0, lt=1), A_NUMBER] = 0.25
    """Fraction of the rows until the first decision: of the run, or of the group that this is in;
    the others divide the rest.
    """
    least: Annotated[float, Field(ge=1e-6, lt=1), A_NUMBER] = 0.01
    """Smallest fraction that is decided on."""
    most: Annotated[float, Field(gt=0, lt=1), A_NUMBER] = 0.5
    """Largest fraction that is decided on."""
    held_out: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Held-out sets that are watched, and behaviour, which is the base's answers to general
    prompts; default: those of the replay sources.
    """
    judge: Literal["worst", "mean"] = "worst"
    """Which forgetting counts where several sets are watched."""
    aim: Annotated[float, Field(gt=0, le=1), A_NUMBER] = 0.8
    """Fraction of the limit that is aimed at; the rest allows for changes between two evaluations.
    """
    gain: Positive = 0.5
    """How strongly the share answers: it is multiplied by (expected forgetting / what is aimed at)
    to this power.
    """


def kind_of(value: Any) -> str:
    """Which of the ways to write a value is meant, so that its faults are reported and not those of
    the other ways.
    """
    if isinstance(value, list | tuple):
        return "<points>"
    for kind, table in (("controller", Controller), ("unimax", UniMax)):
        if isinstance(value, table) or (isinstance(value, dict) and kind in value):
            return f"<{kind}>"
    return "<table>" if isinstance(value, dict | Temperature) else "<number>"


_Number = Annotated[Positive, Tag("<number>")]
_Points = Annotated[tuple[SchedulePoint, ...], Field(min_length=1), Tag("<points>")]
Share = Annotated[_Number | _Points, Discriminator(kind_of)]
_Controlled = Annotated[Controller, Tag("<controller>")]
GroupShare = Annotated[_Number | _Points | _Controlled, Discriminator(kind_of)]
SourceShare = Annotated[
    _Number
    | _Points
    | _Controlled
    | Annotated[UniMax, Tag("<unimax>")]
    | Annotated[Temperature, Tag("<table>")],
    Discriminator(kind_of),
]


def fault_of_points(points: tuple[tuple[int, float], ...]) -> str | None:
    """What is wrong with the points of a schedule."""
    steps = [step for step, _ in points]
    if steps[0] != 0:
        return f"begins at step {steps[0]}; the first point must be at step 0"
    if any(later <= earlier for earlier, later in pairwise(steps)):
        return f"has steps {steps}; they must grow from point to point"
    if all(share == 0 for _, share in points):
        return "is 0 at every point; to leave the source out, delete it"
    return None


def faults_side_by_side(level: str | None, shares: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the shares, by key, that are side by side in a group or outside of
    groups.
    """
    where = f"in group {level}" if level else "outside of groups"
    controlled = {key: s.most for key, s in shares.items() if isinstance(s, Controller)}
    others = {key: share for key, share in shares.items() if key not in controlled}
    sized = {key: s for key, s in others.items() if isinstance(s, Temperature | UniMax)}
    if sized and (len(sized) < len(others) or len(set(map(repr, sized.values()))) > 1):
        yield (
            f"{', '.join(sized)}: a temperature and unimax compare the sizes of sources, so all"
            f" shares {where} ({', '.join(others)}) must have the same one; put these sources into"
            " a group of their own"
        )
    if controlled and not others:
        yield (
            f"{', '.join(controlled)}: all shares {where} have a controller; one must be a number"
            " or points and take the rest"
        )
    elif sum(controlled.values()) >= 1:
        yield (
            f"{', '.join(controlled)}: together they may reach {sum(controlled.values()):g} of"
            f" the rows {where}, must stay below 1; lower `most`"
        )


def unmeasured_behaviour(key: str) -> str:
    """What is wrong with a controller that looks at behaviour in a run that does not measure it."""
    return (
        f"{key}.held_out names {BEHAVIOUR}, which is not measured where shares are decided; give a"
        " chat model as model.path and set behaviour=every, or leave it out"
    )


def faults_of_controller(
    key: str,
    controller: Controller,
    *,
    evaluate_every: int,
    held_out: Sequence[str],
    watched_sets: Sequence[str],
    tasks: Sequence[str],
) -> Iterator[str]:
    """What is wrong with a controller in a run with these held-out sets; `tasks` are the task
    sources that it moves.
    """
    known = ", ".join(held_out) or "none"
    unknown = [name for name in watched_sets if name not in held_out]
    if not evaluate_every:
        yield (
            f"{key} has a controller, which decides after evaluations, and evaluate.every is"
            " 0; set evaluate.every=50, or another number of steps"
        )
    if BEHAVIOUR in unknown:
        yield unmeasured_behaviour(key)
        unknown.remove(BEHAVIOUR)
    if unknown:
        yield f"{key}.held_out names {', '.join(unknown)}; known held-out sets are: {known}"
    if not watched_sets:
        yield (
            f"{key} has a controller, and no replay source has a held-out set to look at; give one"
            f" of them held_out, or name others with {key}.held_out (known are: {known})"
        )
    if not controller.least <= controller.start <= controller.most:
        yield (
            f"{key} has least {controller.least:g}, start {controller.start:g} and most"
            f" {controller.most:g}; they must not fall in this order"
        )
    if controller.controller != FORGETTING:
        if not _OWN_RULE.fullmatch(controller.controller):
            yield (
                f"{key}.controller is {controller.controller}; it must be {FORGETTING}, or a rule"
                " of your own such as path/to/rule.py:function or package.module:function"
            )
        return
    if controller.limit is None:
        yield (
            f"{key}.limit is missing; give the forgetting to hold to in nats per token, such as"
            " limit: 0.02"
        )
    if tasks:
        yield (
            f"{key} is raised where the model forgets, and {', '.join(tasks)} is a task source; put"
            " the controller on replay sources, or on a group of them"
        )
