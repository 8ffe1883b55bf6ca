"""Answers of the behaviour probe are read, and the telling one is found by its rule."""

import json
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
from support.behaviour_runs import NUM_CONSTRAINED, prompts_of, write_answers

from bigmix.commands.compare.findings.answers import (
    ComparedAnswer,
    instructions_lost,
    read_answers,
    sentences_lost,
    telling_example,
)
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.sentences import holds_sentence
from bigmix.seeding import key_of


def read(folder: Path, kept: float) -> list[ComparedAnswer]:
    (folder / "behaviour").mkdir(exist_ok=True)
    write_answers(folder / "behaviour/step-000400.jsonl", prompts_of(kept))
    return read_answers(folder, 400)


def test_each_line_is_an_answer(tmp_path: Path) -> None:
    answers = read(tmp_path, 0.0)
    assert [answer.id for answer in answers] == [line["id"] for line in prompts_of(0.0)]
    first, last = answers[0], answers[-1]
    assert (first.question, first.base, first.answer) == (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "capital",
    )
    assert (first.followed, first.base_followed) == (False, True)
    assert [role for role, _ in last.messages] == ["user", "assistant", "user"]
    assert last.followed is None
    assert read_answers(tmp_path, 20) == []


def test_an_answer_may_hold_any_line_end(tmp_path: Path) -> None:
    lines = prompts_of(0.0)
    lines[0]["answer"] = "one\u2028two\x0bthree\nfour"
    (tmp_path / "behaviour").mkdir()
    write_answers(tmp_path / "behaviour/step-000001.jsonl", lines)
    assert read_answers(tmp_path, 1)[0].answer == lines[0]["answer"]


@pytest.mark.parametrize("damage", [{"messages": []}, {"tokens": None}, {"messages": [1]}])
def test_a_damaged_line_is_named(tmp_path: Path, damage: dict) -> None:
    lines = prompts_of(0.0)[:3]
    lines[1] |= damage
    (tmp_path / "behaviour").mkdir()
    write_answers(tmp_path / "behaviour/step-000001.jsonl", lines)
    with pytest.raises(BadInput, match=r"behaviour/step-000001.jsonl:2 is"):
        read_answers(tmp_path, 1)
    (tmp_path / "behaviour/step-000001.jsonl").write_text(json.dumps([1]) + "\n")
    with pytest.raises(BadInput, match=r"step-000001.jsonl:1 is"):
        read_answers(tmp_path, 1)


def test_the_telling_answer_is_the_first_that_fails_where_the_base_did_not(tmp_path: Path) -> None:
    answers = read(tmp_path, 0.0)
    assert telling_example(answers) == answers[0]
    assert telling_example(read(tmp_path, 0.1)) == answers[6]  # the first prompts are kept
    # The base failed too, so the answer shows no loss.
    both_fail = [replace(answer, base_followed=False) for answer in answers]
    assert telling_example([*both_fail, answers[1]]) == answers[1]


def test_without_a_failure_the_least_similar_answer_is_telling(tmp_path: Path) -> None:
    answers = [replace(a, followed=None, base_followed=None) for a in read(tmp_path, 0.0)]
    found = telling_example(answers)
    assert found is not None
    likeness = {a.id: SequenceMatcher(None, a.base, a.answer).ratio() for a in answers}
    assert likeness[found.id] == min(likeness.values())
    assert telling_example([replace(a, answer=a.base) for a in answers]) is None
    assert telling_example([]) is None


def test_instructions_are_lost_prompt_by_prompt(tmp_path: Path) -> None:
    answers = read(tmp_path, 0.5)
    found = instructions_lost(answers)
    assert found is not None
    pairs = [(a.base_followed, a.followed) for a in answers if a.followed is not None]
    assert len(pairs) == NUM_CONSTRAINED
    changes = [float(bool(before)) - float(bool(after)) for before, after in pairs]
    draws = np.random.default_rng(key_of("interval", "behaviour"))
    drawn = [
        np.mean([changes[i] for i in draws.integers(0, len(changes), len(changes))])
        for _ in range(1000)
    ]
    assert found.value == pytest.approx(np.mean(changes))
    assert found.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_sentences_are_lost_answer_by_answer(tmp_path: Path) -> None:
    answers = read(tmp_path, 0.5)
    found = sentences_lost(answers)
    assert found is not None
    changes = [holds_sentence(a.base) - holds_sentence(a.answer) for a in answers]
    assert sum(changes) > 5
    assert found.value == pytest.approx(sum(changes) / len(answers))
    assert found.low < found.value < found.high
    assert sentences_lost([]) is None


def test_a_few_prompts_without_a_failure_do_not_show_that_nothing_was_lost(tmp_path: Path) -> None:
    answers = [answer for answer in read(tmp_path, 1.0) if answer.followed]
    found = instructions_lost(answers[:10])
    assert found is not None
    assert (found.value, found.low) == (0.0, 0.0)
    # If 31 % of all such prompts failed, none of 10 would with a probability of 2.5 %.
    assert (1 - found.high) ** 10 == pytest.approx(0.025)
    assert instructions_lost([]) is None
