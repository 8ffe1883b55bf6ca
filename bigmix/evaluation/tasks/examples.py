"""Reads the examples of a task from its file, and reports every fault with its line.

Imports neither torch nor tokenizers, so that faults are reported at once.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmix.errors import BadInput
from bigmix.evaluation.tasks.matching import label_of, last_number, plain_label
from bigmix.recipe.task import PARTS, Task
from bigmix.seeding import evenly_spaced
from bigmix.text.formats import Conversation, Layout, Turn, document_of, utf8_of
from bigmix.text.readers import LINE_SUFFIXES, ReadOptions, format_of, read_records

_MOST_FAULTS = 5  # of one file; the rest are counted
_LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu"} | dict.fromkeys(
    ("rouge1", "rouge2", "rougeL"), "rouge_score"
)
_ANSWERS = ("references", "label", "response")
_PROMPT_PARTS = ("prompt", "messages", "context", "input", "system", "history", "tools")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One question: the turns up to the answer, the correct answers, and for code the test that a
    program must pass.

    `index` is the number of the example in its file, `place` its file and line for messages.
    """

    index: int
    place: str
    messages: Sequence[Turn]
    tools: Sequence[Any] | None
    references: tuple[str, ...]
    test: str

    @property
    def shown(self) -> str:
        """The question as one text for a reader."""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    """A task with the examples that it uses, and the labels that are possible answers."""

    task: Task
    examples: Sequence[Example]
    labels: tuple[str, ...]


def open_tasks(tasks: Mapping[str, Task]) -> dict[str, TaskFile]:
    """Read the files of all tasks; raises BadInput with the faults of all of them, including
    libraries that are not installed.
    """
    faults: list[str] = []
    files = {}
    for name, task in tasks.items():
        faults += _missing_libraries(name, task)
        try:
            files[name] = _open(task)
        except BadInput as error:
            faults += [f"tasks.{name}: {fault}" for fault in error.faults]
    if faults:
        raise BadInput(*faults)
    return files


def _missing_libraries(name: str, task: Task) -> Iterator[str]:
    needed = {library for score in task.scores if (library := _LIBRARIES.get(score))}
    for library in sorted(needed):
        if importlib.util.find_spec(library) is None:
            yield (
                f"tasks.{name}.scores is {', '.join(task.scores)}, which needs {library}, and it is"
                " not installed; run pip install 'bigmix[tasks]', or leave these scores out"
            )


def _open(task: Task) -> TaskFile:
    if Path(task.path).is_file() and format_of(task.path) not in LINE_SUFFIXES:
        raise BadInput(f"path is {task.path}, must be a .jsonl file, also .jsonl.gz or .jsonl.zst")
    faults: list[str] = []
    examples = []
    for index, row in enumerate(read_records([task.path], ReadOptions(skip_bad_lines=True))):
        place = f"{row.file}, line {row.number}"
        try:
            examples.append(_example(task, row.columns, index, place))
        except BadInput as error:
            faults += [f"{place}: {fault}" for fault in error.faults]
    if not examples and not faults:
        raise BadInput(f"{task.path} holds no example; give a file with one JSON object a line")
    labels = task.labels or tuple(dict.fromkeys(r for e in examples for r in e.references))
    if task.judges_labels:
        faults += _label_faults(examples, labels, task)
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [
            f"{task.path}: {len(faults) - _MOST_FAULTS} more faults like these"
        ]
    if faults:
        raise BadInput(*faults)
    return TaskFile(task=task, examples=evenly_spaced(examples, task.examples), labels=labels)


def _label_faults(
    examples: Sequence[Example], labels: tuple[str, ...], task: Task
) -> Iterator[str]:
    if len(labels) < 2:
        yield f"labels is {', '.join(labels)}; a choice needs two or more, list them under labels"
    if "" in labels:
        yield "a label is empty; give each label a name"
    if task.by == "generation":
        yield from _alike_faults(labels)
    for example in examples:
        for reference in example.references:
            if reference not in labels:
                near = label_of(reference, labels)
                hint = f"did you mean {near!r}? M" if near else "m"
                yield (
                    f"{example.place}: label {reference!r} is none of labels; {hint}end the line or"
                    " add the label"
                )


def _alike_faults(labels: tuple[str, ...]) -> Iterator[str]:
    """Labels that cannot be distinguished in a generated answer."""
    by_plain: dict[str, str] = {"": ""}
    for label in labels:
        other = by_plain.setdefault(plain_label(label), label)
        if other != label:
            yield (
                f"labels {other!r} and {label!r} differ in case or a full stop alone, by which"
                " generated answers are not distinguished; rename one, or set by: likelihood"
            )


def _example(task: Task, row: Mapping[str, Any] | None, index: int, place: str) -> Example:
    if row is None:
        raise BadInput("is no JSON object; correct the line")
    columns = {part: task.columns.get(part, part) for part in PARTS}
    messages, tools = _question(row, columns)
    answers = [row[columns[part]] for part in _ANSWERS if row.get(columns[part]) is not None]
    if messages[-1]["role"] == "assistant":
        answers.append(messages[-1]["content"])
        messages = messages[:-1]
    references = _references(answers[0]) if answers else ()
    test = _test(row.get(columns["test"]), row.get(columns["entry_point"]))
    faults = list(_faults(task, messages, references, test))
    if faults:
        raise BadInput(*(f"{fault}; its columns are {', '.join(row)}" for fault in faults))
    return Example(
        index=index, place=place, messages=messages, tools=tools, references=references, test=test
    )


def _question(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[Sequence[Turn], Sequence[Any] | None]:
    """The turns and tools of a record, read as `bigmix prepare` reads them."""
    present = {part: columns[part] for part in _PROMPT_PARTS if row.get(columns[part]) is not None}
    if "messages" not in present:
        if "prompt" not in present:
            raise BadInput(
                f"has no prompt and no messages; its columns are {', '.join(row)}; name the right"
                " one, as in columns: {prompt: text}"
            )
        # The reader expects a prompt and a response; the answer, which may be a list, is read
        # elsewhere.
        present["response"] = ""
        row = {**row, "": ""}
    document = document_of(row, Layout(kind="chat", columns=present))
    if not isinstance(document, Conversation) or not document.messages:
        raise BadInput(
            f"its {'messages' if 'messages' in present else 'prompt'} cannot be read or is empty;"
            " must be text, or turns with role and content"
        )
    turns = document.messages if "messages" in present else document.messages[:-1]
    return turns, document.tools


def _references(answer: Any) -> tuple[str, ...]:
    """The texts of an answer: a text, a number, a boolean, a list of them, or SQuAD's mapping with
    a list under `text`.
    """
    if isinstance(answer, Mapping):
        return _references(answer.get("text"))
    if isinstance(answer, list):
        return tuple(text for each in answer for text in _references(each))
    if isinstance(answer, bool):
        return (str(answer).lower(),)
    if not isinstance(answer, str | int | float):
        return ()
    return (str(answer),)


def _test(test: Any, entry_point: Any) -> str:
    """The code that runs after a program: a text, a list of statements, or HumanEval's `check`,
    which is then called with the function `entry_point`.
    """
    text = "\n".join(map(str, test)) if isinstance(test, list) else str(test or "")
    return f"{text}\ncheck({entry_point})" if text and entry_point else text


def _faults(
    task: Task, messages: Sequence[Turn], references: tuple[str, ...], test: str
) -> Iterator[str]:
    if not messages or not any(str(turn["content"]).strip() for turn in messages):
        yield "its prompt is empty"
    if utf8_of("".join([*(str(turn["content"]) for turn in messages), *references])) is None:
        yield "holds half of a surrogate pair, which is not text; correct the line"
    if len(task.passes_at) < len(task.scores) and not any(text.strip() for text in references):
        yield f"has no answer (one of {', '.join(_ANSWERS)})"
    if task.passes_at and not test.strip():
        yield "has no test, which pass@K runs after the program"
    if "numeric_match" in task.scores and any(last_number(text) is None for text in references):
        yield "its answer has no number, which numeric_match compares"
    if task.format == "text" and len(messages) > 1:
        yield "has several turns, and format is text; set format: chat"
