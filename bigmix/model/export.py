"""Writes models as Hugging Face folders, and reads the weights of such folders tensor by tensor.

One file is `model.safetensors`; several are `model-IIIII-of-NNNNN.safetensors` with
`model.safetensors.index.json`, which names the file of each tensor. Neither writing nor reading
holds a whole model in memory.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bigmix.cluster.collectives import Cluster
from bigmix.errors import BadInput
from bigmix.model.engine import Engine

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_METADATA = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a tensor is, known without reading its values; dtype as safetensors writes it, such as
    BF16.
    """

    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """The weights in the folder of a model, mapped into memory: only tensors that are requested are
    read.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files; raises BadInput where one of them is missing."""
        self.folder = folder
        self._files: dict[str, Any] = {}  # by the name of each tensor in them
        with ExitStack() as stack:
            for path in _paths(folder):
                file = stack.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(file.keys(), file)
            self._stack = stack.pop_all()

    @property
    def names(self) -> Sequence[str]:
        """The name of every tensor, file by file."""
        return tuple(self._files)

    def describe(self, name: str) -> Described:
        """The dtype and shape of a tensor."""
        found = self._files[name].get_slice(name)
        return Described(dtype=found.get_dtype(), shape=tuple(found.get_shape()))

    def read(self, name: str) -> Tensor:
        """The values of a tensor, as they are stored."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def _paths(folder: Path) -> Sequence[Path]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
    else:
        paths = [folder / WHOLE]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BadInput(
            f"{folder} has no {', '.join(missing)}; give the folder of a model with its weights in"
            " safetensors files"
        )
    return paths


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    """Write the files of a model, each of at most `max_bytes` unless one tensor is larger.

    The tensors of one file at a time are in memory.
    """
    parts = []
    for number, group in enumerate(_groups(tensors, max_bytes)):
        part = folder / f"part-{number:05d}.safetensors"
        save_file(group, part, metadata=_METADATA)
        parts.append(part)
    name_shards(folder, parts)


def _groups(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file, in their order.

    huggingface_hub's split_torch_state_dict_into_shards needs all tensors at the same time, and
    gives a large one a file before those that come earlier.
    """
    group: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if group and held + tensor.nbytes > max_bytes:
            yield group
            group, held = {}, 0
        group[name] = tensor.contiguous()
        held += tensor.nbytes
    yield group


def name_shards(folder: Path, parts: Sequence[Path]) -> None:
    """Give the files of a model in a folder the names that loaders look for, and write the index
    where there are several.

    transformers may have renamed the tensors of a file, so their names are read from its header.
    """
    if len(parts) == 1:
        parts[0].rename(folder / WHOLE)
        return
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = parse_local_safetensors_file_metadata(part).tensors
        places |= dict.fromkeys(tensors, name)
        total += sum(end - start for start, end in (t.data_offsets for t in tensors.values()))
        part.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


_LAYER = re.compile(r".*?\.\d+\.")
_ONE_FILE = 1 << 62  # bytes; transformers only gets the weights of one file at a time


def export(
    engine: Engine,
    cluster: Cluster,
    tokenizer_folder: Path,
    folder: Path,
    *,
    shard_bytes: int,
    texts: Mapping[str, str],
    on_activity: Callable[[str], None],
) -> None:
    """Write weights, configuration, tokenizer and `texts`, by file name, to `folder`; a collective.

    Everything is written to a temporary folder, which is then renamed. The first rank holds the
    weights of one file at a time, of at most `shard_bytes` or one layer. `on_activity` is called
    with what begins.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    if cluster.world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    disable_progress_bar()  # its updates would fill one line of a log
    files = list(_files(engine.sizes(), shard_bytes))
    parts = [temporary / f"part-{number:05d}.safetensors" for number in range(len(files))]
    with engine.averaged():
        for number, (names, part) in enumerate(zip(files, parts, strict=True), 1):
            on_activity(f"writing {folder}, file {number} of {len(files)}")
            _write(engine, cluster, names, part)
    if cluster.world.is_first:
        name_shards(temporary, parts)
        if tokenizer_folder.is_dir():
            shutil.copytree(tokenizer_folder, temporary, dirs_exist_ok=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    cluster.barrier()


def _write(engine: Engine, cluster: Cluster, names: Sequence[str], part: Path) -> None:
    """Write some of the weights to a file, and the configuration to its folder; a collective.

    transformers writes them: it knows the names, and for some models the shapes, of its files.
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
    """The names of the weights of each file.

    A layer is never split between files: transformers may cut and join weights within one.
    """
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
    """The names by layer: `model.layers.3.mlp.up.weight` belongs to `model.layers.3.`; a weight
    outside of all layers is a layer of its own.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        layers.setdefault(found.group() if found else name, []).append(name)
    return list(layers.values())
