"""What the probe asks, what was answered, and how likely the tokens of answers are.

Letters: N tokens of all answers, end to end, K likeliest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigmix.evaluation.behaviour.prompts import BehaviourPrompt
from bigmix.types import Floats, Ints

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompts:
    """Prompts with their tokens in the chat template of a model, up to where its answer begins, and
    the number of tokens after which an answer is cut.
    """

    prompts: Sequence[BehaviourPrompt]
    tokens: Sequence[Tokens]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model answers to a prompt: its tokens, with the one that ends it, and its text.

    `stops`: whether the model has ended it, so that the last of the tokens is the end of the turn;
    where not, the answer was cut.
    """

    tokens: Tokens
    text: str
    stops: bool

    @property
    def length(self) -> int:
        """The number of tokens before the end of the turn."""
        return len(self.tokens) - self.stops


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AnswerScores:
    """How likely a model finds the tokens of answers, each after the true ones before it.

    nll_N: negative log-likelihoods. ids_NK: some ids in the place of each token; log_probs_NK1:
    their log-probabilities, and in the last column that of all other ids together.
    """

    nll_N: Floats
    ids_NK: Ints
    log_probs_NK1: Floats


def sums_of_answers(values_N: Floats, answers: Sequence[Answer]) -> Floats:
    """The sum of a number of each token over each answer, in double precision."""
    firsts = np.cumsum([0, *(len(answer.tokens) for answer in answers[:-1])])
    sums: Floats = np.add.reduceat(values_N.astype(np.float64), firsts)
    return sums
