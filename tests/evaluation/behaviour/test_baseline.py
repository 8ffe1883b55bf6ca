"""The file of the base's answers gives back what was written, or is refused."""

import numpy as np
import pytest

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.baseline import (
    BASE_ANSWERS,
    BaseAnswers,
    parse_base_answers,
    read_base_answers,
)
from bigmix.evaluation.behaviour.prompts import read_prompts, spread
from bigmix.evaluation.behaviour.records import Answer, AnswerScores, ChatPrompts


def answers_of(num, **changed):
    draw = np.random.default_rng(num)
    answers = [
        Answer(tokens=tuple(range(5, 6 + at)), text=f"Answer {at}, é 混.", stops=at % 2 == 0)
        for at in range(num)
    ]
    num_tokens = sum(len(answer.tokens) for answer in answers)
    log_probs = np.log(draw.dirichlet(np.ones(65), num_tokens)).astype(np.float32)
    given = {
        "chat": ChatPrompts(
            prompts=spread(read_prompts(None, ("en", "zh")), num),
            tokens=[tuple(range(3 + at)) for at in range(num)],
            max_new_tokens=12,
        ),
        "answers": answers,
        "scores": AnswerScores(
            nll_N=draw.random(num_tokens).astype(np.float32),
            ids_NK=draw.integers(0, 400, (num_tokens, 64)).astype(np.int32),
            log_probs_NK1=log_probs,
        ),
        "tokenizer": "f" * 64,
        "template": "e" * 64,
    }
    return BaseAnswers(**given | changed)


@pytest.mark.parametrize("num", [1, 20])
def test_a_file_gives_back_what_was_written(tmp_path, num):
    base = answers_of(num)
    assert read_base_answers(tmp_path) is None
    base.write(tmp_path)
    found = parse_base_answers(read_base_answers(tmp_path), base.fingerprint)
    assert [prompt.plain() for prompt in found.chat.prompts] == [
        prompt.plain() for prompt in base.chat.prompts
    ]
    assert (found.chat.tokens, found.chat.max_new_tokens) == (base.chat.tokens, 12)
    assert found.answers == base.answers
    for name in ("nll_N", "ids_NK", "log_probs_NK1"):
        assert np.array_equal(getattr(found.scores, name), getattr(base.scores, name))
        assert getattr(found.scores, name).dtype == getattr(base.scores, name).dtype
    assert (found.tokenizer, found.template) == (base.tokenizer, base.template)
    firsts = np.cumsum([0, *range(1, num)])
    assert found.nll == pytest.approx(np.add.reduceat(base.scores.nll_N, firsts))
    assert found.content() == base.content() == (tmp_path / BASE_ANSWERS).read_bytes()


def test_the_fingerprint_follows_from_prompts_answers_tokenizer_and_template():
    base = answers_of(5)
    chat = base.chat
    others = [
        answers_of(4),
        answers_of(5, tokenizer="0" * 64),
        answers_of(5, template="0" * 64),
        answers_of(5, answers=[*base.answers[:4], Answer(tokens=(5, 9), text="", stops=True)]),
        answers_of(
            5,
            chat=ChatPrompts(
                prompts=chat.prompts, tokens=[(1,), *chat.tokens[1:]], max_new_tokens=12
            ),
        ),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert answers_of(5).fingerprint == base.fingerprint


def test_a_damaged_file_is_refused_with_what_to_do(tmp_path):
    base = answers_of(20)
    content = base.content()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", b"text", content[: len(content) // 2], bytes(flipped)):
        with pytest.raises(BadInput, match=r"base\.npz .* is damaged .*; restore it from a copy"):
            parse_base_answers(damaged, base.fingerprint)


def test_a_file_of_another_version_is_refused(tmp_path):
    base = answers_of(3)
    base.write(tmp_path)
    with np.load(tmp_path / BASE_ANSWERS) as arrays:
        changed = dict(arrays) | {"version": np.array(2)}
    np.savez(tmp_path / BASE_ANSWERS, **changed)
    with pytest.raises(BadInput, match="its version is 2, must be 1"):
        parse_base_answers(read_base_answers(tmp_path), base.fingerprint)


def test_the_answers_of_another_run_are_refused():
    base, other = answers_of(3), answers_of(4)
    with pytest.raises(BadInput, match=f"has the answers {other.fingerprint[:12]}"):
        parse_base_answers(other.content(), base.fingerprint)
