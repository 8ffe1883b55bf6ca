"""Examples and a tokenizer go in, the token ids that the model is asked with come out: those it has
seen in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigmix.data.shards.manifest import Manifest
from bigmix.errors import BadInput
from bigmix.evaluation.tasks.examples import Example, TaskFile
from bigmix.recipe.task import Task
from bigmix.text.chat_template import Template, open_template, render_chat
from bigmix.text.chat_tokens import EncodedChat, encode_chats
from bigmix.text.formats import Conversation
from bigmix.text.tokenizer import Tokenizer, load_tokenizer

_PROBE = "a"  # an answer, for the template to be written up to it

PromptTokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """The tokenizer that a model speaks, and the template of its chats; None where prompts are text
    unless a task says chat.
    """

    tokenizer: Tokenizer
    template: Template | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An example as the model sees it: the tokens of the prompt, and behind them those of each
    label to compare.
    """

    example: Example
    prompt: PromptTokens
    labels: tuple[PromptTokens, ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest label."""
        return len(self.prompt) + max(map(len, self.labels), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedTask:
    """A task that is ready to be asked; `dropped` examples have no place in the model."""

    task: Task
    labels: tuple[str, ...]
    questions: Sequence[Question]
    dropped: int
    is_chat: bool
    stops: frozenset[int]
    tokenizer: Tokenizer


def chat_format_of(folder_or_name: str, manifests: Sequence[Manifest]) -> ChatFormat:
    """The tokenizer at a place, and the chat template that these prepared sources were written
    with.

    Raises BadInput where tokenizer or template are not those of the sources.
    """
    tokenizer = load_tokenizer(folder_or_name)
    chats = {m.template.sha256: m.template.name for m in manifests if m.template is not None}
    if len(chats) > 1:
        raise BadInput(
            f"the sources have {len(chats)} chat templates, and tasks are asked with one; prepare"
            " them again with one --template, or set format: text"
        )
    if any(m.tokenizer.fingerprint != tokenizer.fingerprint for m in manifests):
        raise BadInput(
            f"the tokenizer of {folder_or_name} is not the one that the sources are prepared with;"
            " prepare them again with it, or set model.tokenizer to theirs"
        )
    for sha256, name in chats.items():
        template = open_template(tokenizer, "plain" if name == "plain" else "tokenizer")
        if template.sha256 != sha256:
            raise BadInput(
                f"the chat template of {folder_or_name} is not the one that the sources were"
                " written with; restore it, or prepare them again"
            )
        return ChatFormat(tokenizer=tokenizer, template=template)
    return ChatFormat(tokenizer=tokenizer, template=None)


def tokenise_tasks(
    files: Mapping[str, TaskFile], language: ChatFormat, max_positions: int | None
) -> dict[str, PreparedTask]:
    """Write the examples of each task as tokens.

    Raises BadInput with all examples that the template cannot write or that do not fit the model's
    positions.
    """
    faults: list[str] = []
    asked = {}
    for name, file in files.items():
        try:
            asked[name] = _ask(file, language, max_positions)
        except BadInput as error:
            faults += [f"tasks.{name}: {fault}" for fault in error.faults]
    if faults:
        raise BadInput(*faults)
    return asked


def _ask(file: TaskFile, language: ChatFormat, max_positions: int | None) -> PreparedTask:
    task, tokenizer = file.task, language.tokenizer
    template = _template(task, language)
    by_labels = file.labels if task.by == "likelihood" else ()
    questions = [_question(task, tokenizer, template, e, by_labels) for e in file.examples]
    room = max_positions if max_positions is not None else np.iinfo(np.int64).max
    more = 0 if task.by == "likelihood" else task.max_new_tokens
    fitting = [question for question in questions if question.longest + more <= room]
    dropped = len(questions) - len(fitting)
    if dropped and (task.long_prompts == "fail" or not fitting):
        longest = max(question.longest for question in questions)
        raise BadInput(
            f"{dropped} of {len(questions)} prompts do not fit the {room} positions of the model"
            f" with their answers (the longest has {longest} tokens and {more} to come); lower"
            " max_new_tokens, or set long_prompts: drop"
        )
    return PreparedTask(
        task=task,
        labels=file.labels,
        questions=fitting,
        dropped=dropped,
        is_chat=template is not None,
        stops=_stops(tokenizer, template),
        tokenizer=tokenizer,
    )


def _template(task: Task, language: ChatFormat) -> Template | None:
    """How a task is written as a chat; None where it is text."""
    if task.format == "text" or (task.format == "auto" and language.template is None):
        return None
    if language.template is not None:
        return language.template
    name: Literal["plain", "tokenizer"] = (
        "plain" if language.tokenizer.chat_template is None else "tokenizer"
    )
    return open_template(language.tokenizer, name)


def _stops(tokenizer: Tokenizer, template: Template | None) -> frozenset[int]:
    """The tokens that end an output: that of a document, and of a turn."""
    ends = tokenizer.encode_rendered(template.turn_end.strip()).ids if template is not None else ()
    return frozenset({tokenizer.eos_id, *(int(t) for t in ends if t in tokenizer.special_ids)})


def _question(
    task: Task,
    tokenizer: Tokenizer,
    template: Template | None,
    example: Example,
    labels: tuple[str, ...],
) -> Question:
    if template is None:
        if len(example.messages) > 1:
            raise BadInput(
                f"{example.place}: has several turns, and is asked as text since no source is a"
                " chat; set format: chat"
            )
        written = _as_text(tokenizer, example, task.separator, labels)
    else:
        written = _as_chat(tokenizer, template, example, labels or (_PROBE,))
    if not labels:
        prompt, _ = written[0]
        return Question(example=example, prompt=prompt, labels=())
    begin = _shared(written)
    whole = [prompt + answer for prompt, answer in written]
    if not begin:
        # The first token of each label needs one that it is predicted from; an end of a document
        # says nothing about it.
        begin, whole = 1, [(tokenizer.eos_id, *ids) for ids in whole]
    return Question(
        example=example, prompt=whole[0][:begin], labels=tuple(ids[begin:] for ids in whole)
    )


def _shared(written: Sequence[tuple[PromptTokens, PromptTokens]]) -> int:
    """Tokens that all prompts begin with; a label may change how the end of its prompt is cut."""
    first = written[0][0]
    shared = min(len(prompt) for prompt, _ in written)
    while any(prompt[:shared] != first[:shared] for prompt, _ in written):
        shared -= 1
    return shared


def _as_chat(
    tokenizer: Tokenizer, template: Template, example: Example, answers: Sequence[str]
) -> list[tuple[PromptTokens, PromptTokens]]:
    """The tokens before each answer, and those that training would learn of it: the end of the turn
    among them.
    """
    rendered = [
        render_chat(
            tokenizer,
            template,
            Conversation(
                messages=[*example.messages, {"role": "assistant", "content": answer}],
                tools=example.tools,
            ),
        )
        for answer in answers
    ]
    written = []
    for chat in encode_chats(tokenizer, rendered):
        if not isinstance(chat, EncodedChat):
            raise BadInput(f"{example.place}: the chat template cannot write it ({chat.reason})")
        # The last stretch of learned tokens: earlier answers of the conversation are learned too.
        end = int(np.flatnonzero(chat.loss_mask)[-1]) + 1
        begin = int(np.flatnonzero(~chat.loss_mask[:end])[-1]) + 1
        ids = chat.ids.tolist()
        written.append((tuple(ids[:begin]), tuple(ids[begin:end])))
    return written


def _as_text(
    tokenizer: Tokenizer, example: Example, separator: str, labels: Sequence[str]
) -> list[tuple[PromptTokens, PromptTokens]]:
    """The tokens of the prompt, and those of each label behind it; without labels, one pair with no
    label.
    """
    prompt = example.messages[0]["content"]
    begin = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    texts = [prompt, *(f"{prompt}{separator}{label}" for label in labels)]
    own, *whole = [(*begin, *ids.tolist()) for ids in tokenizer.encode(texts)]
    if not labels:
        return [(own, ())]
    written = []
    for ids in whole:
        shared = next(
            (at for at, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b),
            min(len(own), len(ids)),
        )
        written.append((tuple(ids[:shared]), tuple(ids[shared:])))
    return written
