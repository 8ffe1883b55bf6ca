"""Compares an output with a reference, from 0 to 1; pure functions of two texts."""

import re
import string
import unicodedata
from collections import Counter
from decimal import Decimal

# Scripts that are written without spaces: each character is a word.
_CHINESE = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
CHINESE = re.compile(f"[{_CHINESE}]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = re.compile(
    f"[{re.escape(string.punctuation)}\u3000-\u3004\u3008-\u303f"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\u00b7]"
)
# A sign belongs to a number only where nothing precedes it that could be subtracted from.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,4}(?!\d))?"
)
# The ² of m² is not a number; full-width digits are.
_RAISED_OR_LOWERED = re.compile("[\u00b2\u00b3\u00b9\u2070-\u2079\u2080-\u2089]")
_ANSWER = "####"  # GSM8K writes its answers after it


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, no ASCII punctuation, no articles, one space between
    words.

    Full-width punctuation is removed as well, as CMRC does.
    """
    text = _PUNCTUATION.sub("", text.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def words(text: str) -> list[str]:
    """The words of a normalised text; each Chinese character is one."""
    return CHINESE.sub(r" \g<0> ", normalised(text)).split()


def exact_match(output: str, reference: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(normalised(output) == normalised(reference))


def token_f1(output: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the words, as in SQuAD."""
    found, wanted = words(output), words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def numeric_match(output: str, reference: str) -> float:
    """1 where both have the same last number, else 0."""
    found = last_number(output)
    return float(found is not None and found == last_number(reference))


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or of the part after the last #### if that has one; None where
    there is none.

    Thousands may have commas; signs and decimals count, currencies and percent signs do not:
    -1,234.50 and $-1234.5 are the same number.
    """
    text = unicodedata.normalize("NFKC", _RAISED_OR_LOWERED.sub("", text)).replace("\u2212", "-")
    _, _, behind = text.rpartition(_ANSWER)
    found = _NUMBER.findall(behind) or _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def label_of(output: str, labels: tuple[str, ...]) -> str | None:
    """The label that an output is, in upper or lower case, with or without a full stop; None where
    it is none of them. A label that matches to the letter comes first.
    """
    if output in labels:
        return output
    plain = {plain_label(label): label for label in labels}
    return plain.get(plain_label(output))


def plain_label(text: str) -> str:
    """A label in the form in which outputs are compared: lower case, without a full stop at its
    end.

    Two labels with the same form cannot be distinguished in an output.
    """
    return text.strip().rstrip(".。").casefold().strip()
