"""Decides which answers of a model are not learned from; the reason is one word, for counting.

Words are runs of letters and digits in any case; in scripts that are written without spaces each
character is a word. Punctuation and symbols are no words.

Letters: N words of a text, P words of a period.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.types import Ints

# What is wrong with an answer, as a table of the command has it.
REASONS: Mapping[str, str] = {
    "endless": "not ended by the model within --max-tokens",
    "empty": "no text",
    "not_decodable": "bytes that are not UTF-8",
    "repeating": "the same words again and again",
    "prompt_leak": "the system prompt, the question or marks of the chat template in it",
    "repeated": "the same prompt and answer as before",
    "question_repeated": "the model has written the same question before",
    "question_not_rendered": "the chat template does not render the question",
}
LONGEST_PERIOD = 32  # words
FEWEST_PERIODS = 4
FEWEST_WORDS = 24  # of all periods together
NGRAM = 6
MOST_REPEATED = 0.5  # of all n-grams of a text
FEWEST_NGRAMS = 40
LONGEST_COPY = 20  # characters of a prompt from which on an answer that has them all is a copy

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_SAME_SIGNS = re.compile(r"(\S.{0,7}?)\1{49,}", re.DOTALL)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnMarks:
    """What a chat template writes around turns that an answer must not contain: `specials` are the
    strings of special tokens, `openings` what is between the answer and the next question without
    them, such as `user`.
    """

    specials: re.Pattern[str]
    openings: Sequence[str] = ()


def normalised(text: str) -> str:
    """The text with its case, the form of its characters and the width of its spaces removed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fault_of_answer(
    answer: str, *, is_cut: bool, question: str, system: str | None, marks: TurnMarks
) -> str | None:
    """Why an answer is not learned from, a key of REASONS; None where nothing is wrong with it."""
    fault = fault_of_text(answer, is_cut=is_cut)
    if fault is None and _leaks(answer, question, system, marks):
        return "prompt_leak"
    return fault


def fault_of_text(text: str, *, is_cut: bool) -> str | None:
    """What is wrong with a text whatever it answers to."""
    if is_cut:
        return "endless"
    if not text.strip():
        return "empty"
    if _REPLACEMENT in text:
        return "not_decodable"
    return "repeating" if is_repeating(text) else None


def is_repeating(text: str) -> bool:
    """Whether a text has the same words again and again.

    That is the case where up to 32 words follow directly on themselves, at least 4 times and at
    least 24 words in all; where at least half of its n-grams of 6 words, of 40 or more, have
    occurred before in it; and where the same 1 to 8 characters follow on themselves 50 times.
    """
    words = _WORD.findall(text.casefold())
    index = {word: at for at, word in enumerate(dict.fromkeys(words))}
    ids_N = np.array([index[word] for word in words], np.int64)
    return (
        any(_is_periodic(ids_N, period) for period in range(1, LONGEST_PERIOD + 1))
        or _repeated_part(words) >= MOST_REPEATED
        or _SAME_SIGNS.search(text) is not None
    )


def _is_periodic(ids_N: Ints, period: int) -> bool:
    """Whether a stretch of the words repeats its first `period` words often enough.

    In a b c b c b c d, with a period of 2, words 3 to 6 equal the words 2 places before: a run of
    4, and a stretch of 4 + 2 words.
    """
    needed = max(FEWEST_WORDS, FEWEST_PERIODS * period) - period
    if len(ids_N) < needed + period:
        return False
    differs = np.flatnonzero(ids_N[period:] != ids_N[:-period])
    borders = np.concatenate([[-1], differs, [len(ids_N) - period]])
    return int(np.diff(borders).max()) - 1 >= needed


def _repeated_part(words: Sequence[str]) -> float:
    """The part of the n-grams that have occurred before; 0 where there are too few of them."""
    ngrams = list(zip(*(words[at:] for at in range(NGRAM)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if len(ngrams) >= FEWEST_NGRAMS else 0.0


def _leaks(answer: str, question: str, system: str | None, marks: TurnMarks) -> bool:
    if marks.specials.search(answer) or any(_opens_turn(answer, marks.openings)):
        return True
    plain, asked = normalised(answer), normalised(question)
    told = "" if system is None else normalised(system)
    copies_system = len(told) >= LONGEST_COPY and told in plain
    return copies_system or (len(asked) >= LONGEST_COPY and plain.startswith(asked))


def _opens_turn(answer: str, openings: Sequence[str]) -> Iterator[bool]:
    """Whether each opening is a line of the answer; where it ends with a sign, such as `User:`,
    whether it begins a line.
    """
    lines = [line.strip() for line in answer.splitlines()]
    for opening in openings:
        yield opening in lines or (
            not opening[-1].isalnum() and any(line.startswith(opening) for line in lines)
        )
