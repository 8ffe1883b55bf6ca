"""Decides whether an answer is in sentences. Nothing here imports torch."""

import re

from bigmix.evaluation.tasks.matching import CHINESE

_FENCED = re.compile(r"```.*?(?:```|\Z)", re.S)
_SENTENCE = re.compile(r"(.+?)(?:[。！？]|[.!?…](?=[\s\"'”’」』)\]*_]|$))")
_WORD = re.compile(
    rf"(?:(?!{CHINESE.pattern})[^\W\d_])+(?:['’-](?:(?!{CHINESE.pattern})[^\W\d_])+)*"
)
_WORDS_OF_SENTENCE, _SIGNS_OF_SENTENCE = 3, 4


def holds_sentence(text: str) -> bool:
    """Whether a text has a whole sentence outside of fenced code.

    A sentence is a part of a line that ends with a full stop, a question mark, an exclamation mark
    or an ellipsis, has none of these before its end, and has three words or four Chinese
    characters; where it has both, n/3 + m/4 must reach 1. A word is made of letters.
    """
    return any(
        len(_WORD.findall(part)) / _WORDS_OF_SENTENCE
        + len(CHINESE.findall(part)) / _SIGNS_OF_SENTENCE
        >= 1
        for line in _FENCED.sub("\n", text).splitlines()
        for part in _SENTENCE.findall(line)
    )
