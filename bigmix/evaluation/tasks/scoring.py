"""Scores answers against references, each score with its 95 % interval over examples.

Every score is a function of sums over examples, so that a bootstrap over examples needs only the
sums and not the texts. Letters: N examples, K statistics of one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.evaluation.bootstrap import Estimate, interval, resampled_sums
from bigmix.evaluation.tasks.examples import Example
from bigmix.evaluation.tasks.matching import exact_match, label_of, numeric_match, token_f1
from bigmix.evaluation.tasks.overlap import bleu_statistics, chrf_statistics, rouge_values
from bigmix.recipe.task import Task
from bigmix.seeding import key_of
from bigmix.types import Floats

_BY_TEXT = {"exact_match": exact_match, "numeric_match": numeric_match, "token_f1": token_f1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """An example, the outputs of the model for it, and how many of them pass its test."""

    example: Example
    outputs: tuple[str, ...]
    num_passed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswers:
    """A score as a function of sums over examples; `values_N` is the score of each single example,
    None where it has none.
    """

    statistics_NK: Floats
    value_of: Callable[[Floats], float]
    values_N: Floats | None


def score_answers(
    name: str, answered: Sequence[Answered], task: Task, labels: tuple[str, ...]
) -> ScoredAnswers:
    """The statistics of one of the scores of a task."""
    if name in _BY_TEXT:
        return _mean([_mean_over_outputs(_BY_TEXT[name], each) for each in answered])
    if name == "accuracy":
        return _mean([_share_right(each, labels) for each in answered])
    if name == "macro_f1":
        return _macro_f1(answered, labels)
    if name.startswith("pass@"):
        k = int(name.removeprefix("pass@"))
        return _mean([pass_at(k, len(each.outputs), each.num_passed) for each in answered])
    if name.startswith("rouge"):
        return _mean(_rouge(name, answered))
    return _overlap(name, answered, task)


def scored(name: str, answers: ScoredAnswers) -> Estimate:
    """The score over all examples, from 0 to 1, with its interval, drawn by `name`."""
    sums_RK = resampled_sums(answers.statistics_NK, key_of("interval", name))
    low, high = interval(np.array([answers.value_of(sums_K) for sums_K in sums_RK]))
    return Estimate(value=answers.value_of(answers.statistics_NK.sum(axis=0)), low=low, high=high)


def pass_at(k: int, num_outputs: int, num_passed: int) -> float:
    """The unbiased estimate of the chance that one of k outputs passes (Chen et al., 2021): with 1
    of 2 outputs, pass@1 is 0.5.
    """
    return 1.0 - math.comb(num_outputs - num_passed, k) / math.comb(num_outputs, k)


def _mean(values: Sequence[float]) -> ScoredAnswers:
    values_N = np.array(values, np.float64)
    return ScoredAnswers(
        statistics_NK=np.stack([values_N, np.ones_like(values_N)], axis=1),
        value_of=lambda sums_K: float(sums_K[0] / sums_K[1]),
        values_N=values_N,
    )


def _mean_over_outputs(match: Callable[[str, str], float], answered: Answered) -> float:
    """The mean over outputs of their best match with a reference."""
    references = answered.example.references
    best = [
        max(match(output, reference) for reference in references) for output in answered.outputs
    ]
    return sum(best) / len(best)


def _share_right(answered: Answered, labels: tuple[str, ...]) -> float:
    """The share of the outputs that are a correct label."""
    right = [label_of(output, labels) in answered.example.references for output in answered.outputs]
    return sum(right) / len(right)


def _rouge(name: str, answered: Sequence[Answered]) -> list[float]:
    values = [rouge_values(name, each.outputs, each.example.references) for each in answered]
    return [sum(each) / len(each) for each in values]


def _macro_f1(answered: Sequence[Answered], labels: tuple[str, ...]) -> ScoredAnswers:
    """The mean of the F1 of each label that is a reference or an answer; an answer that is no label
    is not a class of its own.
    """
    columns = {label: at for at, label in enumerate(labels)}
    correct, predicted, expected = np.zeros((3, len(answered), len(labels)))
    for at, each in enumerate(answered):
        answer = label_of(each.outputs[0], labels)
        references = each.example.references
        # Of several references, the one that was answered.
        reference = answer if answer in references else references[0]
        expected[at, columns[reference]] = 1
        if answer is not None:
            predicted[at, columns[answer]] = 1
            correct[at, columns[answer]] = answer == reference
    return ScoredAnswers(
        statistics_NK=np.concatenate([correct, predicted, expected], axis=1),
        value_of=_macro_f1_of,
        values_N=None,
    )


def _macro_f1_of(sums_K: Floats) -> float:
    correct, predicted, expected = np.split(sums_K, 3)
    occurs = predicted + expected > 0
    return float((2 * correct[occurs] / (predicted + expected)[occurs]).mean())


def _overlap(name: str, answered: Sequence[Answered], task: Task) -> ScoredAnswers:
    outputs = [each.outputs[0] for each in answered]
    references = [each.example.references for each in answered]
    if name == "bleu":
        overlap = bleu_statistics(outputs, references, task.bleu_tokenizer)
    else:
        overlap = chrf_statistics(outputs, references)
    return ScoredAnswers(
        statistics_NK=overlap.statistics_NK,
        value_of=overlap.value_of,
        values_N=np.array([overlap.value_of(row_K) for row_K in overlap.statistics_NK]),
    )
