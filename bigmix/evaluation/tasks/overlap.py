"""Outputs and references go in, the n-grams that they share come out: BLEU and chrF by sacrebleu,
ROUGE by rouge-score.

The libraries are an extra: they are imported where they are used, once the recipe is known to ask
for them.
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

# A Chinese character, or the letters of a word in another script; Latin letters end where Greek
# begins.
_NOT_LATIN = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})[^\W\x00-\u036f])+")
_CHINESE_FROM = 0.3  # of all characters of the references


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The counts of each output [N, K], and the score from 0 to 1 of sums of them."""

    statistics_NK: Floats
    value_of: Callable[[Floats], float]


def bleu_statistics(
    outputs: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> Overlap:
    """sacrebleu's corpus BLEU; `auto` cuts mostly Chinese references as `zh`, others as `13a`."""
    from sacrebleu.metrics import BLEU

    chosen = tokenizer_of(references) if tokenizer == "auto" else tokenizer
    return _statistics(BLEU(tokenize=chosen), outputs, references)


def chrf_statistics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Overlap:
    """sacrebleu's corpus chrF; it looks at characters, so that no language needs a tokenizer."""
    from sacrebleu.metrics import CHRF

    return _statistics(CHRF(), outputs, references)


def tokenizer_of(references: Sequence[Sequence[str]]) -> str:
    """zh where so many characters of the references are Chinese that words between spaces mean
    little.
    """
    text = "".join(text for each in references for text in each)
    return "zh" if len(CHINESE.findall(text)) > _CHINESE_FROM * len(text) else "13a"


def _statistics(
    metric: Any, outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> Overlap:
    # The statistics behind corpus_score, which its own significance tests draw from.
    rows = metric._extract_corpus_statistics(outputs, list(zip_longest(*references)))

    def value_of(sums_K: Floats) -> float:
        # Whole numbers: the smoothing of BLEU looks for counts that are 0.
        counts = [round(float(count)) for count in sums_K]
        return float(metric._compute_score_from_stats(counts).score) / 100

    return Overlap(statistics_NK=np.array(rows, np.float64), value_of=value_of)


def rouge_values(name: str, outputs: Sequence[str], references: Sequence[str]) -> list[float]:
    """rouge-score's F1 of each output with the reference that it is nearest to, without stemming.

    Its own words are of ASCII letters and digits alone, so that texts in other scripts would have
    none: here each Chinese character is a word as well, and each word of any script but Latin, such
    as Cyrillic or Hangul.
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
    """Cuts a text as rouge-score does, and takes what is not Latin as words, too."""

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        found: list[str] = []
        at = 0
        for match in _NOT_LATIN.finditer(text):
            found += [*tokenize(text[at : match.start()], None), match.group().lower()]
            at = match.end()
        return [*found, *tokenize(text[at:], None)]
