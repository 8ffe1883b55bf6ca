"""Keeps the rows of a batch in one cache of keys and values, in which rows can be exchanged.

Letters: B rows of the batch, R rows that are read, T tokens, V vocabulary, C columns of the cache,
H heads, D dimensions of a head.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from bigmix.evaluation.tasks.inference_model import padded

_REFILLED = 8  # rows are refilled once one in so many is free
_READ_ROWS = 16  # prompts of one forward at most; they are sorted by length before
_ROOM = 128  # columns that are added to a full cache


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GenerationRequest:
    """A prompt, and how the tokens after it are chosen; `number` is the caller's.

    Token t is drawn with uniforms_T[t] from [0, 1), and there are at most as many tokens as
    numbers. `temperature` 0 takes the likeliest token.
    """

    number: int
    prompt: Sequence[int]
    uniforms_T: npt.NDArray[np.float64]
    temperature: float


NextRequest = Callable[[], GenerationRequest | None]  # None: there is none for now


@dataclass(kw_only=True, slots=True, eq=False)
class GrowingText:
    """A text that is being generated, whose row has been in use since column `begin`."""

    request: GenerationRequest
    begin: int
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The position of its last token, which the model has not read yet."""
        return len(self.request.prompt) + len(self.ids) - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowLogits:
    """The logits [R, V] of the next token of these rows."""

    rows: Sequence[int]
    logits_RV: Tensor


class BatchRows:
    """The rows of a batch in one cache.

    All rows write the same column of the cache at the same time, so a row that begins late has the
    columns before its prompt masked.
    """

    def __init__(self, lm: Any, num_rows: int) -> None:
        self._lm = lm
        self._num_rows = num_rows
        self._layers: list[_RoomyLayer] = []
        self._mask_BC = torch.zeros(num_rows, 0, dtype=torch.bool, device=lm.device)
        self._end = 0
        self.active: dict[int, GrowingText] = {}
        self.last_ids: dict[int, int] = {}

    @property
    def is_new(self) -> bool:
        """Whether nothing has been read yet."""
        return not self._layers

    def take(self, next_request: NextRequest) -> Mapping[int, GenerationRequest]:
        """Requests for free rows; none until enough of them are free to read prompts together."""
        free = [row for row in range(self._num_rows) if row not in self.active]
        taken: dict[int, GenerationRequest] = {}
        if self.active and len(free) * _REFILLED < self._num_rows:
            return taken
        for row in free:
            request = next_request()
            if request is None:
                break
            taken[row] = request
        return taken

    def read(self, found: Mapping[int, GenerationRequest]) -> RowLogits:
        """Read the prompts of these rows."""
        rows = sorted(found, key=lambda row: len(found[row].prompt))
        logits = [
            self._read_together({row: found[row] for row in rows[at : at + _READ_ROWS]})
            for at in range(0, len(rows), _READ_ROWS)
        ]
        return RowLogits(rows=rows, logits_RV=torch.cat(logits))

    def _read_together(self, found: Mapping[int, GenerationRequest]) -> Tensor:
        prompts = [request.prompt for request in found.values()]
        width = max(map(len, prompts))
        ids_RT, mask_RT = padded(prompts, width, self._lm.device, at_left=True)
        positions_RT = (mask_RT.cumsum(dim=1) - 1).clamp(min=0)
        # Without a configuration all layers keep all columns, also those with a sliding window: it
        # is part of the mask that the model makes.
        cache = DynamicCache()
        logits_RV = self._forward(ids_RT, mask_RT, positions_RT, cache)
        self._place(list(found), cache, mask_RT.bool())
        for row, request in found.items():
            self.active[row] = GrowingText(request=request, begin=self._end - len(request.prompt))
        return logits_RV

    def _place(self, rows: Sequence[int], cache: Cache, mask_RT: Tensor) -> None:
        """Copy what was read into these rows, so that it ends at the last column."""
        width = mask_RT.shape[1]
        if not self._layers:
            self._layers = [_RoomyLayer(each, self._num_rows) for each in cache.layers]
        if width > self._end:
            self._move(width - self._end)
        index_R = torch.tensor(rows, device=mask_RT.device)
        for layer, read in zip(self._layers, cache.layers, strict=True):
            layer.place(index_R, read.keys, read.values)
        self._mask_BC[index_R] = False
        self._mask_BC[index_R, self._end - width : self._end] = mask_RT

    def step(self) -> RowLogits:
        """Read the last token of each active row."""
        begin = min(text.begin for text in self.active.values())
        if self._end == self._mask_BC.shape[1]:
            self._move(-begin)
            begin = 0
        num_rows, device = len(self._mask_BC), self._lm.device
        ids_B, positions_B = [0] * num_rows, [0] * num_rows
        for row, text in self.active.items():
            ids_B[row], positions_B[row] = self.last_ids[row], text.position
        self._mask_BC[:, self._end] = True
        for layer in self._layers:
            layer.begin = begin
        self._end += 1
        logits_BV = self._forward(
            torch.tensor(ids_B, device=device)[:, None],
            self._mask_BC[:, begin : self._end].long(),
            torch.tensor(positions_B, device=device)[:, None],
            Cache(layers=self._layers),
        )
        rows = sorted(self.active)
        if len(rows) < num_rows:
            logits_BV = logits_BV[torch.tensor(rows, device=device)]
        return RowLogits(rows=rows, logits_RV=logits_BV)

    def shrink(self) -> None:
        """Drop free rows where at most half of them are in use."""
        if 2 * len(self.active) > self._num_rows:
            return
        rows = sorted(self.active)
        index = torch.tensor(rows, device=self._lm.device)
        for layer in self._layers:
            layer.keep(index)
        self._mask_BC = self._mask_BC[index]
        self.last_ids = {at: self.last_ids[row] for at, row in enumerate(rows)}
        self.active = {at: self.active[row] for at, row in enumerate(rows)}
        self._num_rows = len(rows)

    def _move(self, num_columns: int) -> None:
        """Move all columns to the right, or to the left where the number is negative, and add room
        for more; columns that would be before the first are dropped.
        """
        for layer in self._layers:
            layer.move(num_columns)
        self._mask_BC = _moved(self._mask_BC, 1, self._end, num_columns)
        self._end += num_columns
        for text in self.active.values():
            text.begin += num_columns

    def _forward(
        self, ids_RT: Tensor, mask_RC: Tensor, positions_RT: Tensor, cache: Cache
    ) -> Tensor:
        """The logits [R, V] after the last token of each row."""
        known = inspect.signature(self._lm.forward).parameters
        # Models that have this argument do not compute the logits of the whole prompt.
        fewest = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        with torch.no_grad():
            logits_RTV: Tensor = self._lm(
                input_ids=ids_RT,
                attention_mask=mask_RC,
                position_ids=positions_RT,
                use_cache=True,
                # The name of the argument since transformers 5.24, and before.
                **{"cache" if "cache" in known else "past_key_values": cache},
                **fewest,
            ).logits
        return logits_RTV[:, -1]


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer [B, heads, C, D] with room for more columns.

    DynamicLayer copies all of its columns for each new one, which takes as long as the rest of the
    model where rows are long. Columns before `begin` are not shown to the model. Room is filled
    with zeros: a masked column counts 0 times its value, which must be finite.
    """

    def __init__(self, read: Any, num_rows: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._keys_BHCD, self._values_BHCD = (
            each.new_zeros(num_rows, each.shape[1], 0, each.shape[3])
            for each in (read.keys, read.values)
        )
        self.begin = self._end = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new columns; returns all keys and values."""
        begin = self._end
        self._end += key_states.shape[2]
        self._keys_BHCD[:, :, begin : self._end] = key_states
        self._values_BHCD[:, :, begin : self._end] = value_states
        shown = slice(self.begin, self._end)
        return self._keys_BHCD[:, :, shown], self._values_BHCD[:, :, shown]

    def get_seq_length(self) -> int:
        """The number of columns that the model sees."""
        return self._end - self.begin

    def place(self, rows: Tensor, keys_RHTD: Tensor, values_RHTD: Tensor) -> None:
        """Write the last columns of these rows."""
        begin = self._end - keys_RHTD.shape[2]
        self._keys_BHCD[rows, :, begin : self._end] = keys_RHTD
        self._values_BHCD[rows, :, begin : self._end] = values_RHTD

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self._keys_BHCD, self._values_BHCD = self._keys_BHCD[rows], self._values_BHCD[rows]

    def move(self, num_columns: int) -> None:
        """Move all columns to the right, or to the left where the number is negative, and add
        room.
        """
        self._keys_BHCD, self._values_BHCD = (
            _moved(each, 2, self._end, num_columns) for each in (self._keys_BHCD, self._values_BHCD)
        )
        self._end += num_columns
        self.begin = max(self.begin + num_columns, 0)


def _moved(tensor: Tensor, axis: int, end: int, num_columns: int) -> Tensor:
    """The columns before `end`, moved to the right, with room after them and zeros in what is new.

    Moved by 2, the columns 0, 1, 2 are columns 2, 3, 4; moved by -2, column 2 is column 0.
    """
    shape = list(tensor.shape)
    shape[axis] = end + num_columns + _ROOM
    moved = tensor.new_zeros(shape)
    first = max(-num_columns, 0)
    kept = tensor.narrow(axis, first, end - first)
    moved.narrow(axis, first + num_columns, end - first).copy_(kept)
    return moved


def can_exchange_rows(lm: Any) -> bool:
    """Whether the cache of a model is keys and values alone, whose rows can be exchanged, and
    whether the positions of its tokens can be given.
    """
    config = lm.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) is not None:
        return False  # chunks count from the first column
    known = inspect.signature(lm.forward).parameters
    kinds = {type(layer) for layer in DynamicCache(config=lm.config).layers}
    return "position_ids" in known and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
