"""Scores of shared n-grams: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

The libraries are optional: each is imported where it is used, since a recipe may need neither.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import numpy as np

from bigmix.evaluation.tasks.matching import CHINESE
from bigmix.types import Floats

# A Chinese character, or the letters of a word in another script; the code points of Latin letters
# end where those of Greek begin.
_NOT_LATIN = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})[^\W\x00-\u036f])+")
_CHINESE_FROM = 0.3  # of all characters of the references


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The counts of each output [N, K], and the function from their sums to a score from 0 to 1."""

    statistics_NK: Floats
    value_of: Callable[[Floats], float]


def bleu_statistics(
    outputs: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> Overlap:
    """sacrebleu's corpus BLEU; `auto` is `zh` for mostly Chinese references, `13a` for others."""
    from sacrebleu.metrics import BLEU

    chosen = tokenizer_of(references) if tokenizer == "auto" else tokenizer
    return _statistics(BLEU(tokenize=chosen), outputs, references)


def chrf_statistics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    """sacrebleu's corpus chrF; it compares characters, so it needs no tokenizer of a language."""
    from sacrebleu.metrics import CHRF

    return _statistics(CHRF(), outputs, references)


def tokenizer_of(references: Sequence[Sequence[str]]) -> str:
    """zh where more than 30 % of the characters of the references are Chinese, which has no spaces
    between words; else 13a.
    """
    text = "".join(text for each in references for text in each)
    return "zh" if len(CHINESE.findall(text)) > _CHINESE_FROM * len(text) else "13a"


def _statistics(
    metric: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> Overlap:
    # The statistics of corpus_score, which sacrebleu's own significance tests resample.
    rows = metric._extract_corpus_statistics(outputs, list(zip_longest(*references)))

    def value_of(sums_K: Floats) -> float:
        # As integers: the smoothing of BLEU tests counts for 0.
        counts = [round(float(count)) for count in sums_K]
        return float(metric._compute_score_from_stats(counts).score) / 100

    return Overlap(statistics_NK=np.array(rows, np.float64), value_of=value_of)


def rouge_values(name: str, outputs: Sequence[str], references: Sequence[str]) -> list[float]:
    """rouge-score's F1 of each output with the reference that gives the highest, without stemming.

    rouge-score itself only knows words of ASCII letters and digits, so that texts in other scripts
    would have none: here each Chinese character is a word as well, and each word in a script other
    than Latin, such as Cyrillic or Hangul.
    """
    scorer = _rouge_scorer(name)
    return [
        float(scorer.score_multi(list(references), output)[name].fmeasure) for output in outputs
    ]


@lru_cache(maxsize=3)
def _rouge_scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], tokenizer=_Words())


class _Words:
    """Splits a text into words as rouge-score does, and words that are not Latin as well."""

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        found: list[str] = []
        at = 0
        for match in _NOT_LATIN.finditer(text):
            found += [*tokenize(text[at : match.start()], None), match.group().lower()]
            at = match.end()
        return [*found, *tokenize(text[at:], None)]
