"""Rendered conversations go in, token ids and the mask of what is learned come out, for many
conversations at once.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bigmix.text.formats import Dropped
from bigmix.text.tokenizer import EncodedBatch, Ids, Tokenizer
from bigmix.types import Flags, Ints

# Unicode promises that these four are never characters of a text.
HIDDEN_OPEN, HIDDEN_CLOSE, MARK_OPEN, MARK_CLOSE = "\ufdd0\ufdd1\ufdd2\ufdd3"
HIDDEN = re.compile(f"{HIDDEN_OPEN}([0-9]+){HIDDEN_CLOSE}")
Spans = Sequence[tuple[int, int]]  # characters [begin, end) of a text


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChat:
    """Token ids [T], which of them are in the loss [T], and the UTF-8 bytes of the assistant's
    answers.
    """

    ids: Ids
    loss_mask: Flags
    answer_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChats:
    """The same for several conversations, end to end [T]; `counts` are the tokens of each."""

    ids: Ids
    loss_mask: Flags
    counts: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """A conversation as its template writes it, with what is in the loss and the strings that are
    hidden in the text.
    """

    text: str
    utf8: bytes
    spans: Spans
    hidden: Sequence[str]
    answer_bytes: int
    num_turns: int


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[RenderedChat | Dropped]
) -> Sequence[EncodedChat | Dropped]:
    """Encode conversations together; each result is what the conversation would give alone."""
    whole = [chat for chat in chats if isinstance(chat, RenderedChat)]
    encoded = iter(_split(encode_together(tokenizer, whole), whole))
    return [next(encoded) if isinstance(chat, RenderedChat) else chat for chat in chats]


def _split(encoded: EncodedChats, chats: Sequence[RenderedChat]) -> Iterator[EncodedChat]:
    ends = np.cumsum(encoded.counts).tolist()
    for chat, start, stop in zip(chats, [0, *ends], ends, strict=False):
        yield EncodedChat(
            ids=encoded.ids[start:stop],
            loss_mask=encoded.loss_mask[start:stop],
            answer_bytes=chat.answer_bytes,
        )


def encode_together(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> EncodedChats:
    """Encode conversations, end to end.

    Most tokenizers need not say for it which characters a token is from.
    """
    table = tokenizer.token_bytes
    plain = np.array([table is not None and not chat.hidden for chat in chats], np.bool_)
    by_bytes, is_exact = _of_bytes(tokenizer, list(compress(chats, plain)))
    plain[plain] = is_exact
    if plain.all():
        return _begun(tokenizer, by_bytes)
    by_characters = _of_characters(tokenizer, list(compress(chats, ~plain)))
    return _begun(tokenizer, _merged(by_bytes, by_characters, plain))


def _merged(one: EncodedChats, other: EncodedChats, is_one: Flags) -> EncodedChats:
    """The conversations of both in order: the next of `one` where `is_one` has a True [D]."""
    counts = np.zeros(len(is_one), np.int64)
    counts[is_one], counts[~is_one] = one.counts, other.counts
    flags = np.repeat(is_one, counts)
    ids, mask = np.zeros(len(flags), np.uint32), np.zeros(len(flags), np.bool_)
    ids[flags], ids[~flags] = one.ids, other.ids
    mask[flags], mask[~flags] = one.loss_mask, other.loss_mask
    return EncodedChats(ids=ids, loss_mask=mask, counts=counts)


def _begun(tokenizer: Tokenizer, chats: EncodedChats) -> EncodedChats:
    """With a BOS before each conversation that has none."""
    ids, mask, counts = chats.ids, chats.loss_mask, chats.counts
    firsts = np.cumsum(counts) - counts
    if tokenizer.bos_id is not None:
        lacking = counts == 0
        lacking[~lacking] = ids[firsts[~lacking]] != tokenizer.bos_id
        ids = np.insert(ids, firsts[lacking], tokenizer.bos_id)
        mask = np.insert(mask, firsts[lacking], False)
        counts = counts + lacking
        firsts = np.cumsum(counts) - counts
    mask[firsts] = False  # nothing stands before it that could predict it
    return EncodedChats(ids=ids, loss_mask=mask, counts=counts)


def _of_bytes(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> tuple[EncodedChats, Flags]:
    """The conversations whose tokens, written as bytes, are their texts; and which ones these are
    [D].
    """
    table = tokenizer.token_bytes or ()
    found = tokenizer.encode_rendered_together([chat.text for chat in chats])
    ids = found.split()
    is_exact = np.array(
        [
            b"".join(map(table.__getitem__, each.tolist())) == chat.utf8
            for each, chat in zip(ids, chats, strict=True)
        ],
        np.bool_,
    )
    kept = found.ids[np.repeat(is_exact, found.counts)]
    ends = np.cumsum(tokenizer.token_widths[kept])
    spans = _spans_in_bytes(compress(chats, is_exact))
    mask = _within(spans, ends - tokenizer.token_widths[kept], ends)
    counts = found.counts[is_exact]
    return EncodedChats(ids=kept, loss_mask=mask, counts=counts), is_exact


def _spans_in_bytes(chats: Iterable[RenderedChat]) -> Ints:
    """Begin and end of all that is in the loss, in bytes from the start of the first conversation
    [N, 2].
    """
    borders, at = list[int](), 0
    for chat in chats:
        done, place, is_ascii = 0, at, len(chat.utf8) == len(chat.text)
        for border in chain.from_iterable(chat.spans):
            place += border - done if is_ascii else len(chat.text[done:border].encode())
            done = border
            borders.append(place)
        at += len(chat.utf8)
    return np.array(borders, np.int64).reshape(-1, 2)


def _within(spans: Ints, begins: Ints, ends: Ints) -> Flags:
    """Which tokens [T] have a byte in one of the spans [N, 2], none of which overlap."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    first = ends.searchsorted(spans[:, 0], side="right")
    behind = begins.searchsorted(spans[:, 1], side="left")
    size = len(ends) + 1
    turns = np.bincount(first, minlength=size) - np.bincount(behind, minlength=size)
    mask: Flags = np.cumsum(turns)[:-1] > 0
    return mask


def _of_characters(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> EncodedChats:
    """Ids and masks of rendered texts, seen as one long text; what was hidden is encoded as the
    text that it is.
    """
    begins = np.cumsum([0, *(len(chat.text) for chat in chats)])
    places = [
        place
        for number, chat in enumerate(chats)
        for place in _segments(chat, number, int(begins[number]))
    ]
    ids, covered = _tokens(tokenizer, places), _covered(chats, begins)
    masks = covered[ids.ends] > covered[ids.begins]
    tokens = np.bincount([place.chat for place in places], ids.counts, len(chats)).astype(int)
    return EncodedChats(ids=ids.ids, loss_mask=masks, counts=tokens)


class _Segment(NamedTuple):
    """The `width` characters of a chat from `at` on: text that is rendered, or a string that was
    hidden.
    """

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


def _covered(chats: Sequence[RenderedChat], begins: npt.NDArray[np.int64]) -> Ints:
    """How many of the characters before each place are in the loss."""
    covered = np.zeros(begins[-1] + 1, np.int64)
    for chat, at in zip(chats, begins.tolist(), strict=False):
        for begin, end in chat.spans:
            covered[at + begin + 1 : at + end + 1] = 1
    return np.cumsum(covered)


def _tokens(tokenizer: Tokenizer, segments: Sequence[_Segment]) -> EncodedBatch:
    """The tokens of all segments in order, and the characters of the long text that they are
    from.
    """
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
