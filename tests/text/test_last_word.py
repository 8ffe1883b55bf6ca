"""The last word of a text is found in its tokens, wherever these cut the text."""

import pytest
from support.corpora import generated_texts

from bigmix.text.last_word import last_word, pieces_of_tokens
from bigmix.text.tokenizer import load_tokenizer, train_tokenizer


@pytest.mark.parametrize(
    ("pieces", "word"),
    [
        (["the", " ri", "ver", ".", "\n"], " river"),
        (["(", "the", " river", ")."], " river"),
        (["it", "'s", " ", "it", "'s", "!"], "it's"),
        (["is", " $", "3", ".", "5", "!"], "3.5"),
        (["a", " **b", "old**"], " **bold**"),
        (["知", "识混", "合", "。"], "合"),
        (["知识混合"], "知识混合"),  # a token is predicted whole
        (["用", "GPU"], "GPU"),
        (["GPU", "用"], "用"),
        ([" हि", "न्दी", "।"], " हिन्दी"),
        (["ไทย"], "ไทย"),
        (["one"], "one"),
        (["...", " !?", "\n"], None),
        ([], None),
    ],
)
def test_the_last_word_is_what_lies_between_spaces_without_punctuation(pieces, word):
    found = last_word([piece.encode() for piece in pieces], is_whole=True)
    assert (found and "".join(pieces[found])) == word


def test_a_word_that_may_have_begun_earlier_does_not_count():
    assert last_word([b"ver", b"."], is_whole=False) is None
    assert last_word([b" ri", b"ver"], is_whole=False) == slice(0, 2)
    assert last_word(["知识".encode()], is_whole=False) == slice(0, 1)


def test_tokens_that_are_parts_of_a_character_belong_to_its_word():
    first, *rest = [bytes([byte]) for byte in "识".encode()]
    assert last_word([b"a ", "知".encode(), first, *rest, "。".encode()], is_whole=True) == slice(
        2, 5
    )
    assert last_word([rest[-1], b" a", first], is_whole=True) == slice(1, 2)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_bytes_of_tokens_are_those_of_the_text(kind, tmp_path):
    texts = generated_texts(200)
    folder = train_tokenizer(texts, vocab_size=400, kind=kind, folder=tmp_path / kind)
    tokenizer = load_tokenizer(str(folder))
    pieces = pieces_of_tokens(tokenizer)
    for text in ["the river keeps 知识.", "café 3.5 混合 ü\n", "it's"]:
        (ids,) = tokenizer.encode([text])
        written = b"".join(pieces[token] for token in ids).decode()
        assert written.strip() == text.strip()
    assert pieces[tokenizer.eos_id] == b"\n"
