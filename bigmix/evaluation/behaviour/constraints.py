"""Constraints on an answer that code can check: its length, its form, the words in it.

Texts are compared without regard to case, accents and the style of quotation marks and dashes. A
word is a run of characters between spaces, or one Chinese character.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from bigmix.errors import BadInput
from bigmix.evaluation.tasks.matching import CHINESE, last_number
from bigmix.recipe.fields import A_NUMBER, Settings

_LETTER = rf"(?!{CHINESE.pattern})\w"  # of a word that has an edge: Chinese is written without
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.S)
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
_WORD = re.compile(r"(?:(?<!\S)-(?=\d))?\w+(?:(?:(?<=\d)[.,:/](?=\d)|['-](?=\w))\w+)*")
_SCRIPT_WORD = re.compile(rf"{CHINESE.pattern}|(?:(?!{CHINESE.pattern})[^\W\d_])+")


def _texts(value: Any) -> Any:
    """A list of texts; one text is a list of one."""
    return [value] if isinstance(value, str) else value


_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[_Text, ...], Field(min_length=1), BeforeValidator(_texts)]
_Bound = Annotated[int, Field(ge=0), A_NUMBER]


class Contains(Settings):
    """At least one of the texts in `any` is in the answer, as whole words."""

    type: Literal["contains"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        return any(_found(text, answer) for text in self.any)


class Excludes(Settings):
    """None of the texts in `any` is in the answer as whole words; signs such as a comma count
    anywhere.
    """

    type: Literal["excludes"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        return not any(_found(text, answer) for text in self.any)


class Occurrences(Settings):
    """The text `of` is in the answer, as whole words, at least `least` and at most `most` times."""

    type: Literal["occurrences"]
    of: _Text
    least: _Bound = 0
    most: _Bound | None = None

    def holds(self, answer: str) -> bool:
        return _within(len(_found(self.of, answer)), self.least, self.most)

    @model_validator(mode="after")
    def _bounded(self) -> "Occurrences":
        _check_bounds(self.least, self.most)
        return self


class InOrder(Settings):
    """All the `texts` are in the answer, as whole words, each after the one before it."""

    type: Literal["in_order"]
    texts: _Texts

    def holds(self, answer: str) -> bool:
        at, folded = 0, _folded(answer)
        for text in self.texts:
            match = _pattern(text).search(folded, at)
            if match is None:
                return False
            at = match.end()
        return True


class StartsWith(Settings):
    """The answer begins with one of the texts in `any`; marks of emphasis and quotation may come
    first.
    """

    type: Literal["starts_with"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        folded = _folded(answer)
        begins = (folded.lstrip(), folded.lstrip(_OPENING))
        return any(_pattern(text).match(begin) for text in self.any for begin in begins)


class EndsWith(Settings):
    """The answer ends with one of the texts in `any`; marks of emphasis and quotation may follow,
    and after a letter also a full stop or an exclamation mark.
    """

    type: Literal["ends_with"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        end = _folded(answer).rstrip(_CLOSING)
        bare = end.rstrip(".!" + _CLOSING)
        return any(_ends(end, text) or _ends(bare, text) for text in map(_folded, self.any))


class OneOf(Settings):
    """The whole answer is one of the `options`, apart from case, punctuation and emphasis."""

    type: Literal["one_of"]
    options: _Texts

    def holds(self, answer: str) -> bool:
        return _bare(answer) in map(_bare, self.options)

    @model_validator(mode="after")
    def _with_letters(self) -> "OneOf":
        if not all(map(_bare, self.options)):
            raise ValueError("options has one without a letter or digit; give words or numbers")
        return self


class Matches(Settings):
    """The whole answer, without spaces around it, fits the regular expression `pattern`."""

    type: Literal["matches"]
    pattern: _Text

    def holds(self, answer: str) -> bool:
        return re.fullmatch(self.pattern, answer.strip()) is not None

    @model_validator(mode="after")
    def _compiles(self) -> "Matches":
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern is {self.pattern!r}, which is no regular expression ({error}); correct it"
            ) from error
        return self


class Amount(Settings):
    """The answer has at least `least` and at most `most` of what `type` names.

    num_words: words, of which each Chinese character is one; list marks are none. num_characters:
    letters, digits and Chinese characters. num_sentences: what ends with a stop or a line.
    num_lines: lines that are not blank. num_paragraphs: what blank lines separate. num_bullets:
    lines that begin with a bullet. num_numbered: lines that begin with 1., 2., 3. ... in order.
    num_items: what commas separate.
    """

    type: Literal[
        "num_words",
        "num_characters",
        "num_sentences",
        "num_lines",
        "num_paragraphs",
        "num_bullets",
        "num_numbered",
        "num_items",
    ]
    least: _Bound = 0
    most: _Bound | None = None

    def holds(self, answer: str) -> bool:
        return _within(_AMOUNTS[self.type](answer), self.least, self.most)

    @model_validator(mode="after")
    def _bounded(self) -> "Amount":
        _check_bounds(self.least, self.most)
        return self


class LetterCase(Settings):
    """Every letter of the answer is in upper case (uppercase) or in lower case (lowercase)."""

    type: Literal["uppercase", "lowercase"]

    def holds(self, answer: str) -> bool:
        return answer.isupper() if self.type == "uppercase" else answer.islower()


class Json(Settings):
    """The whole answer, or the fenced block that it is, is JSON: with `keys` an object of exactly
    these keys, with `items` an array of as many items.
    """

    type: Literal["json"]
    keys: tuple[_Text, ...] | None = None
    items: _Bound | None = None

    def holds(self, answer: str) -> bool:
        fenced = _FENCED.fullmatch(answer.strip())
        try:
            value = json.loads(fenced[1] if fenced else answer)
        except (ValueError, RecursionError):
            return False
        if self.keys is not None:
            return isinstance(value, dict) and value.keys() == set(self.keys)
        if self.items is not None:
            return isinstance(value, list) and len(value) == self.items
        return isinstance(value, dict | list)


class LastNumber(Settings):
    """The last number of the answer is `value`; where the answer has no digits, the last one in
    English or Chinese words.
    """

    type: Literal["number"]
    value: Annotated[float, A_NUMBER]

    def holds(self, answer: str) -> bool:
        number = last_number(answer)
        found = _last_spelled(answer) if number is None else float(number)
        return found is not None and abs(found - self.value) <= 1e-9 * max(1, abs(self.value))


class WrittenIn(Settings):
    """The script of the answer is that of the language `is`: at least half of its words are Chinese
    (zh), each character being one, or at least three of four are Latin (en; languages that are
    written in Latin are not distinguished).
    """

    type: Literal["language"]
    is_: Literal["zh", "en"] = Field(alias="is")

    def holds(self, answer: str) -> bool:
        words: list[str] = _SCRIPT_WORD.findall(answer)
        if self.is_ == "zh":
            return 2 * sum(bool(CHINESE.match(word)) for word in words) >= max(1, len(words))
        return 4 * sum(word[0] < "\u0370" for word in words) >= max(1, 3 * len(words))


class Code(Settings):
    """The first fenced block of the answer, or all of it where there is none, is a Python program
    that does something; where `defines` names functions or classes, it has them.
    """

    type: Literal["code"]
    language: Literal["python"] = "python"
    defines: tuple[_Text, ...] = ()

    def holds(self, answer: str) -> bool:
        fenced = _FENCED.search(answer)
        try:
            tree = ast.parse(fenced[1] if fenced else answer.strip().strip("`"))
        # A null byte is a ValueError; deep nesting exhausts the parser.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        nodes = list(ast.walk(tree))
        names = {node.name for node in nodes if isinstance(node, _DEFINITIONS)}
        # One word of prose is a Python expression as well.
        return any(isinstance(node, _ACTIONS) for node in nodes) and names >= set(self.defines)


class MarkdownTable(Settings):
    """The answer has a Markdown table of `columns` columns and, below its header, `rows` rows."""

    type: Literal["table"]
    columns: _Bound
    rows: _Bound | None = None

    def holds(self, answer: str) -> bool:
        lines = answer.splitlines()
        for at, line in enumerate(lines):
            if at and _is_rule(line) and _num_cells(line) == self.columns:
                body = _rows_from(lines[at + 1 :])
                same = all(_num_cells(each) == self.columns for each in [lines[at - 1], *body])
                return same and self.rows in (None, len(body))
        return False


Constraint: TypeAlias = (
    Contains
    | Excludes
    | Occurrences
    | InOrder
    | StartsWith
    | EndsWith
    | OneOf
    | Matches
    | Amount
    | LetterCase
    | Json
    | LastNumber
    | WrittenIn
    | Code
    | MarkdownTable
)
TYPES: Mapping[str, type[Constraint]] = {
    name: each
    for each in get_args(Constraint)
    for name in get_args(each.model_fields["type"].annotation)
}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ACTIONS = (
    *_DEFINITIONS,
    ast.Assign,
    ast.AugAssign,
    ast.Call,
    ast.For,
    ast.While,
    ast.If,
    ast.Import,
    ast.ImportFrom,
    ast.Lambda,
    ast.ListComp,
    ast.DictComp,
    ast.SetComp,
    ast.GeneratorExp,
    ast.Subscript,
    ast.With,
)


def followed(constraints: Sequence[Constraint], answer: str) -> bool:
    """Whether an answer follows all constraints."""
    return all(constraint.holds(answer) for constraint in constraints)


def constraint_of(value: Any) -> Constraint:
    """The constraint that a JSON object describes; raises BadInput with every fault."""
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise BadInput(f"is {value!r}, must be an object with a type; known are {', '.join(TYPES)}")
    name = value["type"]
    if name not in TYPES:
        near = get_close_matches(name, TYPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(TYPES)}"
        raise BadInput(f"has the type {name!r}, which is none; {hint}")
    try:
        return TYPES[name].model_validate(value)
    except ValidationError as error:
        raise BadInput(*(_fault(name, fault) for fault in error.errors())) from error


def plain_constraint(constraint: Constraint) -> dict[str, Any]:
    """The JSON object that `constraint_of` reads the constraint from."""
    return constraint.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _fault(name: str, fault: Any) -> str:
    if fault["type"] == "value_error":
        return f"of the type {name}: {fault['ctx']['error']}"
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        known = [field.alias or key for key, field in TYPES[name].model_fields.items()]
        return f"of the type {name} has {key}, which it does not take; it takes {', '.join(known)}"
    if fault["type"] == "missing":
        return f"of the type {name} has no {key}; add it"
    reason = fault["msg"][0].lower() + fault["msg"][1:]
    return f"of the type {name}: {key} is {fault['input']!r}: {reason.replace('input ', 'it ')}"


def _check_bounds(least: int, most: int | None) -> None:
    """Raises ValueError where the bounds leave nothing to hold, or nothing that can hold."""
    if least == 0 and most is None:
        raise ValueError("has no bound; give least, most or both")
    if most is not None and most < least:
        raise ValueError(f"least is {least} and most is {most}; most must not be below least")


def _within(count: int, least: int, most: int | None) -> bool:
    return least <= count and (most is None or count <= most)


def _folded(text: str) -> str:
    """A text without case, accents and the style of signs; full-width signs are plain ones."""
    parts = unicodedata.normalize("NFKD", text.translate(_PLAIN_SIGNS))
    return "".join(sign for sign in parts if unicodedata.category(sign) != "Mn").casefold()


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


def _found(text: str, answer: str) -> list[str]:
    return _pattern(text).findall(_folded(answer))


def _ends(text: str, ending: str) -> bool:
    """Whether a text ends with the ending as whole words."""
    if not text.endswith(ending):
        return False
    before = text[: len(text) - len(ending)][-1:]
    return not (re.match(_LETTER, ending[0]) and re.match(_LETTER, before))


def _bare(text: str) -> str:
    """The words and numbers of a text with one space between them, without other signs."""
    return " ".join(_WORD.findall(_folded(text)))


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


_AMOUNTS: Mapping[str, Callable[[str], int]] = {
    "num_words": _num_words,
    "num_characters": _num_characters,
    "num_sentences": _num_sentences,
    "num_lines": _num_lines,
    "num_paragraphs": _num_paragraphs,
    "num_bullets": _num_bullets,
    "num_numbered": _num_numbered,
    "num_items": _num_items,
}


def _is_rule(line: str) -> bool:
    """Whether a line separates the header of a Markdown table from its rows."""
    return re.fullmatch(r"\s*\|?(?:\s*:?-+:?\s*\|)*\s*:?-+:?\s*\|?\s*", line) is not None and (
        "|" in line
    )


def _num_cells(line: str) -> int:
    return len(line.strip().removeprefix("|").removesuffix("|").split("|"))


def _rows_from(lines: Sequence[str]) -> list[str]:
    """The rows of a table at the start of the lines."""
    end = next((at for at, line in enumerate(lines) if "|" not in line), len(lines))
    return list(lines[:end])


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


def _last_spelled(text: str) -> float | None:
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
