"""A tokenizer goes in, the bytes that each of its tokens stands for come out, if its kind has such bytes."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders

VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def bytes_of_tokens(backend: tokenizers.Tokenizer, vocab_size: int) -> Sequence[bytes] | None:
    """The bytes of each id, b"" where an id has none; None for a tokenizer that does not work on bytes.

    Where the bytes of the tokens of a text, end to end, are the bytes of the text, each token is from the place where
    its bytes stand, and the tokenizer need not be asked for it.
    """
    if not isinstance(backend.decoder, decoders.ByteLevel) or _trims(backend):
        return None
    signs = byte_signs()
    found = [b""] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        if all(sign in signs for sign in token):
            found[index] = bytes(signs[sign] for sign in token)
    for index, added in backend.get_added_tokens_decoder().items():
        found[index] = added.content.encode()
    # Some write a space before each text; nearly none of the texts would then be its tokens.
    probe = backend.encode("a", add_special_tokens=False).ids
    return found if b"".join(found[token] for token in probe) == b"a" else None


def _trims(backend: tokenizers.Tokenizer) -> bool:
    """Whether spaces are taken from the places that are given for tokens, but not from the tokens."""
    processor = backend.post_processor
    if processor is None:
        return False
    return _holds(json.loads(processor.__getstate__()))


def _holds(value: object) -> bool:
    if isinstance(value, dict):
        return value.get("trim_offsets") is True or any(map(_holds, value.values()))
    return isinstance(value, list) and any(map(_holds, value))


def byte_signs() -> dict[str, int]:
    """The sign that byte-level vocabularies write for each byte: itself where that is visible, else one from 256 on."""
    others = [byte for byte in range(256) if byte not in VISIBLE]
    return {chr(byte): byte for byte in VISIBLE} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
