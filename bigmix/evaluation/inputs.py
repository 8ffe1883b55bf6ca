"""Opens and checks what an evaluation outside of a run needs of a recipe. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.data.recipe_sources import (
    collect,
    faults_of_empty,
    held_out_streams,
    open_sources,
    opened_source,
    read_options_of,
    retry_of,
    tokenizer_faults,
)
from bigmix.data.shards.manifest import Manifest
from bigmix.data.source import ShardStore
from bigmix.data.stream import Stream
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.inputs import BehaviourInputs, open_behaviour
from bigmix.evaluation.tasks.examples import TaskFile, open_tasks
from bigmix.model.ds_config import read_ds_config
from bigmix.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutInputs:
    """What a recipe names for an evaluation outside of a run, opened: its held-out streams, its
    tasks, the prompts of the behaviour probe and the keys for DeepSpeed.

    `behaviour` is None where it is not measured. `manifests` are those of the held-out sources,
    local ones first; `trained` those of the sources to train on, where the prompts of tasks depend
    on them.
    """

    streams: Mapping[str, Stream]
    tasks: Mapping[str, TaskFile]
    behaviour: BehaviourInputs | None
    ds_keys: Mapping[str, Any]
    manifests: Sequence[Manifest]
    trained: Sequence[Manifest]
    tokenizer_folder: Path


def open_held_out(
    recipe: Recipe, *, verify: bool, machines: int = 1, asked: str | None = None
) -> HeldOutInputs:
    """Open and check only the held-out sources, the tasks and the behaviour probe: the sources to
    train on need not be there.

    They are needed only where they decide whether the prompts of tasks are chats, which no held-out
    source has decided. `asked` is the model that is evaluated first, in whose chat template the
    prompts of the probe are; None: behaviour is not measured. `verify` also reads the first GiB of
    each local source through. Raises BadInput with every fault that is found.
    """
    paths, faults = recipe.held_out_paths, list[str]()
    if not paths:
        raise BadInput(
            "no held-out source is in the recipe; give a source its `held_out` folder, or name some"
            " under `held_out`; `bigmix probe behaviour` needs none"
        )
    is_base = asked == recipe.model.path
    tokenizer = recipe.chat_tokenizer if is_base else asked
    behaviour = collect(faults, open_behaviour, recipe.behaviour, tokenizer)
    ds_keys = collect(faults, read_ds_config, recipe.deepspeed)
    tasks = collect(faults, open_tasks, recipe.tasks)
    shard_store = ShardStore(read_options_of(recipe, machines))
    keys = {f"held_out of {name}": path for name, path in paths.items()}
    opened = open_sources(keys, retry_of(recipe), verify=verify)
    sources = opened.sources
    faults += opened.faults
    trained = _deciding(recipe, faults, [source.manifest for source in sources.values()])
    faults += tokenizer_faults(sources)
    if faults:
        raise BadInput(*faults)
    streams = held_out_streams(recipe, shard_store, sources)
    faults += dict.fromkeys(
        fault for stream in streams.values() for fault in faults_of_empty(stream)
    )
    if faults:
        raise BadInput(*faults)
    ordered = sorted(sources.values(), key=lambda source: not source.location.is_local)
    return HeldOutInputs(
        streams=streams,
        tasks=tasks,
        behaviour=behaviour,
        ds_keys=ds_keys,
        manifests=[source.manifest for source in ordered],
        trained=trained,
        tokenizer_folder=shard_store.tokenizer_folder(ordered[0]),
    )


def _deciding(
    recipe: Recipe, faults: list[str], held_out: Sequence[Manifest]
) -> Sequence[Manifest]:
    """The sources that decide whether the prompts of tasks are chats or text."""
    is_open = any(task.format == "auto" for task in recipe.tasks.values())
    if not is_open or any(manifest.template is not None for manifest in held_out):
        return ()
    missing: list[str] = []
    found = [
        collect(missing, opened_source, f"sources.{name}.path", source.path, retry_of(recipe))
        for name, source in recipe.sources.items()
    ]
    faults += [
        f"{fault}; it decides whether the prompts of tasks are chats: or set their format to chat"
        " or text"
        for fault in missing
    ]
    return [source.manifest for source in found if source is not None]
