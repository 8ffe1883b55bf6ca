"""Recognises what the records of an input are, and reads each as a text or a conversation.

There is no list of datasets: a layout is known by the names and the types of its columns.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bigmix.errors import BadInput

Kind = Literal["text", "chat"]
Record = Mapping[str, Any]  # of an input: its values by the names of the columns
# A message with the keys of OpenAI's API and of chat templates: role, content, tool_calls, ...
Turn = Mapping[str, Any]

TEXT_COLUMNS = ("text", "content", "raw_content", "document")
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "chat")
# Prompt and response; the other columns of a pair are optional: `context` comes before the prompt,
# `input` after it.
PAIRS: Sequence[Mapping[str, str]] = (
    {"prompt": "instruction", "response": "output", "input": "input", "context": "context"},
    {"prompt": "instruction", "response": "response", "input": "input", "context": "context"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "prompt", "response": "response", "context": "context"},
    {"prompt": "question", "response": "answer", "context": "context"},
    {"prompt": "question", "response": "answers", "context": "context"},
    {"prompt": "question", "response": "response", "context": "context"},
    {"prompt": "query", "response": "response", "context": "context"},
    {"prompt": "query", "response": "answer", "context": "context"},
    {"prompt": "problem", "response": "solution"},
    {"prompt": "input", "response": "output"},
    {"prompt": "inputs", "response": "targets"},
)
SYSTEM_COLUMNS = ("system", "system_prompt")
LABEL_COLUMNS = ("label", "labels", "label_text", "category", "intent")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
STANDARD = tuple(dict.fromkeys(ROLES.values()))
# The parts that may be named together, by the one that decides.
WAYS: Mapping[str, Sequence[str]] = {
    "text": ("text",),
    "messages": ("messages", "system", "tools"),
    "response": ("prompt", "response", "context", "input", "system", "history", "tools"),
}
CHOICE_COLUMNS = ("choices", "options")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How records are read.

    `columns` maps each part of a document to the column that it is read from; `note` says what the
    user should know about the choice.
    """

    kind: Kind
    columns: Mapping[str, str]
    note: str | None = None

    def described(self) -> str:
        """One line for the user, such as `chat from prompt=question, response=answer`."""
        parts = ", ".join(
            part if part == name else f"{part}={name}" for part, name in self.columns.items()
        )
        return f"{self.kind} from {parts}"


def utf8_of(text: str) -> bytes | None:
    """The text in UTF-8; None where it contains half of a surrogate pair, which JSON can write and
    UTF-8 cannot.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A document that is one text."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A document of turns with the roles system, user, assistant and tool.

    `tools` are the JSON schemas of the tools that the model may call.
    """

    messages: Sequence[Turn]
    tools: Sequence[Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A document that is left out; the reason is one word, by which such documents are counted."""

    reason: str


Document: TypeAlias = Text | Conversation | Dropped


def recognise(
    records: Sequence[Record], *, kind: Kind | None, columns: Mapping[str, str] | None
) -> Layout:
    """Decide from the first records how all are read.

    `kind` restricts the choice; `columns` names the columns and leaves no choice. Raises BadInput
    where no known layout fits at least half of the records, or where `columns` make no sense.
    """
    if columns:
        return _explicit(columns, kind, records)
    candidates = [*_conversations(records), *_pairs(records), *_texts(records)]
    fitting = [
        each
        for each in candidates
        if kind in (None, each.kind) and _fits_most(records, each.columns)
    ]
    if not fitting:
        raise BadInput(_unknown(records, kind))
    chosen, others = fitting[0], [each for each in fitting[1:] if each.kind != fitting[0].kind]
    return Layout(kind=chosen.kind, columns=chosen.columns, note=_note(records, chosen, others))


def _conversations(records: Sequence[Record]) -> Sequence[Layout]:
    optional = {"tools": "tools"} | _system(records)
    return [
        Layout(kind="chat", columns={"messages": name} | _present(records, optional))
        for name in MESSAGE_COLUMNS
    ]


def _system(records: Sequence[Record]) -> dict[str, str]:
    """The column of the system turn, if there is one."""
    found = [name for name in SYSTEM_COLUMNS if _has(records, name)]
    return {"system": found[-1]} if found else {}


def _pairs(records: Sequence[Record]) -> Sequence[Layout]:
    optional = {"tools": "tools", "history": "history"}
    optional |= _system(records)
    required = ("prompt", "response")
    return [
        Layout(
            kind="chat",
            columns={part: pair[part] for part in required}
            | _present(
                records, optional | {part: pair[part] for part in pair if part not in required}
            ),
        )
        for pair in PAIRS
    ]


def _texts(records: Sequence[Record]) -> Sequence[Layout]:
    return [
        Layout(kind="text", columns={"text": name}) for name in TEXT_COLUMNS if _has(records, name)
    ]


def _has(records: Sequence[Record], column: str) -> bool:
    return any(record.get(column) is not None for record in records)


def _present(records: Sequence[Record], columns: Mapping[str, str]) -> dict[str, str]:
    return {part: name for part, name in columns.items() if _has(records, name)}


def _fits_most(records: Sequence[Record], columns: Mapping[str, str]) -> bool:
    layout = Layout(kind="text" if "text" in columns else "chat", columns=columns)
    fitting = sum(not isinstance(document_of(record, layout), Dropped) for record in records)
    return fitting > 0 and 2 * fitting >= len(records)


def _note(records: Sequence[Record], chosen: Layout, others: Sequence[Layout]) -> str | None:
    if others:
        return (
            f"the records could also be read as {others[0].described()}; for that give "
            f"--kind {others[0].kind} or --columns"
        )
    if any(_has_thoughts(turn) for record in records for turn in _raw_turns(record, chosen)):
        return (
            f"turns have {' or '.join(THOUGHT_KEYS)}, which is written only by chat templates that"
            " use it and learned only where they mark it with {% generation %}; the plain template"
            " does neither; put it into content to learn it"
        )
    choices = next((name for name in CHOICE_COLUMNS if _has(records, name)), None)
    if "prompt" in chosen.columns and choices not in (None, *chosen.columns.values()):
        return (
            f"column {choices!r} is not used, and the answer may be one of these; put them into"
            f" {chosen.columns['prompt']!r}, or give --columns context={choices} together with"
            " prompt and response"
        )
    label = next((name for name in LABEL_COLUMNS if _has(records, name)), None)
    if chosen.kind == "text" and label is not None:
        text = chosen.columns["text"]
        return (
            f"column {label!r} is not used; to learn it as the answer to {text!r}, give "
            f"--columns prompt={text},response={label}"
        )
    return None


def _raw_turns(record: Record, layout: Layout) -> Sequence[Any]:
    value = record.get(layout.columns.get("messages", ""))
    return value if isinstance(value, list) else ()


def _has_thoughts(turn: Any) -> bool:
    return isinstance(turn, dict) and any(turn.get(key) for key in THOUGHT_KEYS)


def _explicit(columns: Mapping[str, str], kind: Kind | None, records: Sequence[Record]) -> Layout:
    ways = [way for way in WAYS if way in columns]
    goes_together = len(ways) == 1 and columns.keys() <= {*WAYS[ways[0]]}
    if not goes_together or (ways == ["response"] and "prompt" not in columns):
        raise BadInput(
            f"--columns names {', '.join(columns)}; allowed are text alone; messages with system"
            " and tools; or prompt and response with context, input, system, history and tools;"
            " write, for instance, prompt=question,response=answer"
        )
    layout = Layout(kind="text" if "text" in columns else "chat", columns=columns)
    if kind not in (None, layout.kind):
        raise BadInput(
            f"--kind is {kind}, but --columns describe {layout.kind}; leave one of them out"
        )
    missing = [name for name in columns.values() if not _has(records, name)]
    if missing:
        raise BadInput(
            f"--columns names {', '.join(missing)}, which none of the first {len(records)} records"
            f" has; their columns are {_names(records)}"
        )
    return layout


def _unknown(records: Sequence[Record], kind: Kind | None) -> str:
    wanted = "a text or a conversation" if kind is None else f"a source of kind {kind}"
    return (
        f"the records are not recognised as {wanted}; their columns are {_names(records)}; name"
        " those to read, for instance with --columns text=content or --columns"
        " prompt=question,response=answer"
    )


def _names(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(name for record in records for name in record)) or "none"


def document_of(record: Record, layout: Layout) -> Document:
    """The document of one record; Dropped where the record does not fit the layout or is empty."""
    columns = layout.columns
    if "text" in columns:
        text = record.get(columns["text"])
        if not isinstance(text, str):
            return Dropped(reason="bad_row")
        return Text(text=text) if text.strip() else Dropped(reason="empty")
    if "messages" in columns:
        turns = _turns_of(record.get(columns["messages"]))
    else:
        turns = _turns_of_pair(record, columns)
    tools = _tools_of(record.get(columns.get("tools", "")))
    if turns is None or tools is None:
        return Dropped(reason="bad_row")
    system = record.get(columns.get("system", ""))
    if isinstance(system, str) and system.strip() and not (turns and turns[0]["role"] == "system"):
        turns = [{"role": "system", "content": system}, *turns]
    return Conversation(messages=turns, tools=tools or None)


def _turns_of_pair(record: Record, columns: Mapping[str, str]) -> list[Turn] | None:
    prompt, response = record.get(columns["prompt"]), record.get(columns["response"])
    if isinstance(prompt, list) and isinstance(response, list) and _is_turns(prompt):
        return _turns_of([*prompt, *response])
    answer = _plain(response)
    earlier = _history_of(record.get(columns.get("history", "")))
    before, after = (record.get(columns.get(part, "")) for part in ("context", "input"))
    question = [_joined(before), None if prompt is None else _joined(prompt), _joined(after)]
    if answer is None or earlier is None or None in question:
        return None
    parts = [part for part in question if part and part.strip()]
    if not parts:
        return None
    last = {"role": "user", "content": "\n\n".join(parts)}
    return [*earlier, last, {"role": "assistant", "content": answer}]


def _history_of(value: Any) -> list[Turn] | None:
    """Earlier turns, given as a list of [question, answer]; None where it is no such list."""
    turns: list[Turn] = []
    if not isinstance(value or [], list):
        return None
    for pair in value or []:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(p, str) for p in pair)
        ):
            return None
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _joined(value: Any) -> str | None:
    """Everything that a column adds to the question: a text, a number as text, or several of these;
    None where it holds anything else.
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        return _joined(value["text"]) if value.get("text") is not None else None
    if isinstance(value, list):
        texts = [_joined(each) for each in value]
        return None if None in texts else "\n\n".join(text for text in texts if text)
    return _plain(value)


def _plain(value: Any) -> str | None:
    """A text, a number as text, or the first of several accepted answers; None where it is none of
    these.
    """
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _is_turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    )


def _turns_of(value: Any) -> list[Turn] | None:
    if not _is_turns(value):
        return None
    turns = [_turn_of(turn) for turn in value]
    return None if None in turns else [turn for turn in turns if turn is not None]


def _turn_of(turn: Turn) -> Turn | None:
    """One message with a known role, its content as text and no key that is None, which parquet
    adds; None where the message cannot be read.
    """
    if len(turn) == 2 and turn.get("role") in STANDARD and isinstance(turn.get("content"), str):
        return turn  # most messages are so already
    role = ROLES.get(str(turn.get("role") or turn.get("from")).lower())
    given = turn.get("content")
    content = _content_of(turn.get("value") if given is None else given)
    calls = _calls_of(turn)
    if role is None or content is None or calls is None:
        return None
    kept = {k: v for k, v in turn.items() if v is not None and k not in _READ_OTHERWISE}
    return kept | {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def _content_of(content: Any) -> str | None:
    """Text, or parts that are all text; None where it holds an image or anything else."""
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        return None if None in texts else "".join(map(str, texts))
    return content if isinstance(content, str) else None


_READ_OTHERWISE = ("from", "value", "tool_calls", "function_call")


def _calls_of(turn: Turn) -> list[Turn] | None:
    """The tool calls of a turn, or the `function_call` of OpenAI's older format; None where one
    cannot be read.
    """
    found = turn.get("tool_calls") or []
    if not isinstance(found, list):
        return None
    if not found and turn.get("function_call"):
        found = [{"type": "function", "function": turn["function_call"]}]
    calls = [_call_of(call) for call in found]
    return None if None in calls else [call for call in calls if call is not None]


def _without_none(value: Any) -> Any:
    """The value without keys that are None: parquet gives each table the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _call_of(call: Any) -> Turn | None:
    """A tool call with its arguments as an object, since templates write them as JSON and would
    quote a string twice; None where it cannot be read.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return None
    arguments = _without_none(function.get("arguments"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            return None
    # The order of the keys is kept: templates write it.
    named = {**_without_none({**function, "arguments": ""}), "arguments": arguments or {}}
    return {**_without_none({**call, "function": {}}), "function": named}


def _tools_of(tools: Any) -> list[Any] | None:
    """Tool schemas, given as a list or as JSON; an empty list where there are none, None where they
    cannot be read.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            return None
    else:
        tools = _without_none(tools)
    if not tools:
        return []
    return tools if isinstance(tools, list) and all(isinstance(t, dict) for t in tools) else None
