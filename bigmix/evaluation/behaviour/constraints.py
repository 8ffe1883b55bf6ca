"""Constraints on an answer that code can check: its length, its form, the words in it.

What counts as a word, a sentence or the same text is in `text_measures`.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.text_measures import (
    AMOUNTS,
    begins_with,
    ends_with,
    found_in_order,
    last_spelled_number,
    num_found,
    plain_words,
    table_sizes,
)
from bigmix.evaluation.tasks.matching import CHINESE, last_number
from bigmix.recipe.fields import A_NUMBER, Settings

_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.S)
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
        return any(num_found(text, answer) for text in self.any)


class Excludes(Settings):
    """None of the texts in `any` is in the answer as whole words; signs such as a comma count
    anywhere.
    """

    type: Literal["excludes"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        return not any(num_found(text, answer) for text in self.any)


class Occurrences(Settings):
    """The text `of` is in the answer, as whole words, at least `least` and at most `most` times."""

    type: Literal["occurrences"]
    of: _Text
    least: _Bound = 0
    most: _Bound | None = None

    def holds(self, answer: str) -> bool:
        return _within(num_found(self.of, answer), self.least, self.most)

    @model_validator(mode="after")
    def _bounded(self) -> "Occurrences":
        _check_bounds(self.least, self.most)
        return self


class InOrder(Settings):
    """All the `texts` are in the answer, as whole words, each after the one before it."""

    type: Literal["in_order"]
    texts: _Texts

    def holds(self, answer: str) -> bool:
        return found_in_order(self.texts, answer)


class StartsWith(Settings):
    """The answer begins with one of the texts in `any`; marks of emphasis and quotation may come
    first.
    """

    type: Literal["starts_with"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        return any(begins_with(answer, text) for text in self.any)


class EndsWith(Settings):
    """The answer ends with one of the texts in `any`; marks of emphasis and quotation may follow,
    and after a letter also a full stop or an exclamation mark.
    """

    type: Literal["ends_with"]
    any: _Texts

    def holds(self, answer: str) -> bool:
        return any(ends_with(answer, text) for text in self.any)


class OneOf(Settings):
    """The whole answer is one of the `options`, apart from case, punctuation and emphasis."""

    type: Literal["one_of"]
    options: _Texts

    def holds(self, answer: str) -> bool:
        return plain_words(answer) in map(plain_words, self.options)

    @model_validator(mode="after")
    def _with_letters(self) -> "OneOf":
        if not all(map(plain_words, self.options)):
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
        return _within(AMOUNTS[self.type](answer), self.least, self.most)

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
        found = last_spelled_number(answer) if number is None else float(number)
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
            tree = _parsed(fenced[1] if fenced else answer.strip().strip("`"))
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
        return any(
            columns == self.columns and self.rows in (None, rows)
            for columns, rows in table_sizes(answer)
        )


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


def _parsed(program: str) -> ast.Module:
    """The syntax tree of a program, without the warnings that Python has about some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(program)


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
