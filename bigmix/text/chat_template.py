"""Renders conversations with a chat template and finds the assistant's answers in the text.

The answers are what the model learns. Which characters they are follows from the template's own
`{% generation %}` mark, or else from a second rendering with unique marks in place of the answers.
The token that ends a turn belongs to the answer before it: a model that never learns it never
stops.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jinja2
import numpy as np

from bigmix.errors import BadInput
from bigmix.text.chat_tokens import (
    HIDDEN,
    HIDDEN_CLOSE,
    HIDDEN_OPEN,
    MARK_CLOSE,
    MARK_OPEN,
    EncodedChat,
    RenderedChat,
    Spans,
    encode_chats,
)
from bigmix.text.formats import Conversation, Dropped, Turn, utf8_of
from bigmix.text.tokenizer import Tokenizer
from bigmix.types import Flags

PLAIN = """\
{%- if tools %}{{ 'Tools: ' + (tools | tojson) + '\\n\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ 'Assistant:' }}{% generation %}{{ ' ' + message.content }}
{%- if message.tool_calls %}{{ '\\nCalls: ' + (message.tool_calls | tojson) }}{% endif %}
{{- eos_token }}{% endgeneration %}
{%- else %}{{ message.role | capitalize + ': ' + message.content + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

PLAIN_SHA256 = hashlib.sha256(PLAIN.encode()).hexdigest()
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY = "strftime_now"
MARK = re.compile(f"{MARK_OPEN}([0-9]+){MARK_CLOSE}")
QUESTION = "Is it?"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template.

    `source` is Jinja; `marked` means that it has `{% generation %}`. `turn_end` is what it writes
    after the last answer to end a turn, "" where nothing. `turn_ends` are the beginnings of
    `turn_end` that end with a special token, the longest first: after an answer in the middle of a
    conversation the template may write only one of these.
    """

    name: Literal["plain", "tokenizer"]
    source: str
    marked: bool
    turn_end: str
    turn_ends: Sequence[str]

    @property
    def sha256(self) -> str:
        """The hash of the source, by which a manifest names the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()


def open_template(tokenizer: Tokenizer, name: Literal["plain", "tokenizer"]) -> Template:
    """The built-in plain template, or the tokenizer's own.

    Raises BadInput where the tokenizer has no template, or where the template cannot render one
    question and one answer.
    """
    source = PLAIN if name == "plain" else tokenizer.chat_template
    if source is None:
        raise BadInput(
            f"tokenizer {tokenizer.name} has no chat template, which --template tokenizer needs;"
            " give --template plain"
        )
    mark = f"{MARK_OPEN}0{MARK_CLOSE}"
    probe = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": mark}]
    try:
        text, _ = _render(tokenizer, source, probe, None)
    except (jinja2.TemplateError, TypeError) as error:
        raise BadInput(
            f"the chat template of {tokenizer.name} cannot render a question and an answer"
            f" ({error}); correct it, or give --template plain"
        ) from error
    specials = f"(?:{tokenizer.special_pattern.pattern})"
    found = re.match(rf"\s*{specials}+", text.rpartition(mark)[2])
    return Template(
        name=name,
        source=source,
        marked=GENERATION.search(source) is not None,
        turn_end=found.group() if found else "",
        turn_ends=_beginnings(found.group(), specials) if found else (),
    )


def _beginnings(turn_end: str, specials: str) -> Sequence[str]:
    ends = [match.end() for match in re.finditer(specials, turn_end)]
    return [turn_end[:end] for end in reversed(ends)]


def encode_chat(
    tokenizer: Tokenizer, template: Template, conversation: Conversation
) -> EncodedChat | Dropped:
    """The tokens of a conversation; Dropped, with the reason, where nothing can be learned from
    it.
    """
    return encode_chats(tokenizer, [render_chat(tokenizer, template, conversation)])[0]


def render_chat(
    tokenizer: Tokenizer, template: Template, conversation: Conversation
) -> RenderedChat | Dropped:
    """The text of a conversation and the answers in it; Dropped, with the reason, where nothing can
    be learned from it.
    """
    reason = _unfit(template, conversation)
    if reason is not None:
        return Dropped(reason=reason)
    hidden = _Hidden(tokenizer)
    try:
        rendered = _rendered(tokenizer, template, conversation, hidden)
    except (jinja2.TemplateError, TypeError):
        return Dropped(reason="refused_by_template")
    except UnicodeEncodeError:  # some filters of Jinja encode
        return Dropped(reason="not_unicode")
    if rendered is None:
        return Dropped(reason="answers_not_found")
    text, spans = rendered
    answers = [turn for turn in conversation.messages if turn["role"] == "assistant"]
    if not all(map(_is_learned, answers)):
        if len(spans) != len(answers):
            return Dropped(reason="weights_not_found")
        spans = [span for span, turn in zip(spans, answers, strict=True) if _is_learned(turn)]
    if any(turn.get("tool_calls") for turn in answers):
        # Only the rendered text shows what the template writes for the calls.
        learned = [_without_specials(tokenizer, text[b:e], hidden) for b, e in spans]
    else:
        learned = [turn["content"] for turn in answers if _is_learned(turn)]
    utf8, utf8_of_answers = utf8_of(text), utf8_of("".join(learned))
    if utf8 is None or utf8_of_answers is None:
        return Dropped(reason="not_unicode")
    return RenderedChat(
        text=text,
        utf8=utf8,
        spans=spans,
        hidden=hidden.strings,
        answer_bytes=len(utf8_of_answers),
        num_turns=len(conversation.messages),
    )


def _is_learned(turn: Turn) -> bool:
    """Whether an answer is in the loss: in OpenAI's format the weight 0 leaves one out."""
    return bool(turn.get("weight") != 0)


def _without_specials(tokenizer: Tokenizer, text: str, hidden: "_Hidden") -> str:
    """Part of a rendered text without its special tokens, and with the hidden strings put back."""
    return HIDDEN.sub(
        lambda found: hidden.strings[int(found[1])], tokenizer.special_pattern.sub("", text)
    )


def _rendered(
    tokenizer: Tokenizer, template: Template, conversation: Conversation, hidden: "_Hidden"
) -> tuple[str, Spans] | None:
    """The text of a conversation and where its answers are; None where they are not found."""
    if template.name == "plain" and _is_simple(tokenizer, conversation):
        return _simple(tokenizer, template, conversation.messages, hidden)
    find = _marked_spans if template.marked else _sentinel_spans
    messages, tools = hidden.hide(conversation.messages), hidden.hide(conversation.tools)
    return find(tokenizer, template, messages, tools)


def _is_simple(tokenizer: Tokenizer, conversation: Conversation) -> bool:
    """Whether the plain template writes only roles and contents, and no role contains a special
    token.
    """
    if conversation.tools or any(turn.get("tool_calls") for turn in conversation.messages):
        return False
    return _are_plain_roles(tokenizer.special_pattern)


@lru_cache(maxsize=8)
def _are_plain_roles(specials: re.Pattern[str]) -> bool:
    return not any(specials.search(role) for role in SPEAKERS)


def _simple(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Turn], hidden: "_Hidden"
) -> tuple[str, Spans]:
    """What the plain template writes for simple turns, ten times as fast as Jinja."""
    eos = tokenizer.eos_token
    text, answers = "", list[tuple[int, int]]()
    for turn in messages:
        content = hidden.hide(turn["content"])
        if turn["role"] == "assistant":
            text += "Assistant:"
            begin = len(text)
            text += f" {content}{eos}"
            answers.append((begin, len(text)))
        else:
            text += f"{SPEAKERS[turn['role']]}: {content}\n\n"
    return text, _with_turn_ends(text, answers, template)


def _unfit(template: Template, conversation: Conversation) -> str | None:
    answers = [turn for turn in conversation.messages if turn["role"] == "assistant"]
    if not any(map(_is_learned, answers)):
        return "no_assistant_turn"
    if any(not turn["content"].strip() and not turn.get("tool_calls") for turn in answers):
        return "empty_answer"
    # Without the mark, nothing shows where in the text the template writes a call.
    if not template.marked and any(turn.get("tool_calls") for turn in answers):
        return "tool_calls_not_found"
    return None


def _render(
    tokenizer: Tokenizer, source: str, messages: Sequence[Turn], tools: Sequence[Any] | None
) -> tuple[str, Spans]:
    # transformers takes half a second to import, which worker processes mostly do without.
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[list(messages)],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=GENERATION.search(source) is not None,
        **tokenizer.special_tokens,
    )
    return texts[0], spans[0] if spans else ()


def _marked_spans(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Turn], tools: Sequence[Any] | None
) -> tuple[str, Spans] | None:
    text, answers = _render(tokenizer, template.source, messages, tools)
    return (text, _with_turn_ends(text, answers, template)) if answers else None


def _sentinel_spans(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Turn], tools: Sequence[Any] | None
) -> tuple[str, Spans] | None:
    """The text, and the answers where a second rendering has marks in their place.

    The places are right if the answers, put back for the marks, give the text of the first
    rendering; None where they do not.
    """
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    numbers = iter(range(len(answers)))
    marked = [
        (
            {**turn, "content": f"{MARK_OPEN}{next(numbers)}{MARK_CLOSE}"}
            if turn["role"] == "assistant"
            else turn
        )
        for turn in messages
    ]
    truth, _ = _render(tokenizer, template.source, messages, tools)
    frame, _ = _render(tokenizer, template.source, marked, tools)
    pieces = MARK.split(frame)  # text, number of an answer, text, ..., text
    if [int(number) for number in pieces[1::2]] != list(range(len(answers))):
        return None
    for trim in (str, str.strip, str.rstrip, str.lstrip):  # many templates trim contents
        text, spans = _put_back(pieces[::2], [trim(answer) for answer in answers])
        if text == truth:
            return text, _with_turn_ends(text, spans, template)
    return None


def _put_back(between: Sequence[str], answers: Sequence[str]) -> tuple[str, Spans]:
    text, spans = between[0], []
    for answer, after in zip(answers, between[1:], strict=True):
        spans.append((len(text), len(text) + len(answer)))
        text += answer + after
    return text, spans


def _with_turn_ends(text: str, answers: Spans, template: Template) -> Spans:
    """The answers, each extended over as much of the end of a turn as follows it."""

    def ended(end: int) -> int:
        found = next((own for own in template.turn_ends if text.startswith(own, end)), "")
        return end + len(found)

    return [(begin, ended(end)) for begin, end in answers]


@lru_cache(maxsize=8)
def _hidden_pattern(specials: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(f"{specials.pattern}|[{HIDDEN_OPEN}-{MARK_CLOSE}]")


class _Hidden:
    """Replaces strings of special tokens inside messages while a template renders them.

    Special tokens that the template writes are control tokens; the same characters in a message are
    text and must stay text. The signs that this module puts into text are hidden as well, so that
    no message can forge them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pattern = _hidden_pattern(tokenizer.special_pattern)
        self._signs = tokenizer.special_signs
        self.strings: list[str] = []

    def hide(self, value: Any) -> Any:
        """The value (a text, or lists and tables of texts) with marks for the hidden strings."""
        if isinstance(value, str):
            # Most texts are ASCII without the first character of any special token, which takes a
            # tenth of the time to find out.
            if value.isascii() and not any(sign in value for sign in self._signs):
                return value
            return self._pattern.sub(self._replacement, value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(item) for item in value]
        return value

    def _replacement(self, match: re.Match[str]) -> str:
        self.strings.append(match.group())
        return f"{HIDDEN_OPEN}{len(self.strings) - 1}{HIDDEN_CLOSE}"


def check_first(
    tokenizer: Tokenizer, template: Template, samples: Sequence[EncodedChat | Dropped]
) -> Sequence[str]:
    """Check the first conversations of a source; returns warnings.

    Raises BadInput where no answer is found in any of them, and where one begins with two BOS
    tokens.
    """
    chats = [sample for sample in samples if isinstance(sample, EncodedChat)]
    reasons = [sample.reason for sample in samples if isinstance(sample, Dropped)]
    unsound = [
        reason for reason in reasons if reason in ("answers_not_found", "refused_by_template")
    ]
    if not any(chat.loss_mask.any() for chat in chats) and (unsound or chats):
        raise BadInput(
            f"the answers cannot be found in what the chat template of {tokenizer.name} writes"
            f" (first {len(samples)} conversations:"
            f" {', '.join(sorted(set(unsound))) or 'no token in the loss'}); give --template plain,"
            " or put {% generation %} and {% endgeneration %} around the answers in the template"
        )
    if tokenizer.bos_id is not None and any(
        len(chat.ids) > 1 and (chat.ids[:2] == tokenizer.bos_id).all() for chat in chats
    ):
        raise BadInput(
            f"conversations begin with two BOS tokens ({tokenizer.text_of(tokenizer.bos_id)!r});"
            " remove one from the chat template, or give --template plain"
        )
    return _warnings(tokenizer, template, chats)


def _warnings(
    tokenizer: Tokenizer, template: Template, chats: Sequence[EncodedChat]
) -> Sequence[str]:
    special = np.array(sorted(tokenizer.special_ids), np.uint32)
    found = []
    # The last token of each answer.
    ends = [chat.ids[_ends_of(chat.loss_mask)] for chat in chats]
    if not np.isin(np.concatenate([*ends, special[:1]]), special).all():
        found.append(
            "no stop token is in the loss, so the model does not learn to end an answer; give"
            " --template plain, or a template that ends answers with the eos token"
        )
    stops = {int(token) for ids in ends for token in ids} & tokenizer.special_ids
    if tokenizer.pad_id in stops:
        found.append(
            f"the stop token {tokenizer.text_of(tokenizer.pad_id)!r} is also the pad token; bigmix"
            " learns it, but trainers that mask pad tokens do not"
        )
    used = {int(token) for chat in chats for token in np.unique(chat.ids)} & tokenizer.special_ids
    foreign = sorted(used - {tokenizer.bos_id, tokenizer.eos_id})
    if foreign:
        names = ", ".join(map(tokenizer.text_of, foreign))
        found.append(
            f"the chat template uses the special tokens {names}; a base model that never trained"
            " their embeddings loses knowledge while it learns them: for such a model give"
            " --template plain"
        )
    if TODAY in template.source:
        found.append("the chat template writes today's date, so the tokens change from day to day")
    return found


def _ends_of(loss_mask: Flags) -> Flags:
    """True for each token in the loss that no other follows directly [T]."""
    ends: Flags = loss_mask & ~np.append(loss_mask[1:], False)
    return ends
