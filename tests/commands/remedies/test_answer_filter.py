"""Which answers are not learned from, on texts that people and models write."""

import re

import pytest

from bigmix.commands.remedies.answer_filter import (
    REASONS,
    TurnMarks,
    fault_of_answer,
    fault_of_text,
    is_repeating,
    normalised,
)
from bigmix.commands.remedies.outcomes import meaning

SENTENCES = (
    "To boil an egg, bring water to a simmer and lower the egg into it with a spoon. Six minutes"
    " leave the yolk soft, ten make it firm. Cool it in cold water, so that it peels easily."
)
TABLE = "| name | age | city |\n|------|-----|------|\n" + "".join(
    f"| {name} | {age} | Paris |\n" for name, age in (("Ann", 3), ("Bo", 4), ("Cy", 5), ("Di", 6))
)
STEPS = "".join(f"{n}. Take the {what} and put it on the table.\n" for n, what in enumerate("abcd"))
POEM = "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily!"
CODE = "for i in range(3):\n    for j in range(3):\n        print(i, j)\n" * 2
ZEROS = "[[0, 0, 0],\n [0, 0, 0],\n [0, 0, 0]]"
CHINESE = "鸡蛋放进冷水，水开后煮六分钟，蛋黄还是软的；煮十分钟，蛋黄就硬了。最后用凉水冲一下。"
REPEATING = [
    "no " * 24,
    "Sure! " + "I am happy to help you. " * 4,
    "It depends. " + "The first and the second are the same thing, in the end. " * 9,
    "因为天空是蓝色的，" * 5,
    "ha" * 60,
    "!" * 60,
    "- \n" * 55,
    # The words around the number are the same, so no stretch follows on itself.
    "".join(f"Step {n}: take the next of the bricks and lay it on the wall. " for n in range(30)),
    SENTENCES + " and so on" * 9,
]
FINE = [SENTENCES, TABLE, STEPS, POEM, CODE, ZEROS, CHINESE, "Paris", "42", "👍", "a b " * 11, ""]


@pytest.mark.parametrize("text", REPEATING)
def test_the_same_words_again_and_again_are_found(text):
    assert is_repeating(text) and fault_of_text(text, is_cut=False) == "repeating"


@pytest.mark.parametrize("text", FINE)
def test_texts_that_people_write_do_not_repeat_themselves(text):
    assert not is_repeating(text)


def slow_is_periodic(words):
    """Every stretch of the words, compared with itself one period later."""
    for period in range(1, 33):
        shortest = max(24, 4 * period)
        for begin in range(len(words)):
            stretch = words[begin : begin + shortest]
            if len(stretch) == shortest and stretch[period:] == stretch[:-period]:
                return True
    return False


@pytest.mark.parametrize("period", [1, 2, 6, 7, 31, 32, 33])
@pytest.mark.parametrize("missing", [0, 1])
def test_periods_are_found_at_their_least_length(period, missing):
    stretch = [f"w{at % period}" for at in range(max(24, 4 * period) - missing)]
    words = [*(f"a{n}" for n in range(300)), *stretch, *(f"b{n}" for n in range(300))]
    expected = missing == 0 and period <= 32
    assert slow_is_periodic(words) == expected
    assert is_repeating(" ".join(words)) == expected


@pytest.mark.parametrize(
    ("answer", "is_cut", "expected"),
    [
        ("Paris.", False, None),
        ("Paris.", True, "endless"),
        (" \n", False, "empty"),
        ("Pa\N{REPLACEMENT CHARACTER}ris", False, "not_decodable"),
        ("Paris.<|im_end|>", False, "prompt_leak"),
        ("Paris.\nuser\nAnd of Spain?", False, "prompt_leak"),
        ("Paris.\nHuman: And of Spain?", False, "prompt_leak"),
        ("The user decides.", False, None),
        ("Write Human: before it.", False, None),
        ("You are a  POLITE assistant of the shop. Paris.", False, "prompt_leak"),
        ("What is the capital of France? Paris.", False, "prompt_leak"),
        ("You asked: what is the capital of France? Paris.", False, None),
        ("no " * 30, False, "repeating"),
    ],
)
def test_each_reason_has_its_answers(answer, is_cut, expected):
    found = fault_of_answer(
        answer,
        is_cut=is_cut,
        question="What is the capital of France?",
        system="You are a polite assistant of the shop.",
        marks=TurnMarks(specials=re.compile(r"<\|im_end\|>"), openings=("user", "Human:")),
    )
    assert found == expected
    assert found is None or meaning(found) == REASONS[found]


def test_short_questions_and_system_prompts_may_be_said_again():
    marks = TurnMarks(specials=re.compile("(?!)"))
    assert (
        fault_of_answer(
            "Hi there! Be brief.", is_cut=False, question="Hi", system="Be brief.", marks=marks
        )
        is None
    )


def test_normal_forms_are_equal_where_only_case_width_and_spaces_differ():
    assert normalised("  Ｗhat\n IS it？") == normalised("what is it?")
    assert normalised("what is it") != normalised("what was it")
