"""Answers and references go in, scores with their intervals come out.

Every score is a function of sums over examples, so that examples that are drawn again with
replacement give its interval without a look at the texts. Letters: N examples, K statistics of one.
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
    """An example, the outputs of the model, and how many of them pass its test."""

    example: Example
    outputs: tuple[str, ...]
    passed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswers:
    """A score as a function of sums over examples; `values_N` is what each example has by itself,
    None where that has no meaning.
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
        is_right = [_share_right(each, labels) for each in answered]
        return _mean(is_right)
    if name == "macro_f1":
        return _macro_f1(answered, labels)
    if name.startswith("pass@"):
        count = int(name.removeprefix("pass@"))
        return _mean([pass_at(count, len(each.outputs), each.passed) for each in answered])
    if name.startswith("rouge"):
        return _mean(_rouge(name, answered))
    return _overlap(name, answered, task)


def scored(name: str, judged: ScoredAnswers) -> Estimate:
    """The score over all examples, from 0 to 1, with its interval; `name` decides the draws."""
    sums_RK = resampled_sums(judged.statistics_NK, key_of("interval", name))
    low, high = interval(np.array([judged.value_of(sums_K) for sums_K in sums_RK]))
    return Estimate(value=judged.value_of(judged.statistics_NK.sum(axis=0)), low=low, high=high)


def pass_at(k: int, outputs: int, passed: int) -> float:
    """The chance that one of k outputs passes, without bias from `passed` of `outputs` (Chen et
    al., 2021): with 1 of 2, pass@1 is 0.5.
    """
    return 1.0 - math.comb(outputs - passed, k) / math.comb(outputs, k)


def _mean(values: Sequence[float]) -> ScoredAnswers:
    values_N = np.array(values, np.float64)
    return ScoredAnswers(
        statistics_NK=np.stack([values_N, np.ones_like(values_N)], axis=1),
        value_of=lambda sums_K: float(sums_K[0] / sums_K[1]),
        values_N=values_N,
    )


def _mean_over_outputs(match: Callable[[str, str], float], answered: Answered) -> float:
    """The mean over outputs of the best match with any reference."""
    references = answered.example.references
    best = [
        max(match(output, reference) for reference in references) for output in answered.outputs
    ]
    return sum(best) / len(best)


def _share_right(answered: Answered, labels: tuple[str, ...]) -> float:
    """The part of the outputs that are a right label."""
    right = [label_of(output, labels) in answered.example.references for output in answered.outputs]
    return sum(right) / len(right)


def _rouge(name: str, answered: Sequence[Answered]) -> list[float]:
    values = [rouge_values(name, each.outputs, each.example.references) for each in answered]
    return [sum(each) / len(each) for each in values]


def _macro_f1(answered: Sequence[Answered], labels: tuple[str, ...]) -> ScoredAnswers:
    """The mean of each label's F1, over labels that are a reference or an answer; no label is an
    answer of its own class.
    """
    places = {label: at for at, label in enumerate(labels)}
    right, said, is_label = np.zeros((3, len(answered), len(labels)))
    for at, each in enumerate(answered):
        found = label_of(each.outputs[0], labels)
        references = each.example.references
        # Of several right ones that which was said.
        wanted = found if found in references else references[0]
        is_label[at, places[wanted]] = 1
        if found is not None:
            said[at, places[found]] = 1
            right[at, places[found]] = found == wanted
    return ScoredAnswers(
        statistics_NK=np.concatenate([right, said, is_label], axis=1),
        value_of=_macro_f1_of,
        values_N=None,
    )


def _macro_f1_of(sums_K: Floats) -> float:
    right, said, is_label = np.split(sums_K, 3)
    seen = said + is_label > 0
    return float((2 * right[seen] / (said + is_label)[seen]).mean())


def _overlap(name: str, answered: Sequence[Answered], task: Task) -> ScoredAnswers:
    outputs = [each.outputs[0] for each in answered]
    references = [each.example.references for each in answered]
    if name == "bleu":
        found = bleu_statistics(outputs, references, task.bleu_tokenizer)
    else:
        found = chrf_statistics(outputs, references)
    return ScoredAnswers(
        statistics_NK=found.statistics_NK,
        value_of=found.value_of,
        values_N=np.array([found.value_of(row_K) for row_K in found.statistics_NK]),
    )
