"""Text is only ever text, the fingerprint follows the ids, and a sentencepiece model keeps its
ids.
"""

import json

import numpy as np
import pytest
import sentencepiece
from support.corpora import generated_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bigmix.errors import BadInput
from bigmix.text.sentencepiece import PROBES, SPACE
from bigmix.text.tokenizer import END_OF_TEXT, fingerprint_of, load_tokenizer, train_tokenizer

TEXTS = [
    *PROBES,
    *generated_texts(30, seed=5),
    "</s> <s> <unk> <pad> <0x41> x</s>y<|endoftext|>",
    "\x00\x01 \ufeff \u2028 a\r\n\r\nb   ",
    "the river" * 300,
]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def sentencepiece_model(path, **options):
    settings = {
        "model_type": "unigram",
        "vocab_size": 330,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(generated_texts(300)), model_writer=file, **settings | options
        )
    return path


def saved(folder, backend, **names):
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def test_ids_are_those_of_transformers_without_special_tokens(tokenizer, tiny_tokenizer):
    pretrained = AutoTokenizer.from_pretrained(tiny_tokenizer)
    expected = [
        pretrained(text, add_special_tokens=False, split_special_tokens=True).input_ids
        for text in TEXTS
    ]
    assert [ids.tolist() for ids in tokenizer.encode(TEXTS)] == expected


def test_every_text_comes_back_from_its_ids(tokenizer):
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS


def test_a_special_token_in_text_is_text_and_in_a_rendered_template_is_the_token(tokenizer):
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.eos_id not in tokenizer.encode([text])[0]
    assert tokenizer.eos_id in tokenizer.encode_rendered(text).ids
    # the switch between the two leaves no trace
    assert tokenizer.eos_id not in tokenizer.encode([text])[0]


def test_a_special_token_that_is_a_piece_of_the_vocabulary_is_not_found_in_text(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "</s>abt")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.decoder = decoders.Fuse()
    folder = saved(tmp_path, backend, eos_token="</s>", unk_token="<unk>")
    pretrained = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    text = "at</s>b</s>"
    assert tokenizer.eos_id in pretrained(text, split_special_tokens=True).input_ids  # the trap
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert tokenizer.eos_id not in tokenizer.encode([text])[0]


def test_the_size_counts_added_tokens_and_the_largest_id(tokenizer, tiny_tokenizer, tmp_path):
    pretrained = AutoTokenizer.from_pretrained(tiny_tokenizer)
    pretrained.add_tokens(["<new>", "<newer>"])
    pretrained.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).vocab_size == tokenizer.vocab_size + 2 == len(pretrained)


def test_bos_is_only_what_the_tokenizer_adds_to_plain_text(tiny_tokenizer, tmp_path):
    pretrained = AutoTokenizer.from_pretrained(tiny_tokenizer)
    pretrained.add_special_tokens({"bos_token": "<s>"})
    pretrained.save_pretrained(tmp_path / "has")
    backend = pretrained.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", pretrained.bos_token_id)]
    )
    saved(tmp_path / "adds", backend, bos_token="<s>", eos_token=END_OF_TEXT)
    assert load_tokenizer(str(tmp_path / "has")).bos_id is None
    assert load_tokenizer(str(tmp_path / "adds")).bos_id == pretrained.bos_token_id


def test_the_fingerprint_survives_saving_and_another_chat_template(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    pretrained = AutoTokenizer.from_pretrained(tmp_path / "saved")
    pretrained.chat_template = "{{ messages }}"
    pretrained.save_pretrained(tmp_path / "other")
    assert fingerprint_of(str(tmp_path / "saved")) == tokenizer.fingerprint
    assert fingerprint_of(str(tmp_path / "other")) == tokenizer.fingerprint


def test_the_fingerprint_changes_with_the_vocabulary_the_merges_and_the_end(
    tokenizer, tiny_tokenizer, tmp_path
):
    prints = {tokenizer.fingerprint}
    added = AutoTokenizer.from_pretrained(tiny_tokenizer)
    added.add_tokens(["<new>"])
    added.save_pretrained(tmp_path / "added")
    other_end = AutoTokenizer.from_pretrained(tmp_path / "added")
    other_end.eos_token = "<new>"
    other_end.save_pretrained(tmp_path / "end")
    content = json.loads((tiny_tokenizer / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-60]
    backend = Tokenizer.from_str(json.dumps(content))
    saved(tmp_path / "merges", backend, eos_token=END_OF_TEXT)
    prints |= {fingerprint_of(str(tmp_path / name)) for name in ("added", "end", "merges")}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },
        {"add_dummy_prefix": False, "normalization_rule_name": "identity"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nmt_nfkc_cf", "split_digits": True},
    ],
    ids=str,
)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(tmp_path, options):
    path = sentencepiece_model(tmp_path / "m.model", **options)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(path))
    assert [ids.tolist() for ids in tokenizer.encode(TEXTS)] == original.encode(TEXTS)
    assert tokenizer.eos_id == original.eos_id()
    assert tokenizer.vocab_size == original.vocab_size()
    tokenizer.save(tmp_path / "saved")
    assert fingerprint_of(str(tmp_path / "saved")) == tokenizer.fingerprint


def test_a_sentencepiece_model_that_cannot_be_converted_exactly_is_refused(tmp_path):
    path = sentencepiece_model(
        tmp_path / "m.model",
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=False,
    )
    with pytest.raises(BadInput, match="gets other ids than from sentencepiece"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_trained_tokenizer_gives_every_text_back(tmp_path, kind):
    path = train_tokenizer(generated_texts(200), vocab_size=400, kind=kind, folder=tmp_path / "t")
    tokenizer = load_tokenizer(str(path))
    texts = [text for text in TEXTS if kind == "bpe" or SPACE not in text]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    assert tokenizer.bos_id is None and tokenizer.vocab_size <= 400
    assert sum(map(len, tokenizer.encode(generated_texts(20)))) < sum(map(len, generated_texts(20)))
    with pytest.raises(BadInput, match="already holds"):
        train_tokenizer([], vocab_size=400, kind=kind, folder=tmp_path / "t")


def test_training_is_the_same_each_time(tmp_path):
    prints = set()
    for name in ("a", "b"):
        path = train_tokenizer(
            generated_texts(50), vocab_size=300, kind="bpe", folder=tmp_path / name
        )
        prints.add(fingerprint_of(str(path)))
    assert len(prints) == 1


def test_files_and_folders_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("bad.model", "empty.model", "missing.model", "folder"):
        with pytest.raises(BadInput, match=name):
            load_tokenizer(str(tmp_path / name))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken("<pad>")])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BadInput, match="no eos token"):
        load_tokenizer(str(saved(tmp_path, backend, pad_token="<pad>")))


def test_offsets_of_a_rendered_text_are_characters(tokenizer):
    text = "the 混合\n"
    encoded = tokenizer.encode_rendered(text)
    characters = sorted(set(zip(encoded.begins.tolist(), encoded.ends.tolist(), strict=True)))
    assert "".join(text[begin:end] for begin, end in characters) == text
    assert encoded.ids.dtype == np.uint32
