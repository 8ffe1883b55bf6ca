"""Constraints on answers: which texts each type accepts, and which objects are refused."""

import time

import pytest

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.constraints import (
    TYPES,
    constraint_of,
    followed,
    plain_constraint,
)
from bigmix.evaluation.behaviour.text_measures import AMOUNTS

# A constraint, texts that follow it, and texts that do not.
CASES = [
    (
        {"type": "contains", "any": ["New York", "Zürich", "八"]},
        ["It is in NEW\n YORK.", "new york's parks", "in Zurich", "共八个", "**New York**"],
        ["newyork", "New Yorker", "York", "", "ZurichWest"],
    ),
    (
        {"type": "contains", "any": "12"},
        ["12", "about 12km", "共12个", "12.", "12,", "$12"],
        ["112", "12.5", "3.12", "12,000", "1,200", "twelve"],
    ),
    (
        {"type": "contains", "any": ["it's", "x + y", "CO2"]},
        ["It’s here", "x + y", "x  +\ty", "CO₂ is a gas"],
        ["its here", "x+y is", "CO22"],
    ),
    (
        {"type": "excludes", "any": ["very", ",", "非常"]},
        ["Everyone likes it", "很好。", "every day"],
        ["Very good", "one, two", "一，二", "非常好"],
    ),
    (
        {"type": "occurrences", "of": "rain", "least": 2, "most": 2},
        ["Rain, rain, go away", "rain\nRain rainy"],
        ["rain", "rain rain rain", "rainrain", ""],
    ),
    ({"type": "occurrences", "of": "雨", "least": 2}, ["下雨了，好大的雨"], ["下雨了"]),
    (
        {"type": "in_order", "texts": ["ant", "bee", "cat"]},
        ["ant, bee, cat", "1. Ant\n2. Bee\n3. Cat", "cat, bee, ant become ant, bee, cat"],
        ["ant, cat, bee", "bee, cat", "antelope, bee, cat", "cat, bee, ant"],
    ),
    ({"type": "in_order", "texts": ["1", "2", "10"]}, ["1, 2, 10"], ["10, 2, 1", "1, 10, 2"]),
    (
        {"type": "starts_with", "any": ["Dear", "“Hello"]},
        ["Dear Sam,", " **Dear** all", '"Dear', "“Hello”", '"hello"'],
        ["Dearest Sam", "My Dear", ""],
    ),
    ({"type": "starts_with", "any": ["- "]}, ["- one"], ["-- one", "one - two"]),
    (
        {"type": "ends_with", "any": ["the end", "?"]},
        [
            "This is The End.",
            "**The end**",
            "so what?",
            "“The end!”",
            "Really?\n",
            "Really? (Yes?)",
        ],
        ["The end is near", "weekend", "the bend", "What? No.", ""],
    ),
    ({"type": "ends_with", "any": ["谢谢"]}, ["非常感谢，谢谢！", "谢谢。"], ["谢谢你"]),
    (
        {"type": "one_of", "options": ["Yes", "new york", "H2O", "1,500", "-3", "上海"]},
        ["yes.", "**YES!**", "New York", "H₂O", "1,500", "-3", "上海。", "“上海”", "Yes\n"],
        ["Yes, it is", "york", "newyork", "1500 m", "3", "在上海", ""],
    ),
    (
        {"type": "matches", "pattern": r"\d{4}-\d\d-\d\d"},
        ["2024-02-29", " 2024-02-29\n"],
        ["2024-2-29", "On 2024-02-29", "2024-02-29."],
    ),
    (
        {"type": "num_words", "least": 3, "most": 4},
        [
            "one two three",
            "- one\n- two\n- three",
            "我喜欢你",
            "用Python写",
            "it's a well-known fact",
        ],
        ["one two", "one - two", "a b c d e", "我很喜欢你", "", "1. one\n2. two"],
    ),
    (
        {"type": "num_characters", "least": 2, "most": 4},
        ["春暖花开", "春暖，花开！", "a 1", "ab-cd"],
        ["春", "春天花会开", "!!!!", "abcde"],
    ),
    (
        {"type": "num_sentences", "least": 2, "most": 2},
        [
            "One. Two.",
            "One! Two",
            "一句。两句！",
            "Mr. Smith paid 3.50 dollars. He left.",
            "He said “no.” She left.",
            "The U.S. team won, e.g. twice. Good.",
            "1. One\n2. Two",
            "Wait... what? ",
            "J. R. R. Tolkien wrote it. I read it.",
            "Is it? 是的。",
            "**One.** Two.",
        ],
        ["One.", "One, two", "One. Two. Three.", "", "Hm... "],
    ),
    (
        {"type": "num_lines", "most": 2, "least": 2},
        ["a\nb", "a\n\n\nb\n"],
        ["a", "a\nb\nc", ""],
    ),
    ({"type": "num_paragraphs", "least": 2}, ["a\n\nb", "a\n \nb\n\nc"], ["a\nb", "", "a\n\n"]),
    (
        {"type": "num_bullets", "least": 2, "most": 2},
        [
            "- a\n- b",
            "Two:\n* **a**\n* b\nBye",
            "• 苹果\n•梨",
            "-苹果\n-梨",
            "  - a\n  - -5 degrees",
        ],
        [
            "- a",
            "1. a\n2. b",
            "a - b\nc - d",
            "**a**\n**b**",
            "- a\n- b\n- c",
            "---\n- a",
            "-5\n-6",
        ],
    ),
    (
        {"type": "num_numbered", "least": 3, "most": 3},
        [
            "1. a\n2. b\n3. c",
            "Steps:\n\n1) a\n   more\n2) b\n3) c",
            "1、洗\n2、切\n3、炒",
            "**1. a**\n2. b\n3. c",
        ],
        [
            "1. a\n2. b",
            "1. a\n1. b\n1. c",
            "2. a\n3. b\n4. c",
            "- a\n- b\n- c",
            "1.5 m\n2.5 m\n3.5 m",
        ],
    ),
    (
        {"type": "num_items", "least": 3, "most": 3},
        ["a, b, c", "红、黄、蓝", "红，黄，蓝。", "a,b, and c"],
        ["a, b", "a, b, c, d", "a b c", ",,,"],
    ),
    ({"type": "uppercase"}, ["YES!", "A1"], ["Yes", "123", "", "是"]),
    ({"type": "lowercase"}, ["yes!", "a1 é"], ["Yes", "123", ""]),
    (
        {"type": "json", "keys": ["a", "b"]},
        ['{"a": 1, "b": [2]}', ' {"b": null, "a": ""}\n', '```json\n{"a": 1, "b": 2}\n```'],
        ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', "[1, 2]", "a b", "{'a': 1, 'b': 2}", ""],
    ),
    (
        {"type": "json", "items": 2},
        ["[1, 2]", '```\n["a", {}]\n```'],
        ["[1]", '{"a": 1, "b": 2}', "1, 2", 'Here it is:\n```json\n["a", "b"]\n```'],
    ),
    ({"type": "json"}, ["{}", "[]"], ["1", '"a"', "null", "[" * 100_000]),
    (
        {"type": "number", "value": 36},
        [
            "36",
            "6 × 6 = 36",
            "It is 36.0 m².",
            "$36",
            "thirty-six",
            "Thirty six eggs",
            "三十六个",
            "答案是36。",
            "３６",
        ],
        ["35", "36 or 37", "", "none", "thirty", "三十", "360", "six times six"],
    ),
    (
        {"type": "number", "value": -1250.5},
        ["-1,250.5", "−1250.50 euros"],
        ["1250.5", "-1,250", "-1251"],
    ),
    (
        {"type": "number", "value": 2305},
        ["two thousand three hundred and five", "两千三百零五"],
        ["5"],
    ),
    ({"type": "number", "value": 10}, ["十", "ten"], ["十一", "eleven"]),
    ({"type": "number", "value": 120_000}, ["十二万", "one hundred twenty thousand"], ["十二"]),
    ({"type": "number", "value": 105}, ["one hundred and five", "一百零五"], ["一百五十"]),
    (
        {"type": "language", "is": "zh"},
        ["好的，没问题。", "用 Python 语言写"],
        ["OK", "", "123", "The word 好 means good", "北京 is a large city"],
    ),
    (
        {"type": "language", "is": "en"},
        ["Fine.", "The word 好 means good here", "café"],
        ["好的", "", "123", "Привет", "好好好 good", "你好 hello"],
    ),
    (
        {"type": "code"},
        [
            "x = 1",
            "```python\nprint(1)\n```",
            "Use this:\n```\nlen(x)\n```\nDone",
            "`sum(x)`",
            "x[::-1]",
        ],
        [
            "capital",
            "The sum is 3",
            "```python\ndef f(:\n```",
            "",
            "3 - 1",
            "yes, no",
            "a\0b",
            "(" * 9999,
        ],
    ),
    (
        {"type": "code", "language": "python", "defines": ["f"]},
        ["def f(): pass", "```py\nasync def f():\n    return 1\n```", "class f: pass"],
        ["def g(): pass", "f = 1", "f()"],
    ),
    (
        {"type": "table", "columns": 2, "rows": 2},
        [
            "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
            "Here:\n\na | b\n--- | ---\n1 | 2\n3 | 4\n\nThat is all.",
            "|a|b|\n|:--|--:|\n|1|2|\n|3||",
        ],
        [
            "| a | b |\n|---|---|\n| 1 | 2 |",
            "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n| 1 | 2 | 3 |",
            "| a | b |\n| 1 | 2 |\n| 3 | 4 |",
            "|---|---|\n| 1 | 2 |\n| 3 | 4 |",
            "a, b",
            "",
        ],
    ),
    ({"type": "table", "columns": 1}, ["| a |\n|---|\n| 1 |"], ["a\n---\n1"]),
]


@pytest.mark.parametrize(("value", "good", "bad"), CASES, ids=lambda each: str(each)[:40])
def test_a_constraint_accepts_what_follows_it_and_nothing_else(value, good, bad):
    constraint = constraint_of(value)
    assert [text for text in good if not constraint.holds(text)] == []
    assert [text for text in bad if constraint.holds(text)] == []


def test_every_type_is_in_the_table_of_cases_and_has_a_docstring():
    assert {value["type"] for value, _, _ in CASES} == set(TYPES)
    assert all(each.__doc__ for each in TYPES.values())
    assert {name for name in TYPES if name.startswith("num_")} == AMOUNTS.keys()


def test_a_constraint_is_written_as_it_was_read():
    for value, _, _ in CASES:
        plain = plain_constraint(constraint_of(value))
        assert constraint_of(plain) == constraint_of(value)
        assert plain["type"] == value["type"]
        assert plain.keys() <= value.keys()


def test_an_answer_must_follow_all_constraints():
    both = [constraint_of({"type": "uppercase"}), constraint_of({"type": "num_words", "most": 2})]
    assert followed(both, "YES SIR")
    assert not followed(both, "Yes sir") and not followed(both, "YES SIR YES")
    assert followed([], "")


@pytest.mark.filterwarnings("error")
def test_a_program_that_python_warns_about_is_still_a_program():
    assert constraint_of({"type": "code"}).holds('path = "C:\\data"\nassert (path, "is empty")')


@pytest.mark.parametrize(("value", "good", "bad"), CASES, ids=lambda each: str(each)[:40])
def test_long_answers_of_one_sign_end_soon(value, good, bad):
    constraint = constraint_of(value)
    for sign in ["a", " ", "1", "-", "*", "'", "(", "|", "一", "十", ".", "`", "\n", "b'"]:
        start = time.perf_counter()
        constraint.holds(sign * 4000)
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("uppercase", "is 'uppercase', must be an object with a type; known are contains, "),
        ({"any": ["a"]}, "must be an object with a type"),
        ({"type": "contain", "any": ["a"]}, "'contain', which is none; did you mean contains?"),
        ({"type": "zzz"}, "'zzz', which is none; known are contains, excludes"),
        ({"type": "contains"}, "of the type contains has no any; add it"),
        ({"type": "contains", "any": []}, "of the type contains: any is []: "),
        ({"type": "contains", "any": [""]}, "of the type contains: any.0 is '': "),
        ({"type": "json", "key": []}, "has key, which it does not take; it takes type, keys, "),
        ({"type": "language", "is": "fr"}, "of the type language: is is 'fr': it should be 'zh'"),
        ({"type": "language", "in": "zh"}, "it takes type, is"),
        ({"type": "num_words"}, "of the type num_words: has no bound; give least, most or both"),
        ({"type": "num_words", "least": 3, "most": 2}, "least is 3 and most is 2"),
        ({"type": "num_words", "most": True}, "most is True: it should be a number"),
        ({"type": "occurrences", "of": "a"}, "has no bound"),
        ({"type": "matches", "pattern": "("}, "pattern is '(', which is no regular expression"),
        ({"type": "one_of", "options": ["a", "?"]}, "options has one without a letter or digit"),
        ({"type": "number", "value": "many"}, "of the type number: value is 'many': "),
    ],
)
def test_what_is_wrong_with_a_constraint_is_stated(value, message):
    with pytest.raises(BadInput) as caught:
        constraint_of(value)
    assert any(message in fault for fault in caught.value.faults), caught.value.faults


def test_all_faults_of_a_constraint_are_stated():
    with pytest.raises(BadInput) as caught:
        constraint_of({"type": "table", "rows": -1, "cells": 3})
    assert len(caught.value.faults) == 3
