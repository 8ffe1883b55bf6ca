"""Samples conversations with a chat model, each as a function of its number.

A conversation has a prompt that is known, or a question that the model writes: given all that its
template writes before a question, it goes on with one (Xu et al., "Magpie", arXiv:2406.08464).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bigmix.commands.remedies.answer_filter import fault_of_answer
from bigmix.commands.remedies.chat_prompts import (
    ChatPrompt,
    TemplateFacts,
    ids_before_answer,
    place_of,
    system_for,
)
from bigmix.commands.remedies.generator import Completion, TextGenerator
from bigmix.commands.remedies.outcomes import Outcome
from bigmix.commands.remedies.row_cache import GenerationRequest
from bigmix.commands.remedies.sample_files import SampleOrder
from bigmix.seeding import key_of
from bigmix.text.chat_template import Template, encode_chat
from bigmix.text.chat_tokens import EncodedChat
from bigmix.text.formats import Conversation, Turn
from bigmix.text.tokenizer import Tokenizer

MOST_QUESTION_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSampling:
    """How answers are sampled: each has at most `max_tokens` tokens.

    A prompt is asked at each of the `temperatures` in turn; with `greedy_first`, its first answer
    is the likeliest at each token. A fraction `systems` of the prompts without a system prompt is
    given one in one of the `languages`.
    """

    temperatures: Sequence[float]
    greedy_first: bool
    systems: float
    languages: Sequence[str]
    seed: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnFormat:
    """How the model is asked: its tokenizer, the chat template in it, and what the template
    writes.
    """

    tokenizer: Tokenizer
    template: Template
    facts: TemplateFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A conversation that waits for its answer."""

    number: int
    prompt: ChatPrompt
    temperature: float


class ConversationSampler:
    """A model in memory that conversations are sampled with; without `prompts` it writes the
    questions, too.
    """

    def __init__(
        self,
        generator: TextGenerator,
        turn_format: TurnFormat,
        sampling: AnswerSampling,
        prompts: Sequence[ChatPrompt] | None,
    ) -> None:
        self._generator = generator
        self._format = turn_format
        self._sampling = sampling
        self._prompts = prompts
        self._asked: dict[int, _Asked] = {}
        self._ready: deque[GenerationRequest] = deque()  # whose questions the model has written

    def outcomes(self, order: SampleOrder[Outcome]) -> Iterator[Outcome]:
        """The conversations in order, as long as there are to be more."""

        def next_request() -> GenerationRequest | None:
            if self._ready:
                return self._ready.popleft()
            number = order.begin()
            return None if number is None else self._begun(number)

        for completion in self._generator.completions(next_request):
            number = completion.request.number
            asked = self._asked.pop(number, None)
            outcome = (
                self._questioned(number, completion)
                if asked is None
                else self._answered(asked, completion)
            )
            if outcome is not None:
                kept = outcome.tokens if outcome.reason is None else None
                yield from order.end(number, outcome, kept)

    def _begun(self, number: int) -> GenerationRequest:
        if self._prompts is None:
            heats = self._sampling.temperatures
            return GenerationRequest(
                number=number,
                prompt=self._format.facts.before_question,
                uniforms_T=self._draw("question", number).random(MOST_QUESTION_TOKENS),
                temperature=heats[number % len(heats)],
            )
        place = place_of(number, len(self._prompts), self._sampling.seed)
        prompt = self._prompts[place.prompt]
        request = self._ask(number, prompt, self._temperature(place.prompt, place.round))
        assert request is not None, "prompts were rendered before"
        return request

    def _temperature(self, prompt: int, round_: int) -> float:
        """Over the rounds, a prompt is asked at each temperature in turn; over the prompts, a round
        has all of them.
        """
        if self._sampling.greedy_first and round_ == 0:
            return 0.0
        heats = self._sampling.temperatures
        return heats[(prompt + round_) % len(heats)]

    def _ask(self, number: int, prompt: ChatPrompt, temperature: float) -> GenerationRequest | None:
        """The request for an answer; None where the template does not render the prompt."""
        draw = self._draw("system", number)
        if prompt.system is None and draw.random() < self._sampling.systems:
            prompt = prompt.with_system(system_for(prompt, draw, self._sampling.languages))
        ids = ids_before_answer(self._format.tokenizer, self._format.template, prompt.messages)
        if ids is None:
            return None
        self._asked[number] = _Asked(number=number, prompt=prompt, temperature=temperature)
        return GenerationRequest(
            number=number,
            prompt=ids,
            uniforms_T=self._draw("answer", number).random(self._sampling.max_tokens),
            temperature=temperature,
        )

    def _draw(self, what: str, number: int) -> np.random.Generator:
        return np.random.default_rng(key_of(self._sampling.seed, f"self-replay-{what}", number))

    def _questioned(self, number: int, completion: Completion) -> Outcome | None:
        """None where the question is to be answered; the outcome where it is not."""
        text = self._format.tokenizer.decode(completion.ids).strip()
        temperature = completion.request.temperature
        turn: Turn = {"role": "user", "content": text}
        fault = fault_of_answer(
            text,
            is_cut=completion.is_cut,
            question="",
            system=None,
            marks=self._format.facts.marks,
        )
        if fault is None:
            prompt = ChatPrompt(id=None, language=None, messages=[turn])
            heat = 0.0 if self._sampling.greedy_first else temperature
            request = self._ask(number, prompt, heat)
            if request is not None:
                self._ready.append(request)
                return None
            fault = "not_rendered"
        return Outcome(
            conversation=number,
            prompt_id=None,
            temperature=temperature,
            messages=[turn],
            tokens=len(completion.ids),
            reason=f"question_{fault}",
            is_of_model=True,
        )

    def _answered(self, asked: _Asked, completion: Completion) -> Outcome:
        tokenizer, prompt = self._format.tokenizer, asked.prompt
        text = tokenizer.decode(completion.ids)
        reason = fault_of_answer(
            text,
            is_cut=completion.is_cut,
            question=prompt.question,
            system=prompt.system,
            marks=self._format.facts.marks,
        )
        outcome = Outcome(
            conversation=asked.number,
            prompt_id=prompt.id,
            temperature=asked.temperature,
            messages=[*prompt.messages, {"role": "assistant", "content": text}],
            tokens=len(completion.ids),
            reason=reason,
            is_of_model=self._prompts is None,
        )
        return outcome if reason is not None else self._encoded(outcome)

    def _encoded(self, outcome: Outcome) -> Outcome:
        """The outcome with the number of loss tokens that it will have as a document."""
        whole = Conversation(messages=outcome.messages, tools=None)
        chat = encode_chat(self._format.tokenizer, self._format.template, whole)
        if not isinstance(chat, EncodedChat):
            return replace(outcome, reason=chat.reason)
        return replace(outcome, tokens=int(chat.loss_mask.sum()))
