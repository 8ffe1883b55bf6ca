"""Opens and checks everything that a recipe names before anything is trained.

Nothing here imports torch, so that a fault is reported within a second.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bigmix.data.planning import mix
from bigmix.data.quarantine import BadShard
from bigmix.data.recipe_sources import (
    OpenedSources,
    ahead_of,
    collect,
    faults_of_empty,
    held_out_streams,
    open_sources,
    open_streams,
    read_options_of,
    retry_of,
    tokenizer_faults,
)
from bigmix.data.records import RecipeSegment
from bigmix.data.run_plan import RunPlan, SequenceLengthStage, same_fraction, stages_from
from bigmix.data.shards.manifest import Manifest
from bigmix.data.share_rules import rule_of
from bigmix.data.source import PreparedSource, ShardStore, bytes_in_use
from bigmix.data.stream import Stream
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.inputs import (
    BehaviourInputs,
    has_chat_template,
    open_behaviour,
)
from bigmix.evaluation.tasks.examples import TaskFile, open_tasks
from bigmix.model.ds_config import complete_for_training, read_ds_config
from bigmix.recipe import Recipe, SweepRun, plain
from bigmix.recipe.marks import matters_before_first_step
from bigmix.recipe.schedule import warmup_steps
from bigmix.recipe.shares import unmeasured_behaviour
from bigmix.recipe.tree import leaves
from bigmix.runs.checkpoints import Position

# Only texts with `whole_below` open their shards to count rows, and without their number the order
# of rows is unknown.
_HOW_TO_COUNT = (
    "with whole_below its rows cannot be counted without it, nor replaced; or name the other shards"
    " in the path with a brace pattern, or set whole_below=0"
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What a recipe names, opened and checked: its sources, held-out sets, tasks, prompts and
    DeepSpeed's keys.

    `behaviour` is None where it is not measured. `plan` is that of a run that begins at its first
    step. `content` is a checksum of the shards of each source.
    """

    plan: RunPlan
    held_out: Mapping[str, Stream]
    tasks: Mapping[str, TaskFile]
    behaviour: BehaviourInputs | None
    notes: Sequence[str]
    ds_keys: Mapping[str, Any]
    sources: Mapping[str, PreparedSource]
    content: Mapping[str, str]
    shard_store: ShardStore
    replaces_bad_shards: bool

    @property
    def has_evaluation(self) -> bool:
        """Whether evaluations have anything to ask of the model."""
        return bool(self.held_out or self.tasks or self.behaviour)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the sources' tokenizer, fetched where all sources are remote; absent where
        they have none.

        Of those that are as near, that of a source whose chats are rendered with the tokenizer's
        own template.
        """

        def distance(source: PreparedSource) -> tuple[bool, bool]:
            template = source.manifest.template
            return not source.location.is_local, template is None or template.name != "tokenizer"

        nearest = min(self.sources.values(), key=distance)
        return self.shard_store.tokenizer_folder(nearest)

    @property
    def manifests(self) -> Sequence[Manifest]:
        """Those of all sources and held-out sets."""
        held_out = (stream.manifest for stream in self.held_out.values())
        return [*(source.manifest for source in self.sources.values()), *held_out]

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first source; all agree about the tokenizer."""
        return next(iter(self.plan.streams.values())).manifest

    def resumed_plan(self, recipe: Recipe, position: Position, *, new_segment: bool) -> RunPlan:
        """The plan from a checkpoint on; `new_segment`: from there on rows are drawn as this recipe
        says and not as before.

        A source whose rows have another length, or are packed otherwise, goes on at the same
        fraction of its epoch; a new one begins. Raises BadInput where the recipe leaves nothing to
        train from there.
        """
        segment = self._segment(recipe, position) if new_segment else position.data.segment
        return self._plan(recipe, position, segment)

    def decided_plan(self, recipe: Recipe, plan: RunPlan, position: Position) -> RunPlan:
        """The plan after a decision of controllers, which is the last one of the position; `plan`
        is the one until there.

        Raises BadInput where its shares leave nothing to train, or need more of a source than its
        `max_epochs`.
        """
        owed = plan.owed(position.step)
        return self._plan(recipe, position, replace(self._segment(recipe, position), owed=owed))

    def _segment(self, recipe: Recipe, position: Position) -> RecipeSegment:
        """The segment that begins at a position."""
        streams = stages_from(self.plan.stages, position.step)[0].streams
        decided = position.decisions[-1].shares if position.decisions else {}
        return RecipeSegment(
            after=position.step,
            rows={
                name: same_fraction(old.row, old.of, streams[name].rows_per_epoch)
                for name, old in position.data.sources.items()
                if name in self.sources
            },
            tokens=position.trained_tokens,
            shares={name: share for name, share in decided.items() if name in recipe.controllers},
        )

    def _plan(self, recipe: Recipe, position: Position, segment: RecipeSegment) -> RunPlan:
        plan = mix(recipe, stages_from(self.plan.stages, segment.after), segment)
        return plan.with_quarantine(position.data.quarantine)

    def around_bad_shards(
        self, step: int, work: Callable[[RunPlan], T]
    ) -> tuple[T, Sequence[BadShard]]:
        """What `work` gives, with rows of shards that it finds bad replaced from a step on; and
        which these are.

        Raises BadShard where the recipe has such a run fail.
        """
        plan, found = self.plan, list[BadShard]()
        while True:
            try:
                return work(plan), found
            except BadShard as bad:
                quarantine, new = plan.quarantine.extended([bad], step)
                if not (self.replaces_bad_shards and new):
                    raise
                plan = plan.with_quarantine(quarantine)
                found.append(bad)


def open_inputs(recipe: Recipe, *, ranks: int, verify: bool, machines: int = 1) -> RunInputs:
    """Open and check what a recipe names; `verify` also reads the first GiB of each local source
    through.

    Raises BadInput with every fault that is found.
    """
    faults: list[str] = [*_row_faults(recipe, ranks)]
    for controller in recipe.controllers.values():
        collect(faults, rule_of, controller, recipe.watched_sets(controller))
    ds_keys = collect(faults, _ds_keys, recipe, ranks)
    tasks = collect(faults, open_tasks, recipe.tasks)
    behaviour = collect(faults, _behaviour, recipe)
    shard_store = ShardStore(read_options_of(recipe, machines))
    opened = _opened_sources(recipe, verify=verify)
    sources = opened.sources
    faults += [*opened.faults, *tokenizer_faults(sources)]
    if faults:
        raise BadInput(*faults)
    stages = _stages(recipe, shard_store, sources)
    held_out = held_out_streams(recipe, shard_store, sources)
    everything = [*(s for stage in stages for s in stage.streams.values()), *held_out.values()]
    faults += dict.fromkeys(fault for stream in everything for fault in faults_of_empty(stream))
    if faults:
        raise BadInput(*faults)
    assert ds_keys is not None
    plan = mix(recipe, stages)
    own = {name: sources[source.path] for name, source in recipe.sources.items()}
    return RunInputs(
        plan=plan,
        held_out=held_out,
        tasks=tasks,
        behaviour=behaviour,
        notes=[
            *opened.notes,
            *_behaviour_notes(behaviour),
            *missing_replay(recipe, _kinds(plan)),
            *moving_shares(recipe),
            *_warm_up(recipe, plan.steps),
            *plan.notes,
            *_cache_notes(recipe, shard_store, sources.values()),
        ],
        ds_keys=ds_keys,
        sources=own,
        content={name: source.content for name, source in own.items()},
        shard_store=shard_store,
        replaces_bad_shards=recipe.bad_shards == "replace",
    )


def _opened_sources(recipe: Recipe, *, verify: bool) -> OpenedSources:
    """The sources and held-out sets of a recipe."""
    paths = {f"sources.{name}.path": source.path for name, source in recipe.sources.items()}
    replaceable = list(paths) if recipe.bad_shards == "replace" else []
    paths |= {f"held_out of {name}": path for name, path in recipe.held_out_paths.items()}
    return open_sources(paths, retry_of(recipe), verify=verify, replaceable=replaceable)


def _behaviour(recipe: Recipe) -> BehaviourInputs | None:
    """The behaviour probe; raises BadInput also where controllers would look at it in vain."""
    found = open_behaviour(recipe.behaviour, recipe.chat_tokenizer)
    watching = recipe.behaviour_watchers
    if found is None and watching:
        tables = {n: "sources" if n in recipe.sources else "groups" for n in watching}
        raise BadInput(*(unmeasured_behaviour(f"{tables[n]}.{n}.share") for n in watching))
    return found


def _behaviour_notes(behaviour: BehaviourInputs | None) -> Iterator[str]:
    if behaviour is not None:
        settings = behaviour.settings
        when = "at both ends" if settings.when == "ends" else "in every evaluation"
        yield (
            f"behaviour: the model answers {len(behaviour.prompts)} prompts {when}, with at most"
            f" {settings.max_new_tokens} tokens each; behaviour=off leaves them out"
        )


def moving_shares(recipe: Recipe) -> Iterator[str]:
    """What to know of each share that a controller decides on, before the run has begun."""
    for name, controller in recipe.controllers.items():
        yield (
            f"the share of {name} begins at {controller.start:g} and moves between"
            f" {controller.least:g} and {controller.most:g}: {controller.controller} decides after"
            f" every {recipe.evaluate.every} steps; what is shown before the run supposes that"
            " it stays"
        )


def _kinds(plan: RunPlan) -> dict[str, str]:
    """The kind of each source that has a row in the run."""
    counts = plan.counts(plan.steps)
    return {name: s.manifest.kind for name, s in plan.streams.items() if counts[name]}


def missing_replay(recipe: Recipe, kinds: Mapping[str, str]) -> Iterator[str]:
    """What a model may forget since nothing like it is replayed, and what to type against it.

    `kinds` are those of the trained sources. A chat model forgets how it answers where no chats are
    replayed; a base model that is trained on chats alone forgets its texts.
    """
    path = recipe.model.path
    if path is None or not kinds:
        return
    replayed = {kind for name, kind in kinds.items() if recipe.sources[name].role == "replay"}
    if has_chat_template(recipe.model.tokenizer or path):
        if "chat" not in replayed:
            yield (
                f"{path} is a chat model and no source of chats is replayed, so it may forget how"
                f" it answers; {_self_replay(path, 'chat')}"
            )
    elif set(kinds.values()) == {"chat"}:
        yield (
            f"{path} is trained on chats alone and no source of texts is replayed, so it may forget"
            f" what it learned from texts; {_self_replay(path, 'text')}"
        )


def _self_replay(path: str, kind: str) -> str:
    """What to type for a replay source of this kind."""
    output = f"data/replay-{kind}"
    return (
        f"to replay its own {'answers' if kind == 'chat' else 'texts'}, run `bigmix self-replay"
        f" {shlex.quote(path)} --kind {kind} --tokens 2M --output {output}` and add to sources:"
        f" `replay-{kind}: {{path: {output}, role: replay, share: 0.1}}`"
    )


def _warm_up(recipe: Recipe, steps: int) -> Iterator[str]:
    rising = warmup_steps(recipe.train.warmup, steps)
    if rising >= steps > 1:
        yield (
            f"train.warmup is {rising:,} steps and the run has {steps:,}: it ends while the"
            " learning rate still rises; set train.warmup=0.03, or another fraction of the steps"
        )


def _cache_notes(
    recipe: Recipe, shard_store: ShardStore, sources: Iterable[PreparedSource]
) -> Iterator[str]:
    fetched = [source for source in sources if shard_store.is_fetched(source)]
    room = bytes_in_use(fetched, ahead_of(recipe)) if fetched else 0
    if room > recipe.cache.size:
        yield (
            f"cache.size is {recipe.cache.size:,} bytes, and up to {room:,} bytes of shards may be"
            f" in use at once; the run ends where they do not fit: set cache.size={room} or more,"
            " or fewer cache.ahead_files"
        )


def _stages(
    recipe: Recipe, shard_store: ShardStore, sources: Mapping[str, PreparedSource]
) -> Sequence[SequenceLengthStage]:
    """The streams of the sources for each length of rows."""
    paths = {name: source.path for name, source in recipe.sources.items()}
    try:
        return [
            SequenceLengthStage(
                first_step=after + 1,
                streams=open_streams(recipe, shard_store, sources, paths, length),
            )
            for after, length in recipe.lengths
        ]
    except BadShard as bad:
        raise BadInput(f"sources.{bad.source}: {bad.reason}; {_HOW_TO_COUNT}") from bad


def _row_faults(recipe: Recipe, ranks: int) -> Iterator[str]:
    micro_batch = recipe.train.micro_batch_rows
    if recipe.rows_per_step % (ranks * micro_batch):
        unit = ranks * micro_batch
        near = max(unit, round(recipe.rows_per_step / unit) * unit)
        yield (
            f"rows_per_step is {recipe.rows_per_step}, must be a multiple of ranks x"
            f" train.micro_batch_rows = {ranks} x {micro_batch} = {unit}; set rows_per_step={near},"
            " or change the ranks or the micro-batch"
        )


def _ds_keys(recipe: Recipe, ranks: int) -> Mapping[str, Any]:
    keys = read_ds_config(recipe.deepspeed)
    offload = keys.get("zero_optimization", {}).get("offload_optimizer") or {}
    if recipe.train.ema is not None and offload.get("device") == "nvme":
        raise BadInput(
            f"train.ema is {recipe.train.ema} and {recipe.deepspeed} keeps the optimizer on NVMe,"
            " where no average of the weights is kept; set train.ema=null, or offload the"
            " optimizer to the cpu"
        )
    if recipe.rows_per_step % (ranks * recipe.train.micro_batch_rows) == 0:
        complete_for_training(keys, recipe, ranks, keys_dtype(recipe, keys))
    return keys


def keys_dtype(recipe: Recipe, keys: Mapping[str, Any]) -> str:
    """The precision to hold the file against; where the recipe leaves it open, what the file
    says.
    """
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bf16" if keys.get("bf16", {}).get("enabled") is True else "fp32"


def open_each(
    runs: Sequence[SweepRun],
    look: Callable[[SweepRun, RunInputs], T],
    *,
    ranks: int,
    verify: bool,
    machines: int = 1,
) -> list[T]:
    """What `look` makes of each run and its inputs, which are let go before the next ones are
    opened.

    Raises BadInput with all faults of all runs, those of `look` too, each with the points that have
    it.
    """
    found: list[T] = []
    faults: dict[str, list[str]] = {}
    verified: set[str] = set()
    for run in runs:
        sources = [source.path for source in run.recipe.sources.values()]
        paths = {*sources, *run.recipe.held_out_paths.values()}
        # Shards that most runs share are read through once.
        is_new = verify and not paths <= verified
        try:
            inputs = open_inputs(run.recipe, ranks=ranks, verify=is_new, machines=machines)
            verified |= paths
            found.append(look(run, inputs))
        except BadInput as error:
            for fault in error.faults:
                faults.setdefault(fault, []).append(run.point)
    if faults:
        raise BadInput(
            *(
                f"point {', '.join(dict.fromkeys(points))}: {fault}"
                for fault, points in faults.items()
            )
        )
    return found


def baseline_cache_key(recipe: Recipe, inputs: RunInputs, ranks: int) -> str:
    """Two runs with the same text here find the same numbers before their first step, to the last
    bit.
    """
    settings = {k: v for k, v in leaves(plain(recipe)).items() if matters_before_first_step(k)}
    # It draws the weights of a model from scratch, and answers to tasks that are drawn.
    if recipe.model.path is not None and not any(t.temperature for t in recipe.tasks.values()):
        del settings["seed"]
    data = {
        name: [str(stream.packing), *(shard.sha256 for shard in stream.manifest.shards)]
        for name, stream in inputs.held_out.items()
    }
    # Tasks are prompted in the chat format of the sources.
    templates = {m.template.sha256 for m in inputs.manifests if m.template is not None}
    return json.dumps([settings, data, sorted(templates), ranks], sort_keys=True)
