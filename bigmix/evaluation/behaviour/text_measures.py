"""Finds words in a text, counts its parts and reads its numbers, in English and Chinese.

Texts are compared without regard to case, accents and the style of quotation marks and dashes. A
word is a run of characters between spaces, or one Chinese character.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile

from bigmix.evaluation.tasks.matching import CHINESE

_LETTER = rf"(?!{CHINESE.pattern})\w"  # of a word that has an edge: Chinese is written without
_OPENING = " \t\n*_#>`\"'(["
_CLOSING = " \t\n*_`\"')]"
_PLAIN_SIGNS = str.maketrans(
    dict.fromkeys("‘’", "'")
    | dict.fromkeys("“”«»「」『』", '"')
    | dict.fromkeys("‐‑‒–—−", "-")
    | dict.fromkeys("，、", ", ")
    | {"。": "."}
)
# Their stops end no sentence: titles and the like, initials such as those of U.S., hours.
_ABBREVIATIONS = re.compile(
    r"\b(?:(?i:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|approx)\.|(?:[A-Z]\.\s?){2,}|[ap]\.m\.(?=\s+[a-z]))"
)
_MARKER = re.compile(r"^\s*(?:[-*+•·]|\(?\d{1,3}[.)、](?!\d)|#+)\s*")
_BULLET = re.compile(r"^\s*(?:[-*+]\s+|[•·]\s*|-(?=[^\W\d]))(?=\S)")
_NUMBERED = re.compile(r"^\s*[*_]*\(?(\d{1,3})[.)、．](?!\d)")
_TABLE_RULE = re.compile(r"\s*\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*")
_WORD = re.compile(r"(?:(?<!\S)-(?=\d))?\w+(?:(?:(?<=\d)[.,:/](?=\d)|['-](?=\w))\w+)*")


def num_found(text: str, answer: str) -> int:
    """How often a text is in an answer as whole words."""
    return len(_pattern(text).findall(_folded(answer)))


def found_in_order(texts: Sequence[str], answer: str) -> bool:
    """Whether all texts are in an answer as whole words, each after the one before it."""
    at, folded = 0, _folded(answer)
    for text in texts:
        match = _pattern(text).search(folded, at)
        if match is None:
            return False
        at = match.end()
    return True


def begins_with(answer: str, text: str) -> bool:
    """Whether an answer begins with a text, apart from marks of emphasis and quotation."""
    folded, pattern = _folded(answer), _pattern(text)
    return any(pattern.match(begin) for begin in (folded.lstrip(), folded.lstrip(_OPENING)))


def ends_with(answer: str, text: str) -> bool:
    """Whether an answer ends with a text, apart from marks of emphasis and quotation, stops and
    exclamation marks.
    """
    end, ending = _folded(answer).rstrip(_CLOSING), _folded(text)
    for whole in (end, end.rstrip(".!" + _CLOSING)):
        before = whole.removesuffix(ending)
        cuts_a_word = re.match(_LETTER, ending[0]) and re.match(_LETTER, before[-1:])
        if before != whole and not cuts_a_word:
            return True
    return False


def plain_words(text: str) -> str:
    """The words and numbers of a text with one space between them, without other signs."""
    return " ".join(_WORD.findall(_folded(text)))


def _folded(text: str) -> str:
    """A text without case, accents and the style of signs; full-width signs are plain ones."""
    parts = unicodedata.normalize("NFKD", text.translate(_PLAIN_SIGNS))
    return "".join(sign for sign in parts if unicodedata.category(sign) != "Mn").casefold() or text


def _pattern(text: str) -> re.Pattern[str]:
    """Finds a text in folded ones as whole words: a letter at its edge has no letter next to it,
    and a digit no more digits of the same number.
    """
    folded = _folded(text)
    inner = r"\s+".join(map(re.escape, re.split(r"\s+", folded)))
    if folded[0].isdecimal():
        inner = rf"(?<!\d)(?<!\d\.){inner}"
    elif re.match(_LETTER, folded[0]):
        inner = rf"(?<!{_LETTER}){inner}"
    if folded[-1].isdecimal():
        inner = rf"{inner}(?!\.?\d|,\d{{3}}(?!\d))"
    elif re.match(_LETTER, folded[-1]):
        inner = rf"{inner}(?!{_LETTER})"
    return re.compile(inner)


def _num_words(text: str) -> int:
    lines = (_MARKER.sub("", line) for line in text.splitlines())
    spaced = CHINESE.sub(r" \g<0> ", " ".join(lines)).replace("—", " ")
    return sum(any(sign.isalnum() for sign in word) for word in spaced.split())


def _num_characters(text: str) -> int:
    return sum(sign.isalnum() for sign in text)


def _num_sentences(text: str) -> int:
    """The parts that stops and line ends separate, without abbreviations and initials."""
    lines = (_MARKER.sub("", line) for line in text.splitlines())
    text = "\n".join(_ABBREVIATIONS.sub(lambda m: m[0].replace(".", ""), line) for line in lines)
    parts = re.split(r"[。！？]+|[.!?…]+(?=[\s\"'”’)*]|$)|\n", text)
    return sum(any(sign.isalnum() for sign in part) for part in parts)


def _num_lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())


def _num_paragraphs(text: str) -> int:
    return sum(bool(part.strip()) for part in re.split(r"\n\s*\n", text))


def _num_bullets(text: str) -> int:
    return sum(bool(_BULLET.match(line)) for line in text.splitlines())


def _num_numbered(text: str) -> int:
    """How many numbered lines there are; 0 where their numbers are not 1, 2, 3 ..."""
    numbers = [int(match[1]) for line in text.splitlines() if (match := _NUMBERED.match(line))]
    return len(numbers) if numbers == list(range(1, len(numbers) + 1)) else 0


def _num_items(text: str) -> int:
    return sum(any(s.isalnum() for s in part) for part in re.split(r"[,，、]", text))


AMOUNTS: Mapping[str, Callable[[str], int]] = {
    "num_words": _num_words,
    "num_characters": _num_characters,
    "num_sentences": _num_sentences,
    "num_lines": _num_lines,
    "num_paragraphs": _num_paragraphs,
    "num_bullets": _num_bullets,
    "num_numbered": _num_numbered,
    "num_items": _num_items,
}


def table_sizes(text: str) -> Iterator[tuple[int, int]]:
    """Columns and rows, without the header, of each Markdown table in a text; a table whose rows
    have different numbers of cells is none.
    """
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if at and "|" in line and _TABLE_RULE.fullmatch(line):
            body = list(takewhile(lambda each: "|" in each, lines[at + 1 :]))
            sizes = {_num_cells(each) for each in (lines[at - 1], line, *body)}
            if len(sizes) == 1:
                yield sizes.pop(), len(body)


def _num_cells(line: str) -> int:
    return len(line.strip().removeprefix("|").removesuffix("|").split("|"))


_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ENGLISH = {word: value for value, word in enumerate(_SMALL.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 2)
}
_CHINESE_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {
    "两": 2,
    "〇": 0,
}
_SCALES = {"hundred": 100, "thousand": 1000, "十": 10, "百": 100, "千": 1000, "万": 10_000}
_SPELLED = re.compile(r"[a-z]+|[零〇一二两三四五六七八九十百千万]")


def last_spelled_number(text: str) -> float | None:
    """The value of the last number that is written in words; None where there is none."""
    last: list[str] = []
    end = -2
    for match in _SPELLED.finditer(_folded(text)):
        word = match[0]
        if word in _ENGLISH or word in _CHINESE_DIGITS or word in _SCALES:
            last = [*last, word] if match.start() - end <= 1 else [word]
            end = match.end()
        elif word == "and" and last and match.start() - end == 1:
            end = match.end()
    return _value_of(last) if last else None


def _value_of(words: Sequence[str]) -> float:
    """The number that the words write, such as two hundred five or 三十六."""
    total = section = current = 0
    for word in words:
        scale = _SCALES.get(word)
        if scale is None:
            current += _ENGLISH.get(word, _CHINESE_DIGITS.get(word, 0))
        elif scale < 1000 or word == "千":
            section += (current or 1) * scale
            current = 0
        else:
            total += (section + current or 1) * scale
            section = current = 0
    return float(total + section + current)
