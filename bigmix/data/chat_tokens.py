"""Rendered conversations go in, token ids and the mask of what is learned come out, for many conversations at once."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bigmix.data.recognise import Dropped
from bigmix.data.tokenizer import EncodedBatch, Ids, Tokenizer

# Unicode promises that these four are never characters of a text.
HIDDEN_OPEN, HIDDEN_CLOSE, MARK_OPEN, MARK_CLOSE = "\ufdd0\ufdd1\ufdd2\ufdd3"
HIDDEN = re.compile(f"{HIDDEN_OPEN}([0-9]+){HIDDEN_CLOSE}")

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChat:
    """Token ids [T], which of them are in the loss [T], and the UTF-8 bytes of the assistant's answers."""

    ids: Ids
    loss_mask: Mask
    answer_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """A conversation as its template writes it, with what is in the loss and the strings that are hidden in the text."""

    text: str
    spans: Sequence[tuple[int, int]]
    hidden: Sequence[str]
    answer_bytes: int
    turns: int


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[RenderedChat | Dropped]
) -> Sequence[EncodedChat | Dropped]:
    """Encode conversations together; each result is what the conversation would give alone."""
    whole = [chat for chat in chats if isinstance(chat, RenderedChat)]
    encoded = iter(_encode(tokenizer, whole))
    return [next(encoded) if isinstance(chat, RenderedChat) else chat for chat in chats]


def _encode(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> Iterator[EncodedChat]:
    """Ids and masks of rendered texts, seen as one long text; what was hidden is encoded as the text that it is."""
    begins = np.cumsum([0, *(len(chat.text) for chat in chats)])
    places = [
        place
        for number, chat in enumerate(chats)
        for place in _segments(chat, number, int(begins[number]))
    ]
    ids, covered = _tokens(tokenizer, places), _covered(chats, begins)
    masks = covered[ids.ends] > covered[ids.begins]
    tokens = np.bincount([place.chat for place in places], ids.counts, len(chats)).astype(int)
    stops = np.cumsum(tokens).tolist()
    for chat, start, stop in zip(chats, [0, *stops], stops, strict=False):
        yield _finished(tokenizer, chat, ids.ids[start:stop], masks[start:stop])


def _finished(tokenizer: Tokenizer, chat: RenderedChat, ids: Ids, mask: Mask) -> EncodedChat:
    if tokenizer.bos_id is not None and (len(ids) == 0 or ids[0] != tokenizer.bos_id):
        ids = np.concatenate([np.array([tokenizer.bos_id], np.uint32), ids])
        mask = np.concatenate([[False], mask])
    mask[0] = False  # nothing stands before it that could predict it
    return EncodedChat(ids=ids, loss_mask=mask, answer_bytes=chat.answer_bytes)


class _Segment(NamedTuple):
    """The `width` characters of a chat from `at` on: text that is rendered, or a string that was hidden."""

    chat: int
    at: int
    width: int
    text: str
    is_hidden: bool


def _segments(chat: RenderedChat, number: int, at: int) -> Iterator[_Segment]:
    if not chat.hidden:
        yield _Segment(number, at, len(chat.text), chat.text, False)
        return
    for index, piece in enumerate(HIDDEN.split(chat.text)):
        is_hidden = index % 2 == 1  # then the piece is the number of the string
        width = len(piece) + (len(HIDDEN_OPEN + HIDDEN_CLOSE) if is_hidden else 0)
        text = chat.hidden[int(piece)] if is_hidden else piece
        yield _Segment(number, at, width, text, is_hidden)
        at += width


def _covered(chats: Sequence[RenderedChat], begins: npt.NDArray[np.int64]) -> Counts:
    """How many of the characters before each place are in the loss."""
    covered = np.zeros(begins[-1] + 1, np.int64)
    for chat, at in zip(chats, begins.tolist(), strict=False):
        for begin, end in chat.spans:
            covered[at + begin + 1 : at + end + 1] = 1
    return np.cumsum(covered)


def _tokens(tokenizer: Tokenizer, segments: Sequence[_Segment]) -> EncodedBatch:
    """The tokens of all segments in order, and the characters of the long text that they are from."""
    at = np.array([segment.at for segment in segments])
    width = np.array([segment.width for segment in segments])
    hidden = np.array([segment.is_hidden for segment in segments], np.bool_)
    found = tokenizer.encode_rendered_batch([s.text for s in segments if not s.is_hidden])
    at_of, width_of = (np.repeat(values[~hidden], found.counts) for values in (at, width))
    # A token of no width (a mark of sentencepiece) counts as the character behind it.
    ends = at_of + np.minimum(np.maximum(found.ends, found.begins + 1), width_of)
    written = replace(found, begins=at_of + found.begins, ends=ends)
    if not hidden.any():
        return written
    strings = tokenizer.encode([s.text for s in segments if s.is_hidden])
    counts = np.zeros(len(segments), np.int64)
    counts[~hidden], counts[hidden] = found.counts, [len(ids) for ids in strings]
    parts = np.flatnonzero(~hidden), np.flatnonzero(hidden)
    order = np.argsort(np.concatenate([np.repeat(p, counts[p]) for p in parts]), kind="stable")
    begin, end = (np.repeat(values[hidden], counts[hidden]) for values in (at, at + width))
    return EncodedBatch(
        ids=np.concatenate([written.ids, *strings])[order],
        begins=np.concatenate([written.begins, begin])[order],
        ends=np.concatenate([written.ends, end])[order],
        counts=counts,
    )
