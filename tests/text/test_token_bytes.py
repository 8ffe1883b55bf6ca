"""The bytes of the tokens of a text are the text; a tokenizer that does not work on bytes is known
as such.
"""

from support.corpora import generated_texts

from bigmix.text.tokenizer import bytes_of_tokens, load_tokenizer, train_tokenizer


def test_the_bytes_of_tokens_end_to_end_are_the_text(tiny_tokenizer):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    table = bytes_of_tokens(tokenizer.backend, tokenizer.vocab_size)
    for text in [
        *generated_texts(50),
        "é 知识\r\n\t👩‍👩‍👧",
        "".join(map(chr, range(300))),
        "<|endoftext|>",
    ]:
        ids = tokenizer.encode_rendered(text).ids
        assert b"".join(table[token] for token in ids) == text.encode()


def test_a_tokenizer_that_does_not_work_on_bytes_has_none(tmp_path):
    path = train_tokenizer(generated_texts(200), vocab_size=400, kind="unigram", folder=tmp_path)
    assert load_tokenizer(str(path)).token_bytes is None
