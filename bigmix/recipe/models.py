"""The settings of a run as one tree of frozen models; what follows from settings is a property,
never written back.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bigmix.recipe.fields import (
    AtResume,
    BeforeFirstStep,
    Count,
    CountOrZero,
    Name,
    PathOrUrl,
    Rows,
    Settings,
)
from bigmix.recipe.sections import (
    Behaviour,
    Budget,
    Cache,
    Checkpoint,
    Evaluate,
    FurtherHeldOut,
    Group,
    HealthSettings,
    Length,
    Loss,
    ModelSettings,
    Reference,
    Source,
    Sweep,
    Train,
    behaviour_table,
)
from bigmix.recipe.shares import (
    BEHAVIOUR,
    Controller,
    faults_of_controller,
    faults_side_by_side,
)
from bigmix.recipe.task import Task


class Recipe(Settings):
    """A run: what is trained, on what, and how."""

    model: Annotated[ModelSettings, AtResume.FIXED]
    sequence_length: Annotated[Length, Rows.MOVE, BeforeFirstStep.IGNORED]
    """Tokens of a row; a number, or [step, tokens] pairs for rows whose length changes at these
    steps.
    """
    rows_per_step: Annotated[Count, Rows.MOVE, BeforeFirstStep.IGNORED]
    """Rows of one optimizer step, over all ranks and micro-batches."""
    objective: Annotated[Literal["per_source", "per_token"], BeforeFirstStep.IGNORED] = "per_source"
    """per_source: a source's share is its weight in the gradient; per_token: the classic weighted
    mean over tokens.
    """
    loss: Loss = Loss()
    """Terms of the objective besides the loss of the tokens."""
    reference: Annotated[Reference | None, BeforeFirstStep.IGNORED] = None
    """A frozen model that the run stays close to."""
    sources: Annotated[dict[Name, Source], Field(min_length=1), BeforeFirstStep.IGNORED]
    """The streams that are mixed, by name."""
    groups: Annotated[dict[Name, Group], BeforeFirstStep.IGNORED] = Field(default={})
    """Groups of sources, by name."""
    pad_to_multiple: Annotated[Count, AtResume.FREE] = 1
    """Rows are padded to a multiple of this number of tokens, for backends that need it."""
    cache: Annotated[Cache, AtResume.FREE, BeforeFirstStep.IGNORED] = Cache()
    bad_shards: Annotated[Literal["fail", "replace"], AtResume.FREE, BeforeFirstStep.IGNORED] = (
        "fail"
    )
    """What happens when a shard cannot be read. fail: the run ends and names it; replace: from then
    on rows of its source's other shards are trained in place of its own, counted as
    substituted_rows.
    """
    tasks: Annotated[dict[Name, Task], AtResume.FREE] = Field(default={})
    """Tasks that evaluations measure, by name."""
    held_out: Annotated[dict[Name, FurtherHeldOut], BeforeFirstStep.IGNORED] = Field(default={})
    """Further prepared folders, by name, that are evaluated and never trained on; forgetting is
    measured on them too. A path, or a table of path, long_documents and whole_below, which decide
    the rows as in a source.
    """
    budget: Annotated[Budget, BeforeFirstStep.IGNORED] = Budget()
    train: Train
    evaluate: Evaluate = Evaluate()
    """When the model is evaluated, and what is measured."""
    behaviour: Annotated[
        Behaviour, BeforeValidator(behaviour_table), AtResume.FREE_WITHOUT_CONTROLLERS
    ] = Behaviour()
    """Whether and how the answers of a chat model to general prompts are measured."""
    checkpoint: Annotated[Checkpoint, AtResume.FREE, BeforeFirstStep.IGNORED] = Checkpoint()
    """When the run is saved, stopped and exported."""
    health: Annotated[HealthSettings, BeforeFirstStep.IGNORED] = HealthSettings()
    """What counts as a fault of the run, and what is done about it."""
    deepspeed: Annotated[PathOrUrl, AtResume.FREE] = "ds_configs/zero3.json"
    """File with DeepSpeed's own keys; what follows from this recipe is filled in."""
    output: Annotated[PathOrUrl, AtResume.FREE, BeforeFirstStep.IGNORED]
    """Folder of the run."""
    seed: Annotated[CountOrZero, Field(lt=2**62), AtResume.FIXED] = 0
    """Decides the order of the data and the weights of a model from scratch."""
    sweep: Annotated[Sweep | None, BeforeFirstStep.IGNORED] = None
    """Several runs in place of one, see docs/sweep.md; each is a folder in `output`."""

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        faults = [
            *self._budget_faults(),
            *self._source_faults(),
            *self._group_faults(),
            *self._controller_faults(),
            *self._length_faults(),
            *self._weigh_faults(),
            *self._reference_faults(),
            *self._evaluation_faults(),
            *self._behaviour_faults(),
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _budget_faults(self) -> list[str]:
        given = [name for name, value in self.budget if value is not None]
        if len(given) > 1:
            return [f"budget has {' and '.join(given)}; keep one of them, set the others to null"]
        if not given and self.train.steps is None:
            return [
                "budget is empty; give task_tokens, total_tokens or steps, such as"
                " budget.steps=1000"
            ]
        if given == ["task_tokens"] and not self.task_names:
            return [
                "budget.task_tokens counts tokens of task sources, and no source has role: task; "
                "give one that role, or use total_tokens or steps"
            ]
        return []

    def _source_faults(self) -> list[str]:
        both = [n for n, s in self.sources.items() if s.held_out is not None and n in self.held_out]
        return [
            f"held_out.{name} and sources.{name}.held_out are both given; keep one of them"
            for name in both
        ]

    def _group_faults(self) -> Iterator[str]:
        known = ", ".join(self.groups) or "none"
        members = [(f"sources.{name}", source.group) for name, source in self.sources.items()]
        members += [(f"groups.{name}", group.group) for name, group in self.groups.items()]
        for key, group in members:
            if group is not None and group not in self.groups:
                yield (
                    f"{key}.group is {group}, which is no group; known are: {known}; add"
                    f" groups.{group}"
                )
        for name in self.groups:
            if name in self.sources:
                yield f"groups.{name} has the name of a source; rename one of them"
            if self._outside(name).count(name) > 1:
                yield f"groups.{name} is inside itself; change its group"
            elif not any(name in self._outside(s.group) for s in self.sources.values()):
                yield (
                    f"groups.{name} has no source in it; delete it, or set group: {name} in a"
                    " source"
                )

    def _outside(self, group: str | None) -> list[str]:
        """A group and the groups around it; a group inside itself is listed twice at most."""
        found: list[str] = []
        while group in self.groups and found.count(group) < 2:
            found.append(group)
            group = self.groups[group].group
        return found

    def _controller_faults(self) -> Iterator[str]:
        for level in (None, *self.groups):
            yield from faults_side_by_side(level, self._shares_in(level))
        for name, controller in self.controllers.items():
            table = "sources" if name in self.sources else "groups"
            yield from faults_of_controller(
                f"{table}.{name}.share",
                controller,
                evaluate_every=self.evaluate.every,
                held_out=self.measured_sets,
                watched_sets=self.watched_sets(controller),
                tasks=[n for n in self.task_names if self._is_in(n, name)],
            )

    def _shares_in(self, level: str | None) -> dict[str, Any]:
        """The shares of the members of a group, or of those outside of groups, by their keys."""
        members: dict[str, Source | Group] = {f"sources.{n}": s for n, s in self.sources.items()}
        members |= {f"groups.{n}": group for n, group in self.groups.items()}
        return {f"{key}.share": m.share for key, m in members.items() if m.group == level}

    def _is_in(self, source: str, member: str) -> bool:
        """Whether a source is the one with a name, or inside of the group with that name."""
        return member == source or member in self._outside(self.sources[source].group)

    def _weigh_faults(self) -> Iterator[str]:
        for name, source in self.sources.items():
            if self.objective == "per_token" and source.weigh != "token":
                yield (
                    f"sources.{name}.weigh is {source.weigh}, and objective per_token counts every"
                    " token alike; set objective=per_source, or weigh: token"
                )

    def _length_faults(self) -> Iterator[str]:
        if isinstance(self.sequence_length, tuple):
            steps = [step for step, _ in self.sequence_length]
            if steps[0] != 0 or any(later <= earlier for earlier, later in pairwise(steps)):
                yield (
                    f"sequence_length has steps {steps}; the first must be 0 and they must grow"
                    " from pair to pair"
                )

    def _reference_faults(self) -> Iterator[str]:
        if self.reference is None:
            return
        for name in self.reference.sources:
            if name not in self.sources:
                yield f"reference.sources.{name} is no source; known are: {', '.join(self.sources)}"
        if self.reference_path is None:
            yield (
                "reference.model is not given, and a model from scratch has no model.path to stay"
                " near to; give reference.model, or delete reference"
            )

    def _evaluation_faults(self) -> Iterator[str]:
        if self.evaluate.kl and self.model.path is None:
            yield (
                "evaluate.kl is true, and a model from scratch has no model.path to measure a"
                " divergence to; set evaluate.kl=false, or give model.path"
            )

    def _behaviour_faults(self) -> Iterator[str]:
        for table in ("sources", "held_out", "tasks"):
            if BEHAVIOUR in getattr(self, table):
                yield (
                    f"{table}.{BEHAVIOUR} has the name of the base's answers to general prompts,"
                    " on which forgetting is measured too; give it another name"
                )
        if self.model.path is None and self.behaviour.when in ("every", "ends"):
            yield (
                f"behaviour.when is {self.behaviour.when}, and a model from scratch has no"
                " behaviour to keep; set behaviour=auto, or give model.path"
            )

    @property
    def reference_path(self) -> str | None:
        """Where the frozen model is."""
        given = self.reference.model if self.reference is not None else None
        return given or self.model.path

    @property
    def has_own_base(self) -> bool:
        """Whether evaluations need a frozen model that is not the reference: the model as it is
        before training.
        """
        is_reference = self.reference is not None and self.reference_path == self.model.path
        return self.evaluate.kl and not is_reference

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """The step after which rows have a length, and the length, for each length of the run."""
        length = self.sequence_length
        return length if isinstance(length, tuple) else ((0, length),)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, padding to a multiple counted."""
        return self.padded(max(length for _, length in self.lengths))

    def padded(self, length: int) -> int:
        """Tokens of a row of a length with the padding to a multiple."""
        return -(-length // self.pad_to_multiple) * self.pad_to_multiple

    @property
    def controllers(self) -> dict[str, Controller]:
        """The controllers of shares, by source or group."""
        members: dict[str, Source | Group] = {**self.sources, **self.groups}
        return {n: m.share for n, m in members.items() if isinstance(m.share, Controller)}

    def watched_sets(self, controller: Controller) -> tuple[str, ...]:
        """The held-out sets that a controller judges by."""
        replay = (n for n, s in self.sources.items() if s.role == "replay" and s.held_out)
        return controller.held_out or tuple(replay)

    @property
    def measured_sets(self) -> tuple[str, ...]:
        """The held-out sets whose forgetting a controller can look at after each evaluation; those
        of behaviour are the answers of the base.
        """
        is_measured = self.behaviour.when in ("auto", "every") and self.model.path is not None
        return (*self.held_out_paths, *([BEHAVIOUR] if is_measured else []))

    @property
    def chat_tokenizer(self) -> str | None:
        """The tokenizer of the model before training, a folder or a hub name; None from scratch."""
        return None if self.model.path is None else self.model.tokenizer or self.model.path

    @property
    def behaviour_watchers(self) -> tuple[str, ...]:
        """The sources and groups whose controllers look at behaviour."""
        return tuple(n for n, c in self.controllers.items() if BEHAVIOUR in self.watched_sets(c))

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the sources that the model is to learn."""
        return tuple(name for name, source in self.sources.items() if source.role == "task")

    @property
    def held_out_paths(self) -> dict[str, str]:
        """Every folder that is evaluated, by name: of the sources, then the further ones."""
        own = {n: s.held_out for n, s in self.sources.items() if s.held_out is not None}
        return own | {n: h if isinstance(h, str) else h.path for n, h in self.held_out.items()}
