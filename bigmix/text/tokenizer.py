"""Loads and trains tokenizers, and encodes texts with them.

A Hugging Face folder, a hub name and a sentencepiece .model all become a `Tokenizer`. Text is only
ever text: a string that looks like a special token becomes ordinary ids. Special ids come only from
a chat template (`encode_rendered`) or from the code that packs documents (`bos_id`, `eos_id`).
"""

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmix.errors import BadInput
from bigmix.files import atomic_write
from bigmix.text.sentencepiece import PROBES, read_sentencepiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Ids = npt.NDArray[np.uint32]
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"  # not the end of text, which is learned and must not be masked
LONGEST_SENTENCE = 1 << 20  # bytes; sentencepiece leaves out longer ones, so texts are cut first
# The bytes that byte-level vocabularies write as themselves.
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Token ids [T] of a rendered text, and the characters [begin, end) that each is from."""

    ids: Ids
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Several rendered texts, end to end [T]; `counts` has the number of tokens of each text."""

    ids: Ids
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTexts:
    """Token ids of several texts, end to end [T]; `counts` has the number of tokens of each."""

    ids: Ids
    counts: npt.NDArray[np.int64]

    def split(self) -> list[Ids]:
        """The ids of each text."""
        ends = np.cumsum(self.counts).tolist()
        return [self.ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Turns text into ids and back.

    `bos_id` is None where the tokenizer adds no BOS to plain text.
    """

    name: str
    vocab_size: int  # the largest id, added tokens included, plus one
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    chat_template: str | None
    special_ids: frozenset[int]
    # A copy of its own: whether special tokens are found in text is a state of the backend.
    backend: tokenizers.Tokenizer = field(repr=False)
    unk_id: int | None
    # By the names that chat templates know: bos_token, eos_token and so on.
    special_tokens: Mapping[str, Any] = field(repr=False)
    # None in a worker process, which saves no tokenizer and so need not import transformers.
    pretrained: "PreTrainedTokenizerFast | None" = field(repr=False)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without special tokens."""
        return self.encode_together(texts).split()

    def encode_together(self, texts: Sequence[str]) -> EncodedTexts:
        """The ids that `encode` gives for each text, end to end."""
        self.backend.encode_special_tokens = True
        encoded = _joined(self.backend.encode_batch_fast(list(texts), add_special_tokens=False))
        # One check for the whole batch, which nearly always finds none.
        if not self._is_special[encoded.ids].any():
            return encoded
        arrays = [
            self._encode_broken(text) if self._is_special[ids].any() else ids
            for text, ids in zip(texts, encoded.split(), strict=True)
        ]
        return EncodedTexts(
            ids=np.concatenate(arrays), counts=np.array([len(ids) for ids in arrays], np.int64)
        )

    def encode_rendered_together(self, texts: Sequence[str]) -> EncodedTexts:
        """The ids that `encode_rendered` gives for each text, end to end; faster, since it does not
        find the characters.
        """
        self.backend.encode_special_tokens = False
        return _joined(self.backend.encode_batch_fast(list(texts), add_special_tokens=False))

    def encode_rendered(self, text: str) -> Encoded:
        """The ids of a text that a chat template wrote: strings of special tokens become their
        ids.
        """
        self.backend.encode_special_tokens = False
        found = self.backend.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        return Encoded(ids=np.array(found.ids, np.uint32), begins=offsets[:, 0], ends=offsets[:, 1])

    def encode_rendered_batch(self, texts: Sequence[str]) -> EncodedBatch:
        """The ids and characters that `encode_rendered` gives for each text, end to end."""
        self.backend.encode_special_tokens = False
        found = self.backend.encode_batch(list(texts), add_special_tokens=False)
        ids = [each.ids for each in found]
        numbers = chain.from_iterable(chain.from_iterable(each.offsets for each in found))
        offsets = np.fromiter(numbers, np.int64).reshape(-1, 2)
        return EncodedBatch(
            ids=np.fromiter(chain.from_iterable(ids), np.uint32),
            begins=offsets[:, 0],
            ends=offsets[:, 1],
            counts=np.array([len(each) for each in ids], np.int64),
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def text_of(self, token: int) -> str:
        """The string of one id, as chat templates write it."""
        return str(self.backend.id_to_token(token))

    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` and transformers load, with the same fingerprint."""
        assert self.pretrained is not None, "a worker process saves no tokenizer"
        self.pretrained.save_pretrained(folder)

    def for_workers(self) -> "Tokenizer":
        """The tokenizer to send to other processes, which encode and render but do not save."""
        return replace(self, pretrained=None)

    @property
    def eos_token(self) -> str:
        """The string of the end-of-sequence token."""
        return str(self.special_tokens["eos_token"])

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the strings of special tokens, the longer first."""
        strings = sorted((self.text_of(token) for token in self.special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, strings)) or "(?!)")

    @cached_property
    def special_signs(self) -> str:
        """The characters that strings of special tokens begin with."""
        return "".join(sorted({self.text_of(token)[:1] for token in self.special_ids}))

    @cached_property
    def token_bytes(self) -> Sequence[bytes] | None:
        """The bytes of each id; None for a tokenizer that does not work on bytes."""
        return bytes_of_tokens(self.backend, self.vocab_size)

    @cached_property
    def token_widths(self) -> npt.NDArray[np.int64]:
        """The number of bytes of each id, where `token_bytes` is known."""
        return np.array([len(each) for each in self.token_bytes or ()], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that is the same for tokenizers that give the same ids.

        It covers the vocabulary, the ids of probes, BOS and EOS; neither the chat template nor the
        files that the tokenizer was loaded from change it.
        """
        probes = [ids.tolist() for ids in self.encode(PROBES)]
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        ends = [self.bos_id, self.eos_id]
        text = json.dumps([vocabulary, probes, ends], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _is_special(self) -> npt.NDArray[np.bool_]:
        flags = np.zeros(self.vocab_size, np.bool_)
        # The unknown token is no fault: text that the vocabulary does not cover becomes it.
        flags[sorted(self.special_ids - {self.unk_id})] = True
        return flags

    def _encode_broken(self, text: str) -> Ids:
        """Encode a text with its strings of special tokens cut in two, so that none is found.

        Needed for vocabularies that hold special tokens as ordinary pieces.
        """
        cuts = [0, *(match.start() + 1 for match in self.special_pattern.finditer(text)), len(text)]
        parts = [text[begin:end] for begin, end in pairwise(cuts)]
        found = self.backend.encode_batch_fast(parts, add_special_tokens=False)
        ids = np.concatenate([np.array(each.ids, np.uint32) for each in found])
        if self._is_special[ids].any():
            raise BadInput(
                f"tokenizer {self.name} makes the special token"
                f" {self.text_of(int(ids[self._is_special[ids]][0]))!r} out of ordinary text; use"
                " a tokenizer whose special tokens are not part of its vocabulary"
            )
        return ids


def _joined(found: Sequence[tokenizers.Encoding]) -> EncodedTexts:
    # The fastest way from lists of Python's integers to an array.
    joined, counts = array("I"), []
    for each in found:
        ids = each.ids
        counts.append(len(ids))
        joined.fromlist(ids)
    return EncodedTexts(ids=np.array(joined, np.uint32), counts=np.array(counts, np.int64))


def load_tokenizer(path_or_name: str) -> Tokenizer:
    """Load a Hugging Face folder or hub name, or a sentencepiece .model file.

    Raises BadInput where there is no tokenizer, where it has no fast form, or where it has no
    end-of-sequence token.
    """
    path = Path(path_or_name)
    if path.suffix == ".model":
        if not path.is_file():
            raise BadInput(
                f"tokenizer {path_or_name} is not a file; give a .model file or a folder"
            )
        pretrained = read_sentencepiece(path)
    else:
        pretrained = _load_pretrained(path_or_name)
    if pretrained.eos_token_id is None:
        raise BadInput(
            f"tokenizer {path_or_name} has no eos token, which must end each document; set"
            " eos_token in its tokenizer_config.json"
        )
    return _wrapped(path_or_name, pretrained)


def fingerprint_of(path_or_name: str) -> str:
    """The fingerprint of the tokenizer at a path or of a hub name, to compare with the one in a
    manifest.
    """
    return load_tokenizer(path_or_name).fingerprint


def _load_pretrained(path_or_name: str) -> "PreTrainedTokenizerFast":
    # transformers, and torch, which AutoTokenizer imports, take seconds that worker processes do
    # without.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        pretrained = AutoTokenizer.from_pretrained(path_or_name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"tokenizer {path_or_name} cannot be loaded ({why}); give a folder with "
            "tokenizer.json, the name of a model on the hub, or a sentencepiece .model file"
        ) from error
    if not isinstance(pretrained, PreTrainedTokenizerFast):
        raise BadInput(
            f"tokenizer {path_or_name} is a {type(pretrained).__name__}, which has no fast form"
            " (tokenizer.json); convert it, or give its sentencepiece .model file"
        )
    return pretrained


def _wrapped(name: str, pretrained: "PreTrainedTokenizerFast") -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(pretrained.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    special = {index for index, token in added.items() if token.special}
    first = backend.encode("a", add_special_tokens=True).ids[:1]
    adds_bos = first == [pretrained.bos_token_id]
    template = pretrained.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(
        name=name,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=pretrained.bos_token_id if adds_bos else None,
        eos_id=pretrained.eos_token_id,
        pad_id=pretrained.pad_token_id,
        chat_template=template,
        special_ids=frozenset(special | {pretrained.eos_token_id}),
        backend=backend,
        unk_id=pretrained.unk_token_id,
        special_tokens=dict(pretrained.special_tokens_map),
        pretrained=pretrained,
    )


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, kind: Literal["bpe", "unigram"], folder: Path
) -> Path:
    """Train a tokenizer and return the path to load it from: the folder, or for `unigram` its
    tokenizer.model.

    `bpe` works on bytes and `unigram` falls back to bytes: with both, decoding the ids gives each
    text back unchanged (except U+2581, which sentencepiece takes for a space). Raises BadInput
    where the folder already holds a tokenizer, or where the vocabulary cannot be trained.
    """
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists():
        raise BadInput(f"{folder} already holds a tokenizer; give another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    train = _train_bpe if kind == "bpe" else _train_unigram
    return train(texts, vocab_size, folder)


def _train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    # As above: seconds of import.
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING
    ).save_pretrained(folder)
    return folder


def _train_unigram(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    path = folder / "tokenizer.model"
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=file,
                model_type="unigram",
                vocab_size=vocab_size,
                # No part of a text may be lost: no normalisation, no stripped spaces, bytes for
                # unknown characters.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                split_digits=True,
                allow_whitespace_only_pieces=True,
                max_sentence_length=LONGEST_SENTENCE,
                bos_id=-1,
                hard_vocab_limit=False,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise BadInput(
            f"sentencepiece cannot train a vocabulary of {vocab_size} ({error}); change"
            " --vocab-size or give more text"
        ) from error
    return path


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines with their line ends, which sentencepiece then learns, cut to the length that it
    accepts.
    """
    for text in texts:
        for line in text.splitlines(keepends=True):
            for begin in range(0, len(line), LONGEST_SENTENCE // 4):
                yield line[begin : begin + LONGEST_SENTENCE // 4]


def bytes_of_tokens(backend: tokenizers.Tokenizer, vocab_size: int) -> Sequence[bytes] | None:
    """The bytes of each id, b"" where an id has none; None for a tokenizer that does not work on
    bytes.

    Where the bytes of the tokens of a text, end to end, are the bytes of the text, each token is
    from the part of the text where its bytes are, and the tokenizer need not report it.
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
    # Some write a space before each text: then hardly any text equals the bytes of its tokens.
    probe = backend.encode("a", add_special_tokens=False).ids
    return found if b"".join(found[token] for token in probe) == b"a" else None


def _trims(backend: tokenizers.Tokenizer) -> bool:
    """Whether the characters reported for tokens leave out spaces that the tokens contain."""
    processor = backend.post_processor
    if processor is None:
        return False
    return _holds(json.loads(processor.__getstate__()))


def _holds(value: object) -> bool:
    if isinstance(value, dict):
        return value.get("trim_offsets") is True or any(map(_holds, value.values()))
    return isinstance(value, list) and any(map(_holds, value))


def byte_signs() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes: the byte itself where that is
    visible, else a character from U+0100 on.
    """
    others = [byte for byte in range(256) if byte not in VISIBLE]
    return {chr(byte): byte for byte in VISIBLE} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
