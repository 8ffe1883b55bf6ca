"""Reads the prompts of the behaviour probe: those that come with bigmix, or a user's file."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.constraints import Constraint, constraint_of, plain_constraint
from bigmix.evaluation.tasks.matching import CHINESE
from bigmix.seeding import evenly_spaced
from bigmix.text.formats import Conversation, Layout, Turn, document_of, utf8_of
from bigmix.text.readers import LINE_SUFFIXES, ReadOptions, format_of, read_records

Language = Literal["en", "zh"]
PromptKind = Literal[
    "fact",
    "explanation",
    "writing",
    "list",
    "format",
    "arithmetic",
    "code",
    "translation",
    "unknowable",
    "conversation",
    "other",
]
LANGUAGES: tuple[Language, ...] = get_args(Language)
KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
BUILT_IN = Path(__file__).with_name("prompts.jsonl")
_COLUMNS = ("id", "language", "kind", "messages", "constraints")
_CHINESE_FROM = 0.3  # of the characters of the last turn


@dataclass(frozen=True, kw_only=True, slots=True)
class BehaviourPrompt:
    """A general prompt: the turns up to an answer, and what code can check of the answer.

    `messages` end with a turn of the user. `language` is that of the prompt. The kind `unknowable`
    asks for what nobody can know; `conversation` has earlier answers.
    """

    id: str
    language: Language
    kind: PromptKind
    messages: Sequence[Turn]
    constraints: Sequence[Constraint]

    def plain(self) -> dict[str, Any]:
        """The prompt as the JSON object of its line in a file."""
        return {
            "id": self.id,
            "language": self.language,
            "kind": self.kind,
            "messages": [dict(turn) for turn in self.messages],
            "constraints": [plain_constraint(each) for each in self.constraints],
        }


def read_prompts(path: str | None, languages: Sequence[Language]) -> Sequence[BehaviourPrompt]:
    """The prompts of a file of JSON lines, or with None those that come with bigmix in the
    `languages`.

    A line of a user's file needs only `messages`; the `id` is then that of its line, the language
    is seen from the last turn, the kind is `conversation` where there are earlier answers and else
    `other`. Raises BadInput with every fault, each with file and line.
    """
    if path is None:
        return [prompt for prompt in _read(str(BUILT_IN)) if prompt.language in languages]
    if format_of(path) not in LINE_SUFFIXES:
        raise BadInput(
            f"behaviour.prompts is {path}, must be a .jsonl file, also .jsonl.gz or .jsonl.zst"
        )
    return _read(path)


def spread(prompts: Sequence[BehaviourPrompt], num: int | None) -> Sequence[BehaviourPrompt]:
    """At most `num` of the prompts (None: all), evenly over language and kind, in their order.

    Each pair of language and kind has the same number, give or take one, until it has no more; its
    prompts are taken at equal distances.
    """
    if num is None or num >= len(prompts):
        return prompts
    cells: dict[tuple[str, str], list[int]] = {}
    for index, prompt in enumerate(prompts):
        cells.setdefault((prompt.language, prompt.kind), []).append(index)
    quotas = _quotas({cell: len(indices) for cell, indices in cells.items()}, num)
    chosen = [i for cell, indices in cells.items() for i in evenly_spaced(indices, quotas[cell])]
    return [prompts[index] for index in sorted(chosen)]


def _quotas(sizes: Mapping[tuple[str, str], int], num: int) -> Counter[tuple[str, str]]:
    """How many of each cell are taken: one more of each that has more, until there are `num`."""
    quotas: Counter[tuple[str, str]] = Counter()
    while quotas.total() < num:
        left = [cell for cell, size in sizes.items() if quotas[cell] < size]
        quotas.update(evenly_spaced(left, num - quotas.total()))
    return quotas


def _read(path: str) -> Sequence[BehaviourPrompt]:
    prompts: list[BehaviourPrompt] = []
    faults: list[str] = []
    lines: dict[str, int] = {}
    for record in read_records([path], ReadOptions(skip_bad_lines=True)):
        place = f"{record.file}, line {record.number}"
        try:
            prompt = _prompt(record.columns, record.number)
        except BadInput as error:
            faults += [f"{place}: {fault}" for fault in error.faults]
            continue
        first = lines.setdefault(prompt.id, record.number)
        if first != record.number:
            faults.append(
                f"{place}: id is {prompt.id!r}, which line {first} has; give each line its own"
            )
        prompts.append(prompt)
    if not prompts and not faults:
        faults.append(f"{path} holds no prompt; give a file with one JSON object a line")
    if faults:
        raise BadInput(*faults)
    return prompts


def _prompt(row: Mapping[str, Any] | None, number: int) -> BehaviourPrompt:
    """The prompt of a line; raises BadInput with all that is wrong with it."""
    if row is None:
        raise BadInput("is no JSON object; correct the line")
    turns, faults = _turns(row.get("messages"))
    constraints: list[Constraint] = []
    faults += _constraint_faults(row.get("constraints"), constraints)
    default = "conversation" if any(turn["role"] == "assistant" for turn in turns) else "other"
    language = row.get("language") or (language_of(str(turns[-1]["content"])) if turns else "en")
    kind: Any = row.get("kind") or default
    name: Any = row.get("id") or f"line-{number:04}"
    faults += [
        f"has {key!r}; known are {', '.join(_COLUMNS)}" for key in row if key not in _COLUMNS
    ]
    faults += _choice_faults("language", language, LANGUAGES)
    faults += _choice_faults("kind", kind, KINDS)
    if not isinstance(name, str):
        faults.append(f"id is {name!r}, must be text")
    if faults:
        raise BadInput(*faults)
    return BehaviourPrompt(
        id=name, language=language, kind=kind, messages=turns, constraints=constraints
    )


def _choice_faults(key: str, value: Any, known: Sequence[str]) -> Iterator[str]:
    if value not in known:
        yield f"{key} is {value!r}, must be one of {', '.join(known)}"


def _turns(value: Any) -> tuple[Sequence[Turn], list[str]]:
    """The turns of a prompt, and what is wrong with them."""
    document = document_of(
        {"messages": value}, Layout(kind="chat", columns={"messages": "messages"})
    )
    if not isinstance(document, Conversation):
        return [], ["has no messages that can be read; give turns with role and content"]
    faults = []
    roles = [str(turn["role"]) for turn in document.messages]
    asked = roles[1:] if roles[0] == "system" else roles
    if asked != [("user", "assistant")[at % 2] for at in range(len(asked))] or not len(asked) % 2:
        faults.append(
            f"messages have the roles {', '.join(roles)}; must be user and assistant by turns,"
            " from a user to a user, after at most one system"
        )
    contents = [str(turn["content"]) for turn in document.messages]
    if not all(content.strip() for content in contents):
        faults.append("a message is empty; write it, or delete the line")
    if utf8_of("".join(contents)) is None:
        faults.append("holds half of a surrogate pair, which is not text; correct the line")
    return document.messages, faults


def _constraint_faults(value: Any, found: list[Constraint]) -> Iterator[str]:
    """Fill `found`; yields a message for each constraint that cannot be read."""
    if value is not None and not isinstance(value, list):
        yield f"constraints is {value!r}, must be a list of objects"
        return
    for number, each in enumerate(value or (), 1):
        try:
            found.append(constraint_of(each))
        except BadInput as error:
            yield from (f"constraint {number} {fault}" for fault in error.faults)


def language_of(text: str) -> Language:
    """zh where more than 30 % of the characters of a text are Chinese, else en."""
    return "zh" if len(CHINESE.findall(text)) > _CHINESE_FROM * len(text) else "en"
