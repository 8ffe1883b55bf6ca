"""An engine goes in, a Hugging Face folder that transformers loads comes out."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from bigmix.cluster.collectives import Cluster
from bigmix.model.engine import Engine
from bigmix.weight_files import WHOLE, name_shards

_LAYER = re.compile(r".*?\.\d+\.")
_ONE_FILE = 1 << 62  # transformers is given what goes into one file


def export(
    engine: Engine,
    cluster: Cluster,
    tokenizer_folder: Path,
    folder: Path,
    *,
    shard_bytes: int,
    texts: Mapping[str, str],
    doing: Callable[[str], None],
) -> None:
    """Write weights, configuration, tokenizer and `texts` by file name to `folder`, beside first and then in one step.

    A collective. The first rank holds the weights of one file, of at most `shard_bytes` or one layer, at a time. `doing`
    is told what begins.
    """
    beside = folder.with_name(f".tmp-{folder.name}")
    if cluster.world.is_first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    disable_progress_bar()  # in a log its states run together
    files = list(_files(engine.sizes(), shard_bytes))
    parts = [beside / f"part-{number:05d}.safetensors" for number in range(len(files))]
    with engine.averaged():
        for number, (names, part) in enumerate(zip(files, parts, strict=True), 1):
            doing(f"writing {folder}, file {number} of {len(files)}")
            _write(engine, cluster, names, part)
    if cluster.world.is_first:
        name_shards(beside, parts)
        if tokenizer_folder.is_dir():
            shutil.copytree(tokenizer_folder, beside, dirs_exist_ok=True)
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    cluster.barrier()


def _write(engine: Engine, cluster: Cluster, names: Sequence[str], part: Path) -> None:
    """Write some of the weights to a file and the configuration beside it; a collective.

    transformers writes it: it knows the names, and for some models the shapes, that its files have.
    """
    state = engine.whole(names)
    if not cluster.world.is_first:
        return
    lm = engine.module.lm
    lm.config.use_cache = True
    own = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
    lm.save_pretrained(part.parent, state_dict=own, max_shard_size=_ONE_FILE)
    (part.parent / WHOLE).rename(part)
    lm.config.use_cache = False


def _files(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[Sequence[str]]:
    """The names of the weights of each file; a layer is in one file: transformers may cut and join weights within it."""
    names: list[str] = []
    held = 0
    for layer in _layers(list(sizes)):
        size = sum(sizes[name] for name in layer)
        if names and held + size > shard_bytes:
            yield names
            names, held = [], 0
        names += layer
        held += size
    yield names


def _layers(names: Sequence[str]) -> Sequence[list[str]]:
    """`model.layers.3.mlp.up.weight` is of the layer `model.layers.3.`; what is in none stands for itself."""
    layers: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        layers.setdefault(found.group() if found else name, []).append(name)
    return list(layers.values())
