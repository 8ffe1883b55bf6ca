"""Tokenises the prompts of tasks: a chat has the token ids that it would have in training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigmix.data.shards.manifest import Manifest
from bigmix.errors import BadInput
from bigmix.evaluation.tasks.examples import Example, TaskFile
from bigmix.recipe.task import Task
from bigmix.text.chat_template import Template, open_template, render_chat
from bigmix.text.chat_tokens import encode_chats
from bigmix.text.formats import Conversation, Dropped
from bigmix.text.tokenizer import Tokenizer, load_tokenizer

ANSWER = "a"  # an answer that is rendered only to find where answers begin

PromptTokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """The tokenizer of a model, and the chat template of its sources; without a template, prompts
    are text unless a task has format: chat.
    """

    tokenizer: Tokenizer
    template: Template | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """An example as the model sees it: the tokens of the prompt, and those of each label that may
    follow.
    """

    example: Example
    prompt: PromptTokens
    labels: tuple[PromptTokens, ...]

    @property
    def longest(self) -> int:
        """The number of tokens of the prompt with its longest label."""
        return len(self.prompt) + max(map(len, self.labels), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedTask:
    """A task as tokens; `num_dropped` examples do not fit the positions of the model."""

    task: Task
    labels: tuple[str, ...]
    questions: Sequence[Question]
    num_dropped: int
    is_chat: bool
    stops: frozenset[int]
    tokenizer: Tokenizer


def chat_format_of(folder_or_name: str, manifests: Sequence[Manifest]) -> ChatFormat:
    """The tokenizer of a folder or hub name, and the chat template of these prepared sources.

    Raises BadInput where the tokenizer or the template is not that of the sources.
    """
    tokenizer = load_tokenizer(folder_or_name)
    chats = {m.template.sha256: m.template.name for m in manifests if m.template is not None}
    if len(chats) > 1:
        raise BadInput(
            f"the sources have {len(chats)} chat templates, and tasks need a single one; prepare"
            " them again with the same --template, or set format: text"
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
    """The examples of each task as tokens.

    Raises BadInput with the faults of all tasks: an example that the template cannot render, or
    prompts that do not fit the model's positions (`max_positions`; None: no limit).
    """
    faults: list[str] = []
    prepared = {}
    for name, file in files.items():
        try:
            prepared[name] = _prepare(file, language, max_positions)
        except BadInput as error:
            faults += [f"tasks.{name}: {fault}" for fault in error.faults]
    if faults:
        raise BadInput(*faults)
    return prepared


def _prepare(file: TaskFile, language: ChatFormat, max_positions: int | None) -> PreparedTask:
    task, tokenizer = file.task, language.tokenizer
    template = _template(task, language)
    by_labels = file.labels if task.by == "likelihood" else ()
    questions = [_question(task, tokenizer, template, e, by_labels) for e in file.examples]
    capacity = max_positions if max_positions is not None else np.iinfo(np.int64).max
    num_new = 0 if task.by == "likelihood" else task.max_new_tokens
    fitting = [question for question in questions if question.longest + num_new <= capacity]
    num_dropped = len(questions) - len(fitting)
    if num_dropped and (task.long_prompts == "fail" or not fitting):
        longest = max(question.longest for question in questions)
        raise BadInput(
            f"{num_dropped} of {len(questions)} prompts do not fit the {capacity} positions of the"
            f" model with their answers (the longest has {longest} tokens, and {num_new} are to be"
            " generated); lower max_new_tokens, or set long_prompts: drop"
        )
    return PreparedTask(
        task=task,
        labels=file.labels,
        questions=fitting,
        num_dropped=num_dropped,
        is_chat=template is not None,
        stops=stops_of(tokenizer, template),
        tokenizer=tokenizer,
    )


def _template(task: Task, language: ChatFormat) -> Template | None:
    """The chat template of a task; None where its prompts are text."""
    if task.format == "text" or (task.format == "auto" and language.template is None):
        return None
    if language.template is not None:
        return language.template
    name: Literal["plain", "tokenizer"] = (
        "plain" if language.tokenizer.chat_template is None else "tokenizer"
    )
    return open_template(language.tokenizer, name)


def stops_of(tokenizer: Tokenizer, template: Template | None) -> frozenset[int]:
    """The ids that end an output: the end of a document, and the end of a turn."""
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
                f"{example.place}: has several turns, and is a text prompt since no source is a"
                " chat; set format: chat"
            )
        pairs = _as_text(tokenizer, example, task.separator, labels)
    else:
        pairs = _as_chat(tokenizer, template, example, labels or (ANSWER,))
    if not labels:
        prompt, _ = pairs[0]
        return Question(example=example, prompt=prompt, labels=())
    begin = _num_shared(pairs)
    whole = [prompt + answer for prompt, answer in pairs]
    if not begin:
        # The first token of each label needs a token that it is predicted from; the end of a
        # document carries no information about it.
        begin, whole = 1, [(tokenizer.eos_id, *ids) for ids in whole]
    return Question(
        example=example, prompt=whole[0][:begin], labels=tuple(ids[begin:] for ids in whole)
    )


def _num_shared(pairs: Sequence[tuple[PromptTokens, PromptTokens]]) -> int:
    """The number of tokens that all prompts begin with: a label may change how the end of its
    prompt is tokenised.
    """
    first = pairs[0][0]
    num_shared = min(len(prompt) for prompt, _ in pairs)
    while any(prompt[:num_shared] != first[:num_shared] for prompt, _ in pairs):
        num_shared -= 1
    return num_shared


def _as_chat(
    tokenizer: Tokenizer, template: Template, example: Example, answers: Sequence[str]
) -> list[tuple[PromptTokens, PromptTokens]]:
    conversations = [
        Conversation(
            messages=[*example.messages, {"role": "assistant", "content": answer}],
            tools=example.tools,
        )
        for answer in answers
    ]
    pairs = []
    for pair in chat_pairs(tokenizer, template, conversations):
        if isinstance(pair, Dropped):
            raise BadInput(f"{example.place}: the chat template cannot render it ({pair.reason})")
        pairs.append(pair)
    return pairs


def chat_pairs(
    tokenizer: Tokenizer, template: Template, conversations: Sequence[Conversation]
) -> Iterator[tuple[PromptTokens, PromptTokens] | Dropped]:
    """For each conversation, which ends with an answer, the tokens before that answer, and those of
    it that would be in the loss: the end of the turn is one of them. Dropped, with the reason,
    where the template cannot render it.
    """
    rendered = [render_chat(tokenizer, template, each) for each in conversations]
    for chat in encode_chats(tokenizer, rendered):
        if isinstance(chat, Dropped):
            yield chat
            continue
        # The last run of loss tokens: earlier answers of the conversation are in the loss, too.
        end = int(np.flatnonzero(chat.loss_mask)[-1]) + 1
        begin = int(np.flatnonzero(~chat.loss_mask[:end])[-1]) + 1
        ids = chat.ids.tolist()
        yield tuple(ids[:begin]), tuple(ids[begin:end])


def _as_text(
    tokenizer: Tokenizer, example: Example, separator: str, labels: Sequence[str]
) -> list[tuple[PromptTokens, PromptTokens]]:
    """The tokens of the prompt and those of each label after it; without labels, one pair with an
    empty label.
    """
    prompt = example.messages[0]["content"]
    begin = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    texts = [prompt, *(f"{prompt}{separator}{label}" for label in labels)]
    own, *whole = [(*begin, *ids.tolist()) for ids in tokenizer.encode(texts)]
    if not labels:
        return [(own, ())]
    pairs = []
    for ids in whole:
        num_shared = next(
            (at for at, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b),
            min(len(own), len(ids)),
        )
        pairs.append((tuple(ids[:num_shared]), tuple(ids[num_shared:])))
    return pairs
