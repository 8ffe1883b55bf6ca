"""Converts a sentencepiece .model to a fast Hugging Face tokenizer with the same ids.

Training, export and inference then use one implementation. Each conversion is checked against
sentencepiece on probes. One difference remains in unigram models: where two ways to cut a word have
the same score to the last digit of a float32, which sentencepiece adds up in and tokenizers does
not, either may be chosen.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from bigmix.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # the type of a piece
SPACE = "▁"
# Low enough that no segmentation chooses the piece, high enough that a sum with it keeps the digits
# of the other scores.
NEVER_CHOSEN = -1e4
PROBES = (
    "",
    "a",
    " a",
    "a  ",
    "The quick brown fox; it's 3.14 % of 1,000,000 — or isn't it?",
    "two  spaces,\ttab\nnew line\n\n    indented = {'x': [1, 2]}",
    "naïve café, Straße, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "混合训练保持知识。日本語のテキスト、한국어 문장",
    "👩‍👩‍👧 🇨🇳 ﬁ Ａ １２３ ½ e\u0301 \u3000 y\u00a0z",
    "▁x ▁ y",
    "a line\r\nand  another\r\n",
)


def read_sentencepiece(path: Path) -> "PreTrainedTokenizerFast":
    """Convert a unigram or BPE .model; the ids are those of sentencepiece, except for ties.

    Raises BadInput where the file is not such a model, or where the conversion would give a probe
    other ids.
    """
    content = path.read_bytes()
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (DecodeError, RuntimeError) as error:
        raise BadInput(
            f"{path} is not a sentencepiece model ({error}); give another file"
        ) from error
    kind = proto.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE) or not proto.pieces:
        raise BadInput(
            f"{path} is a sentencepiece model of type {kind} with {len(proto.pieces)} pieces;"
            f" allowed are unigram ({UNIGRAM}) and BPE ({BPE}) with at least one piece; give"
            " another file"
        )
    backend = _backend(proto)
    for text in PROBES:
        if backend.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise BadInput(
                f"{path} cannot be converted exactly: {text!r} gets other ids than from"
                " sentencepiece; give the folder of the model's Hugging Face tokenizer instead"
            )
    backend.encode_special_tokens = False
    spec = {"bos_token": original.bos_id(), "eos_token": original.eos_id()}
    spec |= {"unk_token": original.unk_id(), "pad_token": original.pad_id()}
    names = {name: original.id_to_piece(index) for name, index in spec.items() if index >= 0}
    # transformers takes seconds to import, which worker processes do without.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _backend(proto: Any) -> Tokenizer:
    tokenizer = Tokenizer(
        _unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto)
    )
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    if proto.trainer_spec.model_type == UNIGRAM:
        hidden = [piece.piece for piece in proto.pieces if not _is_text(piece)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splits_inside(hidden))
    tokenizer.decoder = decoders.Sequence(_decoders(proto))
    named = [piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)
            for piece in named
        ]
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_text(piece: Any) -> bool:
    """Whether text can contain the piece; control, unknown and byte pieces it cannot."""
    return piece.type in (NORMAL, USER_DEFINED)


def _unigram(proto: Any) -> models.Unigram:
    scores = [
        (piece.piece, piece.score if _is_text(piece) else NEVER_CHOSEN) for piece in proto.pieces
    ]
    spec = proto.trainer_spec
    return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    """The merges of BPE: sentencepiece joins any two pieces that together are a piece, the best
    score first.
    """
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if _is_text(piece)}
    merges = [
        (-score, ids[piece[:cut]], ids[piece[cut:]])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    names = [piece.piece for piece in proto.pieces]
    spec = proto.trainer_spec
    return models.BPE(
        ids,
        [(names[left], names[right]) for _, left, right in sorted(merges)],
        unk_token=names[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _normalizers(spec: Any) -> list[Any]:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return steps


def _splits_inside(pieces: list[str]) -> list[Any]:
    """Splits that separate the first letter of each piece from its rest, so that the piece is never
    found in text.

    A low score alone is not enough: where a letter of `</s>` is unknown, any known piece scores
    better than that letter.
    """
    rests = defaultdict(list)
    for piece in pieces:
        if len(piece) > 1:
            rests[piece[0]].append(re.escape(piece[1:]))
    return [
        pre_tokenizers.Split(
            Regex(f"{re.escape(first)}(?={'|'.join(rest)})"), behavior="merged_with_previous"
        )
        for first, rest in rests.items()
    ]


def _decoders(proto: Any) -> list[Any]:
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps
