"""Shows a row as the model sees it: context, loss tokens, borders of documents, and padding.

Tokens are decoded one by one; those that make a character only together are decoded together, so
that no character is broken.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from bigmix.data.records import Row
from bigmix.text.tokenizer import Tokenizer
from bigmix.types import IGNORE

PieceKind = Literal["head", "border", "context", "loss", "padding"]
LONGEST_GROUP = 8  # tokens: a character has at most four bytes, and a token at least one
SHOWN_TOKENS = 400  # of a row, unless all are wanted
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPiece:
    """A stretch of text of one kind; each special token of the tokenizer is a piece of its own."""

    text: str
    kind: PieceKind
    is_special: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchId:
    """The rank that trains a row, and the number of the micro-batch that has it."""

    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    kind: PieceKind
    is_special: bool


def preview(
    row: Row, where: MicroBatchId, tokenizer: Tokenizer, *, max_tokens: int | None
) -> Iterator[ViewPiece]:
    """A row as it is trained, in pieces: its first `max_tokens` tokens, all where that is None, and
    the number of those that are not shown.
    """
    in_loss = [False, *(row.labels_T[:-1] != IGNORE).tolist()]
    yield ViewPiece(text=_head(row, where, sum(in_loss)) + "\n", kind="head")
    shown = row.num_tokens if max_tokens is None else min(max_tokens, row.num_tokens)
    bounds = [*row.starts_P.tolist(), row.num_tokens]
    for index, document in enumerate(row.documents_P.tolist()):
        begin, end = bounds[index], bounds[index + 1]
        if begin >= shown:
            break
        yield ViewPiece(text=f"── document {document:,}, {end - begin:,} tokens\n", kind="border")
        tokens = [
            _Token(token, "loss" if flag else "context", token in tokenizer.special_ids)
            for token, flag in zip(
                row.ids_T[begin : min(end, shown)].tolist(), in_loss[begin:end], strict=False
            )
        ]
        yield from _decoded(tokens, tokenizer)
        yield ViewPiece(text="\n", kind="border")
    if shown < row.num_tokens:
        yield ViewPiece(
            text=f"… {row.num_tokens - shown:,} more tokens, --full shows them\n", kind="padding"
        )
    if padding := len(row.ids_T) - row.num_tokens:
        yield ViewPiece(text=f"… {padding:,} padding\n", kind="padding")


def marked(pieces: Sequence[ViewPiece]) -> str:
    """The pieces without colour: [[loss tokens]] and {{special tokens}}; the same signs in the text
    get a backslash.
    """
    marked_runs = []
    for is_loss, run in groupby(pieces, key=lambda piece: piece.kind == "loss"):
        text = "".join(_marked(piece) for piece in run)
        marked_runs.append(f"[[{text}]]" if is_loss else text)
    return "".join(marked_runs)


def _marked(piece: ViewPiece) -> str:
    if piece.kind not in ("context", "loss"):
        return piece.text
    text = piece.text
    for sign in ("[[", "]]", "{{", "}}"):
        text = text.replace(sign, f"\\{sign}")
    return f"{{{{{text}}}}}" if piece.is_special else text


def _head(row: Row, where: MicroBatchId, num_loss_tokens: int) -> str:
    return (
        f"rank {where.rank}  micro-batch {where.number}  {row.id.source}  epoch {row.id.epoch} "
        f" shard {row.id.shard}  row {row.id.row}  {row.num_tokens:,} tokens"
        f"  {num_loss_tokens:,} in the loss  {row.num_tokens / len(row.ids_T):.1%} filled"
    )


def _decoded(tokens: Sequence[_Token], tokenizer: Tokenizer) -> Iterator[ViewPiece]:
    for is_special, run in groupby(tokens, key=lambda token: token.is_special):
        if is_special:
            for token in run:
                text = visible(tokenizer.text_of(token.id))
                yield ViewPiece(text=text, kind=token.kind, is_special=True)
        else:
            pieces = _characters(list(run), tokenizer)
            for kind, alike in groupby(pieces, key=lambda piece: piece.kind):
                yield ViewPiece(text="".join(piece.text for piece in alike), kind=kind)


def _characters(tokens: Sequence[_Token], tokenizer: Tokenizer) -> Iterator[ViewPiece]:
    """Groups of as few tokens as decode to complete characters, each of the kind of its last token.

    A group is decoded after the one before it, since some tokenizers remove a space at the start.
    """
    before: list[int] = []
    group: list[int] = []
    for index, token in enumerate(tokens):
        group.append(token.id)
        text = tokenizer.decode([*before, *group])[len(tokenizer.decode(before)) :]
        is_broken = text.endswith(_BROKEN)
        if is_broken and len(group) < LONGEST_GROUP and index + 1 < len(tokens):
            continue
        yield ViewPiece(text=visible(text or f"<{token.id}>"), kind=token.kind)
        before, group = [] if is_broken else group, []


def visible(text: str) -> str:
    """The text with a visible sign for each control character, since the terminal would obey
    these.
    """
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS:
        return f"<U+{code:04X}>"
    return character
