"""Chooses what a chat model is asked: prompts that come with bigmix, a user's, or the model's own.

Conversation i has the prompt and the system prompt that (seed, i) decide.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bigmix.commands.remedies.answer_filter import TurnMarks
from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.prompts import language_of
from bigmix.evaluation.tasks.prompts import ANSWER, chat_pairs, stops_of
from bigmix.seeding import key_of, permutation
from bigmix.text.chat_template import Template, render_chat
from bigmix.text.chat_tokens import RenderedChat
from bigmix.text.formats import Conversation, Dropped, Layout, Turn, document_of, utf8_of
from bigmix.text.readers import LINE_SUFFIXES, ReadOptions, format_of, read_records
from bigmix.text.tokenizer import Tokenizer

SEEDS = Path(__file__).with_name("seeds.jsonl")
SYSTEMS = Path(__file__).with_name("systems.jsonl")
_COLUMNS = ("id", "language", "topic", "prompt", "messages")
# Rendered only to find where the template writes them: texts that no template contains.
_QUESTION, _REPLY, _SYSTEM = "qxqxq", "zxzxz", "sxsxs"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """The turns up to an answer; the last is of the user. `id` and `language` may be unknown."""

    id: str | None
    language: str | None
    messages: Sequence[Turn]

    @property
    def question(self) -> str:
        """The last turn."""
        return str(self.messages[-1]["content"])

    @property
    def system(self) -> str | None:
        """The system prompt, where there is one."""
        first = self.messages[0]
        return str(first["content"]) if first["role"] == "system" else None

    def with_system(self, text: str) -> "ChatPrompt":
        """The same turns after a system prompt."""
        turns = [{"role": "system", "content": text}, *self.messages]
        return ChatPrompt(id=self.id, language=self.language, messages=turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of the prompts a conversation has, and how often each was asked before it."""

    prompt: int
    round: int


def place_of(number: int, num_prompts: int, seed: int) -> Place:
    """The place of a conversation: all prompts are asked in one order, then in another."""
    round_, at = divmod(number, num_prompts)
    return Place(prompt=_order(num_prompts, seed, round_)[at], round=round_)


@lru_cache(maxsize=4)
def _order(num_prompts: int, seed: int, round_: int) -> Sequence[int]:
    order: list[int] = permutation(num_prompts, key_of(seed, "prompts", round_)).tolist()
    return order


def built_in_prompts(languages: Sequence[str]) -> Sequence[ChatPrompt]:
    """The prompts that come with bigmix in these languages."""
    return [
        ChatPrompt(id=row["id"], language=row["language"], messages=[_turn("user", row["prompt"])])
        for row in _rows(SEEDS)
        if row["language"] in languages
    ]


def system_for(prompt: ChatPrompt, draw: np.random.Generator, languages: Sequence[str]) -> str:
    """One of the system prompts that come with bigmix, in the language of the prompt where there
    are any.
    """
    own = prompt.language or language_of(prompt.question)
    allowed = (own,) if own in languages else languages
    texts = [str(row["system"]) for row in _rows(SYSTEMS) if row["language"] in allowed]
    return texts[int(draw.integers(len(texts)))]


@lru_cache(maxsize=2)
def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_chat_prompts(path: str) -> Sequence[ChatPrompt]:
    """The prompts of a user's file of JSON lines, each with `prompt`, a text, or `messages`.

    Raises BadInput with every fault, each with file and line.
    """
    if format_of(path) not in LINE_SUFFIXES:
        raise BadInput(f"--prompts is {path}, must be seeds, model or a .jsonl file")
    prompts: list[ChatPrompt] = []
    faults: list[str] = []
    for record in read_records([path], ReadOptions(skip_bad_lines=True)):
        try:
            prompts.append(_prompt(record.columns, record.number))
        except BadInput as error:
            faults += [f"{record.file}, line {record.number}: {fault}" for fault in error.faults]
    if not prompts and not faults:
        faults.append(f"{path} holds no prompt; give a file with one JSON object a line")
    if faults:
        raise BadInput(*faults)
    return prompts


def _prompt(row: Mapping[str, Any] | None, number: int) -> ChatPrompt:
    """The prompt of a line; raises BadInput with all that is wrong with it."""
    if row is None:
        raise BadInput("is no JSON object; correct the line")
    if ("prompt" in row) == ("messages" in row):
        raise BadInput("must have either prompt, a text, or messages; give one of them")
    faults = [f"has {key!r}; known are {', '.join(_COLUMNS)}" for key in row if key not in _COLUMNS]
    value = row.get("messages", [_turn("user", row.get("prompt"))])
    found = document_of({"messages": value}, Layout(kind="chat", columns={"messages": "messages"}))
    turns = found.messages if isinstance(found, Conversation) else []
    faults += _turn_faults(turns) if turns else ["has no text or turns that can be read; give them"]
    if faults:
        raise BadInput(*faults)
    name, language = row.get("id"), row.get("language")
    return ChatPrompt(
        id=f"line-{number:04}" if name is None else str(name),
        language=None if language is None else str(language),
        # The answers before the last turn are not the model's own: they are not learned.
        messages=[{**t, "weight": 0} if t["role"] == "assistant" else t for t in turns],
    )


def _turn_faults(turns: Sequence[Turn]) -> Iterator[str]:
    contents = [str(turn["content"]) for turn in turns]
    if turns[-1]["role"] != "user":
        yield f"ends with a turn of the {turns[-1]['role']}, must end with one of the user"
    if not all(content.strip() for content in contents):
        yield "a message is empty; write it, or delete the line"
    if utf8_of("".join(contents)) is None:
        yield "holds half of a surrogate pair, which is not text; correct the line"


def _turn(role: str, content: Any) -> Turn:
    return {"role": role, "content": content}


def ids_before_answer(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Turn]
) -> Sequence[int] | None:
    """The ids of a conversation up to the answer that comes next, as they are in training; None
    where the template cannot render it.
    """
    whole = Conversation(messages=[*messages, _turn("assistant", ANSWER)], tools=None)
    (pair,) = chat_pairs(tokenizer, template, [whole])
    return None if isinstance(pair, Dropped) else pair[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFacts:
    """What a chat template writes.

    `answer_ends` are the ids that end an answer, `before_question` those up to a question without a
    system prompt, `question_ends` those that end one, none where the template ends a question with
    text. `takes_system` is False where it refuses or leaves out a system prompt.
    """

    answer_ends: Sequence[int]
    before_question: Sequence[int]
    question_ends: Sequence[int]
    takes_system: bool
    marks: TurnMarks


def facts_of(tokenizer: Tokenizer, template: Template) -> TemplateFacts:
    """What the template writes around turns, seen from conversations that it renders."""
    turns = [
        _turn("user", ANSWER),
        _turn("assistant", _REPLY),
        _turn("user", _QUESTION),
        _turn("assistant", ANSWER),
    ]
    text = _rendered(tokenizer, template, turns[2:])
    before, _, after = text.partition(_QUESTION)
    found = tokenizer.special_pattern.match(after.lstrip())
    told = _rendered(tokenizer, template, [_turn("system", _SYSTEM), *turns[2:]])
    return TemplateFacts(
        answer_ends=sorted(stops_of(tokenizer, template)),
        before_question=_with_bos(tokenizer, before),
        question_ends=_special_ids(tokenizer, found.group()) if found else (),
        takes_system=_SYSTEM in told,
        marks=TurnMarks(
            specials=tokenizer.special_pattern,
            openings=_openings(tokenizer, _rendered(tokenizer, template, turns), template),
        ),
    )


def _openings(tokenizer: Tokenizer, text: str, template: Template) -> Sequence[str]:
    """The text between an answer and the next question, without special tokens: `user`."""
    between = text.partition(_QUESTION)[0].rpartition(_REPLY)[2].removeprefix(template.turn_end)
    pieces = (piece.strip() for piece in tokenizer.special_pattern.split(between))
    return [piece for piece in pieces if piece]


def _rendered(tokenizer: Tokenizer, template: Template, messages: Sequence[Turn]) -> str:
    """The text of a conversation; empty where the template refuses it."""
    chat = render_chat(tokenizer, template, Conversation(messages=messages, tools=None))
    return chat.text if isinstance(chat, RenderedChat) else ""


def _special_ids(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    ids = tokenizer.encode_rendered(text.strip()).ids.tolist()
    return [token for token in ids if token in tokenizer.special_ids]


def _with_bos(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    ids: list[int] = tokenizer.encode_rendered(text).ids.tolist()
    lacks_bos = tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]
    return [tokenizer.bos_id, *ids] if lacks_bos and tokenizer.bos_id is not None else ids
