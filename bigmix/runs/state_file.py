"""The file of one rank's weights and optimizer moments, written and read back.

The file is in the format of safetensors. Its tensors `I.weights`, `I.exp_avg` and `I.exp_avg_sq`
(and `I.average`, where an average of the weights is kept) are the flat tensors of group I as ZeRO
keeps them. The metadata list which elements of which parameter lie where in them, so that any
number of ranks can read the elements that they need.
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
_PATTERN = "state-*.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterPiece:
    """Elements [start, start + count) of a parameter, which begin at `offset` in a flat tensor."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatState:
    """A flat tensor of fp32 weights [N] with its moments [N], and what lies where in them.

    Elements that no piece covers are padding. `step` is how many steps Adam has taken. `average`
    [N] is the average of the weights over the steps, where one is kept.
    """

    pieces: tuple[ParameterPiece, ...]
    weights: Tensor
    moments: Mapping[str, Tensor]
    step: int
    average: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights, the moments, and the average if there is one, by name."""
        kept = {} if self.average is None else {AVERAGE: self.average}
        return {WEIGHTS: self.weights, **self.moments, **kept}


def file_of_rank(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"state-{rank:05d}.safetensors"


def tensors_of(flats: Iterable[FlatState]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and the metadata that describe them."""
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
    """Write fp32 tensors from host memory, sync them to the disk, and read the file to verify it.

    Raises OSError where the file cannot be written or does not read back as it was written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [begin, end]}
        begin = end
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for part in _parts(header_bytes, tensors.values()):
            digest.update(part)
            _write_all(file, part)
        os.fsync(file.fileno())
    entry = CheckpointFile(name=path.name, bytes=path.stat().st_size, checksum=digest.hexdigest())
    if checksum_of(path) != entry.checksum:
        raise OSError(None, f"{path} does not read back as it was written")
    return entry


def _parts(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        view = tensor.contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(view), 16 * CHUNK):
            yield view[start : start + 16 * CHUNK]


def _write_all(file: Any, part: bytes | memoryview) -> None:
    """Write all of `part`; an unbuffered write may take less than it is given."""
    rest = memoryview(part)
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True, kw_only=True, slots=True)
class _StoredPiece:
    """A piece of a parameter, and the file and group that hold it."""

    file: int
    group: int
    piece: ParameterPiece


class StateReader:
    """Reads any elements of any parameter from a checkpoint, whatever number of ranks wrote it.

    The files are mapped into memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = sorted(folder.glob(_PATTERN))
        self._files: list[Any] = [safe_open(path, framework="pt") for path in paths]
        names = (file.keys() for file in self._files)
        self._has_average = any(f"0.{AVERAGE}" in own for own in names)
        self._stored: dict[str, list[_StoredPiece]] = defaultdict(list)
        self._steps: dict[str, int] = {}
        for number, file in enumerate(self._files):
            for index, group in enumerate(json.loads(file.metadata()["groups"])):
                self._add(number, index, group)

    def _add(self, number: int, index: int, group: Mapping[str, Any]) -> None:
        for name, start, count, offset in group["pieces"]:
            piece = ParameterPiece(name=name, start=start, count=count, offset=offset)
            self._stored[name].append(_StoredPiece(file=number, group=index, piece=piece))
            self._steps[name] = group["step"]

    def fill(self, flat: FlatState) -> int:
        """Read all elements of the pieces of a flat state, weights and moments, into its tensors.

        Returns how many steps Adam has taken. An average that the checkpoint does not have begins
        at the weights. Raises BigmixError where the checkpoint does not hold all of the elements.
        """
        for piece in flat.pieces:
            parts = self._parts_of(piece)
            for stored, begin, end, offset in parts:
                self._copy(flat, stored, begin, end, offset)
            found = sum(end - begin for _, begin, end, _ in parts)
            if found != piece.count:
                raise BigmixError(
                    f"{self._folder} holds {found} of the {piece.count} elements [{piece.start},"
                    f" {piece.start + piece.count}) of {piece.name}; it is of another model, give"
                    " another output"
                )
        steps = {self._steps[piece.name] for piece in flat.pieces}
        return max(steps, default=0)

    def _parts_of(self, piece: ParameterPiece) -> Sequence[tuple[_StoredPiece, int, int, int]]:
        """The stored pieces that hold elements of a piece.

        With each the range [begin, end) of these elements in its flat tensor, and the offset in the
        flat tensor of `piece` that they go to.
        """
        found = []
        for stored in self._stored[piece.name]:
            begin = max(piece.start, stored.piece.start)
            end = min(piece.start + piece.count, stored.piece.start + stored.piece.count)
            if begin < end:
                shift = stored.piece.offset - stored.piece.start
                offset = piece.offset + begin - piece.start
                found.append((stored, begin + shift, end + shift, offset))
        return found

    def _copy(
        self, flat: FlatState, stored: _StoredPiece, begin: int, end: int, offset: int
    ) -> None:
        file = self._files[stored.file]
        for key, target in flat.tensors.items():
            found = WEIGHTS if key == AVERAGE and not self._has_average else key
            part: Tensor = file.get_slice(f"{stored.group}.{found}")[begin:end]
            target[offset : offset + end - begin].copy_(part)
