"""The prompts of the behaviour probe: those that come with bigmix, and the files of users."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.constraints import TYPES, followed
from bigmix.evaluation.behaviour.prompts import BUILT_IN, KINDS, LANGUAGES, read_prompts, spread

PROMPTS = read_prompts(None, LANGUAGES)
# For each prompt with constraints, answers that follow them and answers that do not.
ANSWERS = {
    row["id"]: row
    for row in map(
        json.loads,
        Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines(),
    )
}


def written(folder, rows, name="own.jsonl"):
    path = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def asked(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]


def test_there_are_enough_prompts_of_each_language_and_kind():
    assert Counter(prompt.language for prompt in PROMPTS).keys() == {"en", "zh"}
    by_cell = Counter((prompt.language, prompt.kind) for prompt in PROMPTS)
    kinds = {kind for kind in KINDS if kind != "other"}
    assert by_cell.keys() == {(language, kind) for language in LANGUAGES for kind in kinds}
    assert all(count >= (13 if language == "en" else 9) for (language, _), count in by_cell.items())
    assert sum(count for (language, _), count in by_cell.items() if language == "en") >= 200
    assert sum(count for (language, _), count in by_cell.items() if language == "zh") >= 120
    assert sum(bool(prompt.constraints) for prompt in PROMPTS) >= 250


def test_ids_name_language_and_kind_and_no_prompt_is_there_twice():
    assert len({prompt.id for prompt in PROMPTS}) == len(PROMPTS)
    assert len({json.dumps(prompt.messages) for prompt in PROMPTS}) == len(PROMPTS)
    for prompt in PROMPTS:
        assert prompt.id.rsplit("-", 1)[0] == f"{prompt.language}-{prompt.kind}"


def test_a_conversation_has_earlier_answers_and_no_other_prompt_has():
    for prompt in PROMPTS:
        roles = [turn["role"] for turn in prompt.messages]
        assert roles[-1] == "user"
        assert ("assistant" in roles) == (prompt.kind == "conversation"), prompt.id


def test_some_prompts_of_each_language_have_a_system_turn():
    with_system = Counter(p.language for p in PROMPTS if p.messages[0]["role"] == "system")
    assert with_system["en"] >= 15 and with_system["zh"] >= 10


def test_every_prompt_with_constraints_has_answers_to_check_them_with():
    assert ANSWERS.keys() == {prompt.id for prompt in PROMPTS if prompt.constraints}


@pytest.mark.parametrize("prompt", [p for p in PROMPTS if p.constraints], ids=lambda p: p.id)
def test_the_constraints_of_a_prompt_accept_good_answers_and_refuse_bad_ones(prompt):
    answers = ANSWERS[prompt.id]
    assert answers["good"] and answers["bad"]
    assert [text for text in answers["good"] if not followed(prompt.constraints, text)] == []
    assert [text for text in answers["bad"] if followed(prompt.constraints, text)] == []


@pytest.mark.parametrize("answer", ["", " \n", "the", "capital", "的", "好"])
def test_no_prompt_accepts_what_is_no_answer(answer):
    """What a model writes that has forgotten how to answer."""
    accepting = [p.id for p in PROMPTS if p.constraints and followed(p.constraints, answer)]
    assert accepting == []


def test_the_languages_of_the_built_in_prompts_are_chosen():
    assert {p.language for p in read_prompts(None, ("zh",))} == {"zh"}
    assert len(read_prompts(None, ("en",))) + len(read_prompts(None, ("zh",))) == len(PROMPTS)


def test_a_prompt_is_written_as_it_was_read(tmp_path):
    lines = [json.loads(line) for line in BUILT_IN.read_text(encoding="utf-8").splitlines()]
    assert [prompt.plain() for prompt in PROMPTS] == lines
    path = written(tmp_path, [prompt.plain() for prompt in PROMPTS])
    assert read_prompts(path, ("en",)) == PROMPTS


def test_a_users_file_needs_only_messages(tmp_path):
    path = written(
        tmp_path,
        [
            {"messages": asked("Hello")},
            "",
            {"messages": asked("你好吗？")},
            {"messages": asked("a", "b", "c"), "language": "zh", "id": "mine"},
            {
                "messages": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "kind": "fact",
                "constraints": [{"type": "contains", "any": "x"}],
            },
        ],
    )
    first, second, third, fourth = read_prompts(path, ("en",))
    assert (first.id, first.language, first.kind, first.constraints) == (
        "line-0001",
        "en",
        "other",
        [],
    )
    assert (second.id, second.language) == ("line-0003", "zh")
    assert (third.id, third.language, third.kind) == ("mine", "zh", "conversation")
    assert fourth.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
    ]
    assert followed(fourth.constraints, "an X") and not followed(fourth.constraints, "a Y")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("no json", "is no JSON object; correct the line"),
        ("[1]", "is no JSON object; correct the line"),
        ({}, "has no messages that can be read"),
        ({"messages": []}, "has no messages that can be read"),
        ({"messages": [{"role": "user"}]}, "a message is empty"),
        ({"messages": asked(" ")}, "a message is empty"),
        ({"messages": asked("a", "b")}, "messages have the roles user, assistant; must be"),
        (
            {"messages": [{"role": "system", "content": "a"}]},
            "messages have the roles system; must be",
        ),
        (
            {"messages": [*asked("a"), *asked("b")]},
            "messages have the roles user, user; must be",
        ),
        (
            {"messages": [*asked("a", "b"), {"role": "system", "content": "s"}]},
            "messages have the roles user, assistant, system; must be",
        ),
        ({"messages": asked("\ud800")}, "holds half of a surrogate pair"),
        ({"messages": asked("a"), "language": "fr"}, "language is 'fr', must be one of en, zh"),
        ({"messages": asked("a"), "kind": ["fact"]}, "kind is ['fact'], must be one of fact, "),
        ({"messages": asked("a"), "id": 3}, "id is 3, must be text"),
        ({"messages": asked("a"), "constraint": []}, "has 'constraint'; known are id, language, "),
        ({"messages": asked("a"), "constraints": {}}, "constraints is {}, must be a list"),
        (
            {"messages": asked("a"), "constraints": [{"type": "uppercase"}, {"type": "upper"}]},
            "constraint 2 has the type 'upper', which is none; did you mean uppercase?",
        ),
    ],
)
def test_what_is_wrong_is_stated_with_file_and_line(tmp_path, row, message):
    row = row if isinstance(row, str) else json.dumps(row)
    path = written(tmp_path, [{"messages": asked("fine")}, row])
    with pytest.raises(BadInput) as caught:
        read_prompts(path, LANGUAGES)
    (fault,) = caught.value.faults
    assert fault.startswith(f"{path}, line 2: {message}")


def test_all_faults_of_a_file_are_stated_at_once(tmp_path):
    rows = [
        {"messages": asked("a"), "id": "x", "kind": "poem", "language": "de"},
        {"messages": asked("a"), "id": "y"},
        "",
        {"messages": asked("b"), "id": "y"},
        {"messages": asked("a"), "constraints": [{"type": "json", "key": 1, "items": "some"}]},
        *[{"messages": asked("a", "b")}] * 20,
    ]
    path = written(tmp_path, rows)
    with pytest.raises(BadInput) as caught:
        read_prompts(path, LANGUAGES)
    faults = caught.value.faults
    assert Counter(fault.split(": ")[0].split(" line ")[1] for fault in faults) == Counter(
        {"1": 2, "4": 1, "5": 2} | {str(line): 1 for line in range(6, 26)}
    )
    assert f"{path}, line 4: id is 'y', which line 2 has; give each line its own" in faults


def test_files_that_hold_no_prompts_are_refused(tmp_path):
    with pytest.raises(BadInput, match="holds no prompt; give a file with one JSON object a line"):
        read_prompts(written(tmp_path, []), LANGUAGES)
    with pytest.raises(BadInput, match=r"behaviour.prompts is own.txt, must be a .jsonl file"):
        read_prompts("own.txt", LANGUAGES)
    with pytest.raises(BadInput, match=r"none.jsonl is no file"):
        read_prompts("none.jsonl", LANGUAGES)


@pytest.mark.parametrize("num", [1, 2, 3, 7, 19, 20, 21, 64, 100, 150, 200, 300, 355])
def test_fewer_prompts_are_spread_evenly_over_language_and_kind(num):
    chosen = spread(PROMPTS, num)
    assert len(chosen) == num and len({prompt.id for prompt in chosen}) == num
    positions = [PROMPTS.index(prompt) for prompt in chosen]
    assert positions == sorted(positions)
    sizes = Counter((prompt.language, prompt.kind) for prompt in PROMPTS)
    taken = Counter((prompt.language, prompt.kind) for prompt in chosen)
    # One that has more left is at most one behind any other.
    behind = [taken[cell] for cell, size in sizes.items() if taken[cell] < size]
    assert max(taken.values()) - min(behind) <= 1


def test_two_prompts_have_two_languages_and_all_prompts_stay_as_they_are():
    assert {prompt.language for prompt in spread(PROMPTS, 2)} == {"en", "zh"}
    assert spread(PROMPTS, None) == PROMPTS
    assert spread(PROMPTS, len(PROMPTS) + 1) == PROMPTS


def test_the_prompts_of_a_kind_are_taken_at_equal_distances(tmp_path):
    rows = [{"messages": asked(f"question {at}")} for at in range(10)]
    prompts = read_prompts(written(tmp_path, rows), LANGUAGES)
    assert [prompt.id for prompt in spread(prompts, 4)] == [
        f"line-{at + 1:04}" for at in (0, 2, 5, 7)
    ]


def test_the_page_describes_what_there_is():
    page = (Path(__file__).parents[3] / "docs/behaviour-prompts.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (`.+?`) \|", page, re.M)
    names = {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}
    assert names == {*KINDS, *TYPES, "messages", "constraints", "id", "language", "kind"}


def test_the_example_of_the_page_is_read(tmp_path):
    page = (Path(__file__).parents[3] / "docs/behaviour-prompts.md").read_text(encoding="utf-8")
    (prompt,) = read_prompts(written(tmp_path, re.findall(r"```json\n(.+)\n```", page)), ("en",))
    assert followed(prompt.constraints, "Line 17 does.")
