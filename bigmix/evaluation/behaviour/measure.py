"""Measures how far the behaviour of a model is from that of its base, with 95 % intervals.

With nll_d the negative log-likelihood of the base's answer d by the model, and n_d its tokens,

    loss = sum_d nll_d / sum_d n_d        forgetting = loss - loss of the base on the same answers

and with q the probabilities of the base and p those of the model at a token of an answer, where S
are the base's likeliest tokens and R all others,

    kl = sum_{v in S} q_v ln(q_v / p_v) + q_R ln(q_R / p_R),        q_R = sum_{v not in S} q_v

which is at most the divergence over the whole vocabulary (the data processing inequality), and
needs no second model in memory. The other measures are means over answers that the model writes
itself. An interval is that of the same quotient over prompts that are drawn with replacement; that
of a difference takes the same draws for both. Letters: D prompts, N tokens of the base's answers, K
of its likeliest tokens, C columns of `_Column`, R resamples.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, auto
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.answers import BehaviourProbe, Respondent, write_answers
from bigmix.evaluation.behaviour.baseline import BaseAnswers
from bigmix.evaluation.behaviour.constraints import followed
from bigmix.evaluation.behaviour.prompts import BehaviourPrompt
from bigmix.evaluation.behaviour.records import (
    Answer,
    AnswerScores,
    ChatPrompts,
    sums_of_answers,
)
from bigmix.evaluation.behaviour.teacher_forcing import score_given
from bigmix.evaluation.bootstrap import Estimate, interval, resampled_sums
from bigmix.evaluation.tasks.matching import CHINESE
from bigmix.files import replace_text
from bigmix.runs.layout import BEHAVIOUR
from bigmix.runs.metrics_log import MetricsRecord
from bigmix.seeding import evenly_spaced, key_of
from bigmix.types import Floats

_Quotient: TypeAlias = "Callable[[Floats], Floats]"  # of sums [C], or of those of resamples [R, C]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPair:
    """A prompt, the model's answer to it, and that of the base where there is one.

    followed, base_followed: whether the answer follows all constraints; None where there are none,
    or no answer.
    """

    prompt: BehaviourPrompt
    answer: Answer
    base: Answer | None
    followed: bool | None
    base_followed: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerStatistics:
    """What the answers of a model are like.

    instructions: the part that follow all constraints, of the prompts with some; None where no
    prompt has any. sentences: the part with a whole sentence (`holds_sentence`). stops: the part
    that the model ended before they were cut. length: mean number of tokens.
    """

    instructions: Estimate | None
    sentences: Estimate
    stops: Estimate
    length: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class BehaviourResult:
    """The behaviour of a model; None what is not measured without a base.

    loss, forgetting and kl are in nats per token of the base's answers. `same` is the part of the
    answers that are the base's. `base` are the statistics of the base's answers where the model is
    not the base, `change` those of the model less those of the base. `pairs` are all answers,
    `samples` those to show.
    """

    loss: Estimate | None
    forgetting: Estimate | None
    kl: Estimate | None
    same: Estimate | None
    answers: AnswerStatistics
    base: AnswerStatistics | None
    change: AnswerStatistics | None
    num_tokens: int | None
    pairs: Sequence[AnswerPair]
    samples: Sequence[AnswerPair]

    @property
    def num_constrained(self) -> int:
        """The number of prompts with constraints."""
        return sum(bool(pair.prompt.constraints) for pair in self.pairs)


def answers_of_base(respondent: Respondent, probe: BehaviourProbe) -> BaseAnswers | None:
    """The answers of a base, with its scores of them; a collective, with the same result on all
    ranks. None where a stop was requested on any rank.
    """
    answers = write_answers(respondent, probe, probe.chat)
    if answers is None:
        return None
    scores = score_given(respondent, probe.chat, answers)
    if scores is None:
        return None
    return BaseAnswers(
        chat=probe.chat,
        answers=answers,
        scores=scores,
        tokenizer=probe.tokenizer.fingerprint,
        template=probe.template.sha256,
    )


def result_of_base(probe: BehaviourProbe, base: BaseAnswers) -> BehaviourResult:
    """The result of the base itself: nothing is forgotten, and every answer is the same."""
    result = _summarised(probe, base.chat, base.answers, base, base.scores)
    return replace(result, base=None, change=None)


def notes_on_base(probe: BehaviourProbe, base: BaseAnswers) -> Iterator[str]:
    """What the user should know of answers of a base that were read from a file, before a model is
    compared with them.

    Raises BadInput where they are in the tokens of another tokenizer or template.
    """
    if (probe.tokenizer.fingerprint, probe.template.sha256) != (base.tokenizer, base.template):
        raise BadInput(
            f"the tokenizer of {probe.tokenizer.name} or its chat template is not the one that"
            " the base answered in; restore it, or set behaviour=off"
        )
    # Not their tokens, in which some templates write today's date.
    if _plain_chat(probe.chat) != _plain_chat(base.chat):
        yield (
            f"behaviour is measured with the {len(base.chat.prompts)} prompts and the"
            f" max_new_tokens of {base.chat.max_new_tokens} of the first evaluation, which are not"
            " those that the recipe names now"
        )


def _plain_chat(chat: ChatPrompts) -> tuple[Any, ...]:
    return [prompt.plain() for prompt in chat.prompts], chat.max_new_tokens


def measure_behaviour(
    respondent: Respondent, probe: BehaviourProbe, base: BaseAnswers | None
) -> BehaviourResult | None:
    """The behaviour of a model, compared with the answers of a base where there are some, to their
    prompts; a collective, with the same result on all ranks.

    None where a stop was requested on any rank.
    """
    scores = None
    if base is not None:
        scores = score_given(respondent, base.chat, base.answers, base.scores.ids_NK)
        if scores is None:
            return None
    chat = probe.chat if base is None else base.chat
    answers = write_answers(respondent, probe, chat)
    return None if answers is None else _summarised(probe, chat, answers, base, scores)


def behaviour_line(result: BehaviourResult) -> MetricsRecord:
    """A result under the keys of an evaluation line."""
    line: MetricsRecord = {}
    of_model = {"loss": result.loss, "forgetting": result.forgetting, "kl": result.kl}
    for key, estimate in (of_model | estimates_of(result.answers) | {"same": result.same}).items():
        if estimate is not None:
            line[f"behaviour/{key}"] = estimate.value
            line[f"behaviour_low/{key}"] = estimate.low
            line[f"behaviour_high/{key}"] = estimate.high
    line["behaviour_prompts"] = len(result.pairs)
    line["behaviour_constrained"] = result.num_constrained
    if result.num_tokens is not None:
        line["behaviour_tokens"] = result.num_tokens
    return line


def estimates_of(statistics: AnswerStatistics) -> dict[str, Estimate | None]:
    """The statistics by name."""
    return {
        "instructions": statistics.instructions,
        "sentences": statistics.sentences,
        "stops": statistics.stops,
        "length": statistics.length,
    }


def write_pairs(folder: Path, step: int, result: BehaviourResult) -> None:
    """Write all answers of an evaluation to behaviour/step-NNNNNN.jsonl in a folder."""
    path = folder / BEHAVIOUR / f"step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_plain(pair), ensure_ascii=False) for pair in result.pairs)
    replace_text(path, "".join(f"{line}\n" for line in lines))


def _plain(pair: AnswerPair) -> dict[str, Any]:
    return pair.prompt.plain() | {
        "base": None if pair.base is None else pair.base.text,
        "answer": pair.answer.text,
        "followed": pair.followed,
        "base_followed": pair.base_followed,
        "stops": pair.answer.stops,
        "tokens": pair.answer.length,
    }


_FENCED = re.compile(r"```.*?(?:```|\Z)", re.S)
_SENTENCE = re.compile(r"(.+?)(?:[。！？]|[.!?…](?=[\s\"'”’」』)\]*_]|$))")
_WORD = re.compile(
    rf"(?:(?!{CHINESE.pattern})[^\W\d_])+(?:['’-](?:(?!{CHINESE.pattern})[^\W\d_])+)*"
)
_WORDS_OF_SENTENCE, _SIGNS_OF_SENTENCE = 3, 4


def holds_sentence(text: str) -> bool:
    """Whether a text has a whole sentence outside of fenced code.

    A sentence is a part of a line that ends with a full stop, a question mark, an exclamation mark
    or an ellipsis, has none of these before its end, and has three words or four Chinese
    characters; where it has both, n/3 + m/4 must reach 1. A word is made of letters.
    """
    return any(
        len(_WORD.findall(part)) / _WORDS_OF_SENTENCE
        + len(CHINESE.findall(part)) / _SIGNS_OF_SENTENCE
        >= 1
        for line in _FENCED.sub("\n", text).splitlines()
        for part in _SENTENCE.findall(line)
    )


class _Column(IntEnum):
    """The numbers of a prompt: of the model's answer, of the base's (from BASE_FOLLOWED on), and of
    the tokens of the base's answer.
    """

    PROMPTS = 0
    CONSTRAINED = auto()
    FOLLOWED = auto()
    SENTENCES = auto()
    STOPS = auto()
    LENGTH = auto()
    BASE_FOLLOWED = auto()
    BASE_SENTENCES = auto()
    BASE_STOPS = auto()
    BASE_LENGTH = auto()
    SAME = auto()
    TOKENS = auto()
    NLL = auto()
    BASE_NLL = auto()
    KL = auto()


_TO_BASE = _Column.BASE_FOLLOWED - _Column.FOLLOWED


def _summarised(
    probe: BehaviourProbe,
    chat: ChatPrompts,
    answers: Sequence[Answer],
    base: BaseAnswers | None,
    scores: AnswerScores | None,
) -> BehaviourResult:
    pairs = list(_pairs(chat, answers, base))
    numbers_DC = np.array([_numbers(pair) for pair in pairs])
    if base is not None and scores is not None:
        numbers_DC[:, _Column.TOKENS] = [len(answer.tokens) for answer in base.answers]
        numbers_DC[:, _Column.NLL] = sums_of_answers(scores.nll_N, base.answers)
        numbers_DC[:, _Column.BASE_NLL] = base.nll
        numbers_DC[:, _Column.KL] = sums_of_answers(_kl(base.scores, scores), base.answers)
    resampled_RC = resampled_sums(numbers_DC, key_of("interval", BEHAVIOUR))
    sums = _PromptSums(
        totals_C=numbers_DC.sum(axis=0),
        resampled_RC=resampled_RC if len(pairs) > 1 else resampled_RC[:0],
    )

    def to_base(quotient: _Quotient) -> Estimate | None:
        return None if base is None else sums.estimate(quotient)

    return BehaviourResult(
        loss=to_base(_ratio(_Column.NLL, _Column.TOKENS)),
        forgetting=to_base(_difference(_Column.NLL, _Column.BASE_NLL, _Column.TOKENS)),
        kl=to_base(_ratio(_Column.KL, _Column.TOKENS)),
        same=to_base(_ratio(_Column.SAME, _Column.PROMPTS)),
        answers=_statistics(sums, _ratio),
        base=None if base is None else _statistics(sums, _of_base),
        change=None if base is None else _statistics(sums, _change),
        num_tokens=None if base is None else int(sums.totals_C[_Column.TOKENS]),
        pairs=pairs,
        samples=evenly_spaced(pairs, probe.num_samples),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _PromptSums:
    """The columns summed over all prompts, and over those of each resample; no resample where there
    is one prompt, which says nothing about how others would differ.
    """

    totals_C: Floats
    resampled_RC: Floats

    def estimate(self, quotient: _Quotient) -> Estimate:
        """A quotient of sums with its interval."""
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(quotient(self.resampled_RC))
            return Estimate(value=float(quotient(self.totals_C)), low=low, high=high)


def _statistics(sums: _PromptSums, of: Callable[[_Column, _Column], _Quotient]) -> AnswerStatistics:
    """The statistics, each as `of` makes it of the column of the model's answers and the number of
    prompts.
    """
    instructions = None
    if sums.totals_C[_Column.CONSTRAINED]:
        instructions = sums.estimate(of(_Column.FOLLOWED, _Column.CONSTRAINED))
    return AnswerStatistics(
        instructions=instructions,
        sentences=sums.estimate(of(_Column.SENTENCES, _Column.PROMPTS)),
        stops=sums.estimate(of(_Column.STOPS, _Column.PROMPTS)),
        length=sums.estimate(of(_Column.LENGTH, _Column.PROMPTS)),
    )


def _pairs(
    chat: ChatPrompts, answers: Sequence[Answer], base: BaseAnswers | None
) -> Iterator[AnswerPair]:
    others = [None] * len(answers) if base is None else base.answers
    for prompt, answer, other in zip(chat.prompts, answers, others, strict=True):
        yield AnswerPair(
            prompt=prompt,
            answer=answer,
            base=other,
            followed=_followed(prompt, answer),
            base_followed=_followed(prompt, other),
        )


def _followed(prompt: BehaviourPrompt, answer: Answer | None) -> bool | None:
    if answer is None or not prompt.constraints:
        return None
    return followed(prompt.constraints, answer.text)


def _numbers(pair: AnswerPair) -> list[float]:
    """The columns [C] of a prompt, without those that the scores of tokens fill."""
    numbers = [0.0] * len(_Column)
    numbers[_Column.PROMPTS] = 1
    numbers[_Column.CONSTRAINED] = bool(pair.prompt.constraints)
    of_both = ((0, pair.answer, pair.followed), (_TO_BASE, pair.base, pair.base_followed))
    for shift, answer, is_followed in of_both:
        if answer is not None:
            numbers[_Column.FOLLOWED + shift] = bool(is_followed)
            numbers[_Column.SENTENCES + shift] = holds_sentence(answer.text)
            numbers[_Column.STOPS + shift] = answer.stops
            numbers[_Column.LENGTH + shift] = answer.length
    numbers[_Column.SAME] = pair.base is not None and pair.base.text == pair.answer.text
    return numbers


def _kl(base: AnswerScores, model: AnswerScores) -> Floats:
    """KL(base || model) at each token [N], over the base's likeliest tokens and all others as
    one.
    """
    log_q, log_p = (each.log_probs_NK1.astype(np.float64) for each in (base, model))
    # A vocabulary of no more tokens has no others: their probability is 0 in both.
    is_known = np.isfinite(log_q)
    parts_NK1 = np.zeros_like(log_q)
    parts_NK1[is_known] = np.exp(log_q[is_known]) * (log_q[is_known] - log_p[is_known])
    kl_N: Floats = parts_NK1.sum(axis=1)
    return kl_N


def _ratio(above: _Column, below: _Column) -> _Quotient:
    return lambda sums_xC: sums_xC[..., above] / sums_xC[..., below]


def _difference(above: int, minus: int, below: _Column) -> _Quotient:
    return lambda sums_xC: (sums_xC[..., above] - sums_xC[..., minus]) / sums_xC[..., below]


def _of_base(above: _Column, below: _Column) -> _Quotient:
    return _ratio(_Column(above + _TO_BASE), below)


def _change(above: _Column, below: _Column) -> _Quotient:
    return _difference(above, above + _TO_BASE, below)
