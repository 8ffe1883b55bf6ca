"""Reads the answers of the behaviour probe, and selects those that show what was lost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.sentences import holds_sentence
from bigmix.evaluation.bootstrap import Estimate, interval, resampled_sums
from bigmix.runs.layout import BEHAVIOUR
from bigmix.seeding import key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedAnswer:
    """The answers of the base and of a model to one prompt.

    `messages` are role and text of each message of the prompt, the last of which is the user's.
    `followed` is whether the answer follows the constraints of the prompt, `base_followed` whether
    that of the base does; both are None where there are none. `stops` is False where the answer was
    cut after so many tokens.
    """

    id: str
    kind: str
    messages: Sequence[tuple[str, str]]
    base: str
    answer: str
    followed: bool | None
    base_followed: bool | None
    stops: bool
    num_tokens: int

    @property
    def question(self) -> str:
        """The last message of the prompt."""
        return self.messages[-1][1]


def read_answers(folder: Path, step: int) -> list[ComparedAnswer]:
    """The answers of the model after a step, in the order of the prompts; none where the folder of
    the run has none, or none of the base.

    Raises BadInput where a line of them is damaged.
    """
    path = folder / BEHAVIOUR / f"step-{step:06d}.jsonl"
    if not path.is_file():
        return []
    answers = []
    # splitlines would also split at line ends inside a text.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, raw in enumerate(lines[:-1], start=1):
        try:
            line = json.loads(raw)
            if line["base"] is not None:
                answers.append(_answer(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadInput(
                f"{path}:{number} is {raw[:60]!r}; each line must be a JSON object with id,"
                " messages, base and answer; delete the file to compare without its answers"
            ) from error
    return answers


def _answer(line: Mapping[str, Any]) -> ComparedAnswer:
    messages = [(str(message["role"]), str(message["content"])) for message in line["messages"]]
    if not messages:
        raise ValueError("no message")
    return ComparedAnswer(
        id=str(line["id"]),
        kind=str(line.get("kind") or ""),
        messages=messages,
        base=str(line["base"]),
        answer=str(line["answer"]),
        followed=_flag(line["followed"]),
        base_followed=_flag(line["base_followed"]),
        stops=bool(line["stops"]),
        num_tokens=int(line["tokens"]),
    )


def _flag(value: Any) -> bool | None:
    return None if value is None else bool(value)


def instructions_lost(answers: Sequence[ComparedAnswer]) -> Estimate | None:
    """The fraction of prompts with constraints that the base followed, minus that which the model
    follows; None without such prompts.
    """
    return _part_lost([(a.base_followed, a.followed) for a in answers if a.followed is not None])


def sentences_lost(answers: Sequence[ComparedAnswer]) -> Estimate | None:
    """The fraction of the base's answers with a whole sentence, minus that of the model's; None
    without answers.
    """
    return _part_lost([(holds_sentence(a.base), holds_sentence(a.answer)) for a in answers])


def _part_lost(pairs: Sequence[tuple[bool | None, bool | None]]) -> Estimate | None:
    """How much smaller a part of the answers has something, from whether that of the base and that
    of the model have it.

    The interval is that of prompts drawn with replacement, both answers to a prompt together.
    Where none has lost it, such draws have no loss either, however few the prompts are; the high
    end is then the largest loss that remains unseen in so many prompts with a probability of
    2.5 %.
    """
    if not pairs:
        return None
    changes = [float(bool(before)) - float(bool(after)) for before, after in pairs]
    resampled_R = resampled_sums(np.array(changes)[:, None], key_of("interval", BEHAVIOUR))[:, 0]
    low, high = interval(resampled_R / len(changes))
    if max(changes) <= 0:
        high = 1 - 0.025 ** (1 / len(changes))
    return Estimate(value=sum(changes) / len(changes), low=low, high=high)


def telling_example(answers: Sequence[ComparedAnswer]) -> ComparedAnswer | None:
    """The answer that is shown for all where behaviour was lost: the first one that does not
    follow the constraints of its prompt while that of the base does; without such a one the least
    similar to the base's, in the sense of `difflib`. None where all answers are those of the base.
    """
    failed = (answer for answer in answers if answer.base_followed and answer.followed is False)
    others = [answer for answer in answers if answer.answer != answer.base]
    return next(failed, min(others, key=_similarity, default=None))


def _similarity(answer: ComparedAnswer) -> float:
    return SequenceMatcher(None, answer.base, answer.answer, autojunk=False).ratio()
