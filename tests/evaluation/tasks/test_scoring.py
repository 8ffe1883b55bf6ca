"""Scores are those of their reference implementations, and intervals those of drawn examples."""

import re
import string
import time
from collections import Counter
from decimal import Decimal
from itertools import combinations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, f1_score

from bigmix.evaluation.tasks.examples import Example
from bigmix.evaluation.tasks.execution import passes, program_of
from bigmix.evaluation.tasks.matching import exact_match, last_number, numeric_match, token_f1
from bigmix.evaluation.tasks.overlap import tokenizer_of
from bigmix.evaluation.tasks.scoring import Answered, pass_at, score_answers, scored
from bigmix.recipe.task import Task

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "glad", "of", "that"]
LABELS = ("card", "cash", "loan", "rate")


def sentences(count, seed):
    draw = np.random.default_rng(seed)
    return [
        " ".join(draw.choice(WORDS, draw.integers(4, 12))).capitalize() + "." for _ in range(count)
    ]


def answered(outputs, references, passed=None):
    """An example for each output, or for each list of outputs, with its list of references."""
    return [
        Answered(
            example=Example(
                index=at, place="", messages=[], tools=None, references=tuple(own), test=""
            ),
            outputs=(output,) if isinstance(output, str) else tuple(output),
            num_passed=0 if passed is None else passed[at],
        )
        for at, (output, own) in enumerate(zip(outputs, references, strict=True))
    ]


def score(name, answers, labels=(), **settings):
    task = Task(path="-", scores=[name], execute=True, outputs=9, temperature=1.0, **settings)
    return scored("x", score_answers(name, answers, task, labels))


@pytest.fixture(scope="module")
def texts():
    """Outputs, and one to three references of each; some outputs are right and one is empty."""
    outputs, draw = sentences(60, 1), np.random.default_rng(2)
    pools = [sentences(60, seed) for seed in (3, 4, 5)]
    references = [[pool[at] for pool in pools[: draw.integers(1, 4)]] for at in range(60)]
    outputs[0], outputs[5] = "", references[5][0]
    return outputs, references


def transposed(references):
    return [[own[at] if at < len(own) else None for own in references] for at in range(3)]


def test_bleu_and_chrf_are_sacrebleus(texts):
    outputs, references = texts
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        expected = metric.corpus_score(outputs, transposed(references)).score / 100
        assert score(name, answered(outputs, references)).value == pytest.approx(
            expected, abs=1e-12
        )


def test_chinese_is_cut_into_characters_for_bleu():
    outputs, references = ["猫坐在垫子上。", "天气很好"], [["那只猫坐在垫子上。"], ["今天天气很好"]]
    assert tokenizer_of(references) == "zh" and tokenizer_of([["A cat sat."]]) == "13a"
    expected = BLEU(tokenize="zh").corpus_score(outputs, transposed(references)).score / 100
    assert score("bleu", answered(outputs, references)).value == pytest.approx(expected)
    spaces = score("bleu", answered(outputs, references), bleu_tokenizer="13a").value
    assert spaces < expected


def test_rouge_is_rouge_scores_and_knows_chinese(texts):
    outputs, references = texts
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name])
        expected = [
            scorer.score_multi(own, output)[name].fmeasure
            for output, own in zip(outputs, references, strict=True)
        ]
        task = Task(path="-", scores=[name])
        found = score_answers(name, answered(outputs, references), task, ())
        assert found.values_N.tolist() == pytest.approx(expected, abs=1e-12)
    # 猫 坐 垫 of 4 and 3 characters: precision 1, recall 3/4.
    assert score("rouge1", answered(["猫坐垫"], [["猫坐垫上"]])).value == pytest.approx(6 / 7)
    # Words of other scripts, in upper or lower case, besides those of ASCII.
    assert score("rouge1", answered(["Кот сидит тут 7"], [["кот сидит там 7"]])).value == 0.75
    assert score("rouge2", answered(["한국어 단어 둘"], [["한국어 단어 둘"]])).value == 1


def test_labels_are_judged_as_by_scikit_learn():
    draw = np.random.default_rng(0)
    wanted = draw.choice(LABELS[:3], 200).tolist()
    predicted = [w if draw.random() < 0.6 else draw.choice(LABELS) for w in wanted]
    answers = answered(predicted, [[w] for w in wanted])
    assert score("accuracy", answers, LABELS).value == pytest.approx(
        accuracy_score(wanted, predicted)
    )
    expected = f1_score(wanted, predicted, average="macro")
    assert score("macro_f1", answers, LABELS).value == pytest.approx(expected)
    # What is no label at all is wrong, and no class of its own.
    predicted = ["none of them" if at % 7 == 0 else word for at, word in enumerate(predicted)]
    expected = f1_score(wanted, predicted, average="macro", labels=LABELS, zero_division=0)
    found = score("macro_f1", answered(predicted, [[w] for w in wanted]), LABELS).value
    assert found == pytest.approx(expected)


def test_a_label_is_known_in_any_case_and_with_a_full_stop():
    answers = answered([" Card.", "CASH", "loan rate"], [["card"], ["cash"], ["loan"]])
    assert score("accuracy", answers, LABELS).value == pytest.approx(2 / 3)


def test_a_label_that_is_answered_to_the_letter_is_that_one():
    answers = answered(["us", "US", "."], [["us"], ["US"], ["."]])
    assert score("accuracy", answers, ("us", "US", ".", "?")).value == 1
    assert score("macro_f1", answers, ("us", "US", ".", "?")).value == 1


def test_any_of_several_labels_is_right():
    answers = answered(["cash", "card"], [["card", "cash"], ["loan", "cash"]])
    assert score("accuracy", answers, LABELS).value == 0.5
    # As if the labels were cash and loan, the answers cash and card: F1 of cash 1, of card and loan
    # 0.
    assert score("macro_f1", answers, LABELS).value == pytest.approx(1 / 3)


def squad_normalised(text):
    """SQuAD's normalisation, step by step."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(output, reference):
    found, wanted = squad_normalised(output).split(), squad_normalised(reference).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if found and wanted else float(found == wanted)


def test_exact_match_and_f1_are_squads(texts):
    outputs, references = texts
    for output, own in zip(outputs, references, strict=True):
        assert exact_match(output, own[0]) == (squad_normalised(output) == squad_normalised(own[0]))
        assert token_f1(output, own[0]) == pytest.approx(squad_f1(output, own[0]))
    assert exact_match("The  Cat's, mat!", "cats mat") == 1
    assert token_f1("a big cat", "the cat sat") == pytest.approx(0.5)
    best = score("token_f1", answered(["cat"], [["dog", "the cat"]])).value
    assert best == 1  # the best of the references


def test_chinese_words_are_characters():
    assert exact_match("《北京》。", "北京") == 1
    assert token_f1("在北京", "北京市") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.", "1234"),
        ("x = -5", "-5"),
        ("10-5", "5"),
        ("10 - 5 = 5", "5"),
        ("it costs $1,234.50!", "1234.5"),
        ("50% of 8 is 4", "4"),
        ("about 50%", "50"),
        ("3.", "3"),
        ("7 + 3 = 10\n#### 42 apples", "42"),
        ("#### none, but 3 before", "3"),
        ("１２", "12"),
        ("−7", "-7"),
        ("2.5e3", "2500"),
        ("-.5", "-0.5"),
        ("12,345,678", "12345678"),
        ("-1,000", "-1000"),
        ("+7", "7"),
        ("no number", None),
        ("25 m²", "25"),
        ("CO₂ of 7", "7"),
        ("10³", "10"),
        ("1e99999999999999999999", "99999999999999999999"),
        ("2e9999", "2e9999"),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))
    assert numeric_match(text, f"9 #### {number or 1}") == (number is not None)


def test_pass_at_k_is_the_chance_that_one_of_k_drawn_outputs_passes():
    def by_counting(k, outputs, passed):
        draws = list(combinations([True] * passed + [False] * (outputs - passed), k))
        return sum(any(draw) for draw in draws) / len(draws)

    for k, outputs, passed in [(1, 2, 1), (2, 5, 0), (2, 5, 1), (3, 6, 2), (5, 6, 5), (4, 4, 1)]:
        assert pass_at(k, outputs, passed) == pytest.approx(by_counting(k, outputs, passed))
    answers = answered([["x"] * 4] * 2, [[], []], passed=[1, 4])
    assert score("pass@1", answers).value == pytest.approx((0.25 + 1) / 2)


def test_scores_of_several_outputs_are_their_mean():
    answers = answered([["4", "5"], ["6", "6"]], [["4"], ["6"]])
    assert score("numeric_match", answers).value == pytest.approx(0.75)


def test_an_interval_is_that_of_examples_drawn_again(texts):
    outputs, references = texts
    answers = answered(outputs, references)
    draws = np.random.default_rng(0)
    slow = []
    for _ in range(120):
        rows = draws.integers(0, len(outputs), len(outputs))
        own = transposed([references[row] for row in rows])
        slow.append(BLEU().corpus_score([outputs[row] for row in rows], own).score / 100)
    found = score("bleu", answers)
    assert found.low < found.value < found.high
    assert (found.low, found.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.03)
    assert score("bleu", answers) == found


@pytest.mark.slow
def test_programs_run_within_their_limits(tmp_path):
    def judged(output, prompt=None, test="assert twice(2) == 4"):
        return passes(program_of(output, prompt, test), timeout_s=3.0, memory_mib=256)

    assert judged("def twice(x):\n    return 2 * x")
    assert judged("Here it is:\n```python\ndef twice(x):\n    return x + x\n```\nDone.")
    assert judged("    return 2 * x", prompt="def twice(x):\n")
    assert not judged("def twice(x):\n    return 3 * x")
    assert not judged("def twice(x")
    assert not judged("while True: pass")
    # Its end must be reached, not only an end without an error.
    assert not judged("def twice(x): return x\nexit()")
    assert not judged("import os\ndef twice(x): return x\nos._exit(0)")
    main = "if __name__ == '__main__':\n    raise SystemExit(0)"
    assert judged(f"def twice(x):\n    return 2 * x\n{main}")
    typed = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass C:\n"
        "    x: int"
    )
    assert judged(f"{typed}\ndef twice(x):\n    return C(2 * x).x")
    assert not judged("twice = lambda x: len(bytearray(1 << 30)) and 4")
    marker = tmp_path / "late"
    late = f"import time; time.sleep(1); open({str(marker)!r}, 'w')"
    assert judged(
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {late!r}])", test=""
    )
    time.sleep(1.5)
    assert not marker.exists()  # what it has started ends with it
