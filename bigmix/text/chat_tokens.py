"""Encodes rendered conversations, many at once, with a mask of the tokens that are learned.

A token is learned where it contains a part of an answer. Most tokenizers work on bytes: the bytes
of their tokens say where in the text each token is. Others have to report the characters of each
token, which is slower.

Letters: T tokens, D conversations, N spans.
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

# Unicode guarantees that these four are never characters of a text.
HIDDEN_OPEN, HIDDEN_CLOSE, MARK_OPEN, MARK_CLOSE = "\ufdd0\ufdd1\ufdd2\ufdd3"
HIDDEN = re.compile(f"{HIDDEN_OPEN}([0-9]+){HIDDEN_CLOSE}")
Spans = Sequence[tuple[int, int]]  # characters [begin, end) of a text


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChat:
    """One conversation: token ids [T], which of them are in the loss [T], and the number of UTF-8
    bytes in the answers.
    """

    ids: Ids
    loss_mask: Flags
    answer_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedChats:
    """Several conversations, end to end [T]; `counts` has the number of tokens of each [D]."""

    ids: Ids
    loss_mask: Flags
    counts: Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """A conversation as its template writes it.

    `spans` are the characters of the text that are in the loss, in order and without overlap.
    `hidden` are the strings that the text has marks for: text that spells a special token.
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
    """Encode conversations together; each result is the same as for the conversation alone."""
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
    """Encode conversations, end to end."""
    table = tokenizer.token_bytes
    plain = np.array([table is not None and not chat.hidden for chat in chats], np.bool_)
    by_bytes, is_exact = _of_bytes(tokenizer, list(compress(chats, plain)))
    plain[plain] = is_exact
    if plain.all():
        return _begun(tokenizer, by_bytes)
    by_characters = _of_characters(tokenizer, list(compress(chats, ~plain)))
    return _begun(tokenizer, _merged(by_bytes, by_characters, plain))


def _merged(one: EncodedChats, other: EncodedChats, is_one: Flags) -> EncodedChats:
    """The conversations of both in order: the next of `one` where `is_one` is True [D]."""
    counts = np.zeros(len(is_one), np.int64)
    counts[is_one], counts[~is_one] = one.counts, other.counts
    flags = np.repeat(is_one, counts)
    ids, mask = np.zeros(len(flags), np.uint32), np.zeros(len(flags), np.bool_)
    ids[flags], ids[~flags] = one.ids, other.ids
    mask[flags], mask[~flags] = one.loss_mask, other.loss_mask
    return EncodedChats(ids=ids, loss_mask=mask, counts=counts)


def _begun(tokenizer: Tokenizer, chats: EncodedChats) -> EncodedChats:
    """The conversations with a BOS before each that has none, where the tokenizer adds one."""
    ids, mask, counts = chats.ids, chats.loss_mask, chats.counts
    firsts = np.cumsum(counts) - counts
    if tokenizer.bos_id is not None:
        lacking = counts == 0
        lacking[~lacking] = ids[firsts[~lacking]] != tokenizer.bos_id
        ids = np.insert(ids, firsts[lacking], tokenizer.bos_id)
        mask = np.insert(mask, firsts[lacking], False)
        counts = counts + lacking
        firsts = np.cumsum(counts) - counts
    mask[firsts] = False  # no token precedes it that could predict it
    return EncodedChats(ids=ids, loss_mask=mask, counts=counts)


def _of_bytes(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> tuple[EncodedChats, Flags]:
    """The conversations whose tokens, as bytes, give exactly their texts; and which ones these are
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
    """Begin and end of each span in the loss, in bytes from the start of the first conversation
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
    """Which tokens [T] have a byte in one of the spans [N, 2], which do not overlap."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    first = ends.searchsorted(spans[:, 0], side="right")
    behind = begins.searchsorted(spans[:, 1], side="left")
    size = len(ends) + 1
    changes = np.bincount(first, minlength=size) - np.bincount(behind, minlength=size)
    mask: Flags = np.cumsum(changes)[:-1] > 0
    return mask


def _of_characters(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> EncodedChats:
    """Ids and masks of rendered texts, taken as one long text; hidden strings are encoded as
    ordinary text.
    """
    begins = np.cumsum([0, *(len(chat.text) for chat in chats)])
    pieces = [
        piece
        for number, chat in enumerate(chats)
        for piece in _pieces(chat, number, int(begins[number]))
    ]
    encoded, covered = _tokens(tokenizer, pieces), _covered(chats, begins)
    mask = covered[encoded.ends] > covered[encoded.begins]
    counts = np.bincount([piece.chat for piece in pieces], encoded.counts, len(chats)).astype(int)
    return EncodedChats(ids=encoded.ids, loss_mask=mask, counts=counts)


class _ChatPiece(NamedTuple):
    """The `width` characters of a conversation from `at` on: rendered text, or a hidden string.

    `chat` is the number of the conversation; `at` counts characters of the long text.
    """

    chat: int
    at: int
    width: int
    text: str
    is_hidden: bool


def _pieces(chat: RenderedChat, number: int, at: int) -> Iterator[_ChatPiece]:
    if not chat.hidden:
        yield _ChatPiece(number, at, len(chat.text), chat.text, False)
        return
    for index, piece in enumerate(HIDDEN.split(chat.text)):
        is_hidden = index % 2 == 1  # then the piece is the number of the string
        width = len(piece) + (len(HIDDEN_OPEN + HIDDEN_CLOSE) if is_hidden else 0)
        text = chat.hidden[int(piece)] if is_hidden else piece
        yield _ChatPiece(number, at, width, text, is_hidden)
        at += width


def _covered(chats: Sequence[RenderedChat], begins: npt.NDArray[np.int64]) -> Ints:
    """How many of the characters before each character are in the loss."""
    covered = np.zeros(begins[-1] + 1, np.int64)
    for chat, at in zip(chats, begins.tolist(), strict=False):
        for begin, end in chat.spans:
            covered[at + begin + 1 : at + end + 1] = 1
    return np.cumsum(covered)


def _tokens(tokenizer: Tokenizer, pieces: Sequence[_ChatPiece]) -> EncodedBatch:
    """The tokens of all pieces in order, and the characters of the long text that they are from."""
    at = np.array([piece.at for piece in pieces])
    width = np.array([piece.width for piece in pieces])
    hidden = np.array([piece.is_hidden for piece in pieces], np.bool_)
    found = tokenizer.encode_rendered_batch([p.text for p in pieces if not p.is_hidden])
    at_of, width_of = (np.repeat(values[~hidden], found.counts) for values in (at, width))
    # A token without a width (a mark of sentencepiece) counts as the character after it.
    ends = at_of + np.minimum(np.maximum(found.ends, found.begins + 1), width_of)
    written = replace(found, begins=at_of + found.begins, ends=ends)
    if not hidden.any():
        return written
    strings = tokenizer.encode([p.text for p in pieces if p.is_hidden])
    counts = np.zeros(len(pieces), np.int64)
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
