"""What one rank holds of weights and moments goes in, a file of it comes out; and any elements of
any parameter, read back.

The file is in the format of safetensors: tensors `I.weights`, `I.exp_avg` and `I.exp_avg_sq` (and
`I.average`, where an average of the weights is kept) are the flat tensors of group I as ZeRO keeps
them; the metadata say which elements of which parameter lie where in them, so that ranks of any
number can read what they need.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from bigmix.errors import BigmixError
from bigmix.files import CHUNK, checksum_of
from bigmix.runs.checkpoints import CheckpointFile

MOMENTS = ("exp_avg", "exp_avg_sq")


WEIGHTS, AVERAGE = "weights", "average"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterPiece:
    """Elements [start, start + count) of a parameter, which lie from `offset` on in a flat
    tensor.
    """

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatState:
    """A flat tensor of fp32 weights [N] with its moments [N], the steps that Adam has taken, and
    what lies where.

    Elements that no piece covers are padding. `average` [N] is that of the weights over the steps,
    where one is kept.
    """

    pieces: tuple[ParameterPiece, ...]
    weights: Tensor
    moments: Mapping[str, Tensor]
    step: int
    average: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        kept = {} if self.average is None else {AVERAGE: self.average}
        return {WEIGHTS: self.weights, **self.moments, **kept}


_PATTERN = "state-*.safetensors"


def file_of_rank(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"state-{rank:05d}.safetensors"


def tensors_of(flats: Iterable[FlatState]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata."""
    tensors: dict[str, Tensor] = {}
    groups = []
    for index, flat in enumerate(flats):
        tensors |= {f"{index}.{key}": tensor for key, tensor in flat.tensors.items()}
        pieces = [[p.name, p.start, p.count, p.offset] for p in flat.pieces]
        groups.append({"step": flat.step, "pieces": pieces})
    return tensors, {"groups": json.dumps(groups)}


def write_state(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> CheckpointFile:
    """Write fp32 tensors in host memory, see them on the disk, and read them back.

    Raises OSError where the disk takes or gives back something else.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        end = at + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for part in _parts(head, tensors.values()):
            digest.update(part)
            _write_all(file, part)
        os.fsync(file.fileno())
    sealed = CheckpointFile(name=path.name, bytes=path.stat().st_size, checksum=digest.hexdigest())
    if checksum_of(path) != sealed.checksum:
        raise OSError(None, f"{path} does not read back as it was written")
    return sealed


def _parts(head: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(head).to_bytes(8, "little") + head
    for tensor in tensors:
        view = tensor.contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(view), 16 * CHUNK):
            yield view[start : start + 16 * CHUNK]


def _write_all(file: Any, part: bytes | memoryview) -> None:
    """An unbuffered write may take less than it is given."""
    rest = memoryview(part)
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a piece of a parameter lies: in which file, under which group."""

    file: int
    group: int
    piece: ParameterPiece


class StateReader:
    """The files of all ranks of a checkpoint, mapped into memory, as one place to read parameters
    from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = sorted(folder.glob(_PATTERN))
        self._files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        names = (file.keys() for file in self._files)
        self._has_average = any(f"0.{AVERAGE}" in own for own in names)
        self._places: dict[str, list[_Place]] = defaultdict(list)
        self._steps: dict[str, int] = {}
        for number, file in enumerate(self._files):
            for index, group in enumerate(json.loads(file.metadata()["groups"])):
                self._add(number, index, group)

    def _add(self, number: int, index: int, group: Mapping[str, Any]) -> None:
        for name, start, count, offset in group["pieces"]:
            piece = ParameterPiece(name=name, start=start, count=count, offset=offset)
            self._places[name].append(_Place(file=number, group=index, piece=piece))
            self._steps[name] = group["step"]

    def fill(self, flat: FlatState) -> int:
        """Write the elements of every piece of a flat tensor, weights and moments; returns the
        steps that Adam has taken.

        An average that the checkpoint has not begins at the weights.

        Raises BigmixError where the checkpoint does not hold all of them.
        """
        for piece in flat.pieces:
            parts = self._parts_of(piece)
            for place, begin, end, at in parts:
                self._copy(flat, place, begin, end, at)
            found = sum(end - begin for _, begin, end, _ in parts)
            if found != piece.count:
                raise BigmixError(
                    f"{self._folder} holds {found} of the {piece.count} elements [{piece.start},"
                    f" {piece.start + piece.count}) of {piece.name}; it is of another model, give"
                    " another output"
                )
        steps = {self._steps[piece.name] for piece in flat.pieces}
        return max(steps, default=0)

    def _parts_of(self, piece: ParameterPiece) -> Sequence[tuple[_Place, int, int, int]]:
        """The places that hold elements of a piece: of each the range of elements there, and where
        it goes in the flat tensor.
        """
        found = []
        for place in self._places[piece.name]:
            begin = max(piece.start, place.piece.start)
            end = min(piece.start + piece.count, place.piece.start + place.piece.count)
            if begin < end:
                shift = place.piece.offset - place.piece.start
                at = piece.offset + begin - piece.start
                found.append((place, begin + shift, end + shift, at))
        return found

    def _copy(self, flat: FlatState, place: _Place, begin: int, end: int, at: int) -> None:
        file = self._files[place.file]
        for key, target in flat.tensors.items():
            found = WEIGHTS if key == AVERAGE and not self._has_average else key
            part: Tensor = file.get_slice(f"{place.group}.{found}")[begin:end]
            target[at : at + end - begin].copy_(part)
