"""Finds the last word of a text among its tokens.

A word is what lies between white space, without the punctuation and symbols at its ends: `river` in
`the (river).`, `3.5` in `is $3.5!`, `it's`. In scripts that are written without spaces (Chinese,
Japanese, Thai, Lao, Khmer, Burmese) each character is a word, so the last word is the last
character.
"""

import re
import unicodedata
from collections.abc import Sequence

from tokenizers import decoders

from bigmix.text.tokenizer import Tokenizer, byte_signs

TAIL = 64  # tokens at the end of a text that are searched; a longer word counts as none
_BREAK = b"\n"  # a special token separates words as this does
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as sentencepiece writes it
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_NO_WORD = "PSZC"  # the Unicode categories of punctuation, symbols, white space and controls


def pieces_of_tokens(tokenizer: Tokenizer) -> Sequence[bytes]:
    """The bytes that each id adds to a text; a special token adds a line break."""
    if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        signs = byte_signs()
        strings = map(tokenizer.text_of, range(tokenizer.vocab_size))
        pieces = [
            bytes(signs[s] for s in string) if all(s in signs for s in string) else string.encode()
            for string in strings
        ]
    else:
        pieces = [_piece(tokenizer.text_of(token)) for token in range(tokenizer.vocab_size)]
    for token in tokenizer.special_ids:
        pieces[token] = _BREAK
    return pieces


def _piece(string: str) -> bytes:
    byte = _BYTE.fullmatch(string)
    return bytes([int(byte[1], 16)]) if byte else string.replace(_SPACE, " ").encode()


def last_word(pieces: Sequence[bytes], *, is_whole: bool) -> slice | None:
    """Which of the tokens at the end of a text, given as bytes, hold its last word.

    None where there is no word; also where the word begins with the first token and the text before
    is missing (`is_whole` is False), since it may have begun earlier.
    """
    # Bytes that are not UTF-8 are kept, so that characters can be counted in bytes.
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    found = _last_word(text)
    if found is None or (found.start == 0 and not is_whole):
        return None
    begin, end = (
        len(text[:at].encode("utf-8", "surrogateescape")) for at in (found.start, found.stop)
    )
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    first = next(token for token in range(len(pieces)) if ends[token + 1] > begin)
    stop = next(token for token in range(len(pieces) + 1) if ends[token] >= end)
    return slice(first, stop)


def _last_word(text: str) -> slice | None:
    """The characters of the last word."""
    end = len(text)
    while end and unicodedata.category(text[end - 1])[0] in _NO_WORD:
        end -= 1
    if not end:
        return None
    begin = end - 1
    if not _UNSPACED.match(text[begin]):
        while begin and not text[begin - 1].isspace() and not _UNSPACED.match(text[begin - 1]):
            begin -= 1
        while unicodedata.category(text[begin])[0] in _NO_WORD:
            begin += 1
    return slice(begin, end)
