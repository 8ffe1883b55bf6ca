"""The base's answers, which behaviour is measured from, and their file in the folder of a run.

Together they are a held-out chat set: prompts, answers, and how likely the base found each token of
its answers.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bigmix.errors import BadInput
from bigmix.evaluation.behaviour.constraints import constraint_of
from bigmix.evaluation.behaviour.prompts import BehaviourPrompt
from bigmix.evaluation.behaviour.records import (
    Answer,
    AnswerScores,
    ChatPrompts,
    Tokens,
    sums_of_answers,
)
from bigmix.files import atomic_write
from bigmix.runs.layout import BEHAVIOUR
from bigmix.types import Floats, Ints

BASE_ANSWERS = f"{BEHAVIOUR}/base.npz"
_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseAnswers:
    """The answers of a base to prompts, and its scores of their tokens.

    `tokenizer` is the fingerprint of its tokenizer, `template` the sha256 of its chat template.
    """

    chat: ChatPrompts
    answers: Sequence[Answer]
    scores: AnswerScores
    tokenizer: str
    template: str

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the prompts and answers, their tokens, the tokenizer and the chat template: two
        models with the same one here are measured on the same answers.
        """
        content = [
            self.tokenizer,
            self.template,
            self.chat.max_new_tokens,
            [prompt.plain() for prompt in self.chat.prompts],
            self.chat.tokens,
            [(answer.tokens, answer.stops) for answer in self.answers],
        ]
        text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def nll(self) -> Floats:
        """The base's negative log-likelihood of each of its answers [D]."""
        return sums_of_answers(self.scores.nll_N, self.answers)

    def content(self) -> bytes:
        """The bytes of the file."""
        buffer = io.BytesIO()
        answers = self.answers
        np.savez(
            buffer,
            version=np.array(_VERSION),
            fingerprint=np.array(self.fingerprint),
            tokenizer=np.array(self.tokenizer),
            template=np.array(self.template),
            max_new_tokens=np.array(self.chat.max_new_tokens),
            prompts=_as_bytes([prompt.plain() for prompt in self.chat.prompts]),
            texts=_as_bytes([answer.text for answer in answers]),
            prompt_ids=_joined(self.chat.tokens),
            prompt_lengths=_lengths(self.chat.tokens),
            answer_ids=_joined([answer.tokens for answer in answers]),
            answer_lengths=_lengths([answer.tokens for answer in answers]),
            stops=np.array([answer.stops for answer in answers]),
            nll=self.scores.nll_N,
            likeliest_ids=self.scores.ids_NK,
            log_probs=self.scores.log_probs_NK1[:, :-1],
            log_prob_of_rest=self.scores.log_probs_NK1[:, -1],
        )
        return buffer.getvalue()

    def write(self, folder: Path) -> None:
        """Write the file in the folder of a run or of an evaluation."""
        path = folder / BASE_ANSWERS
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.content())


def read_base_answers(folder: Path) -> bytes | None:
    """The bytes of the file that `write` left in a run's folder; None where there is none."""
    path = folder / BASE_ANSWERS
    return path.read_bytes() if path.is_file() else None


def parse_base_answers(content: bytes, fingerprint: str) -> BaseAnswers:
    """The answers in the bytes of a file; raises BadInput where they are not those with this
    fingerprint.
    """
    try:
        with np.load(io.BytesIO(content)) as arrays:
            if int(arrays["version"]) != _VERSION:
                raise ValueError(f"its version is {arrays['version']}, must be {_VERSION}")
            found = _parsed(arrays)
    except _DAMAGE as error:
        raise BadInput(
            f"{BASE_ANSWERS} in the run's folder is damaged ({error}); {_REMEDY}"
        ) from error
    if found.fingerprint != fingerprint:
        raise BadInput(
            f"{BASE_ANSWERS} in the run's folder has the answers {found.fingerprint[:12]}, and the"
            f" run has measured from {fingerprint[:12]}; {_REMEDY}"
        )
    return found


# What reading a file raises that is not as it was written.
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OSError,
    zipfile.BadZipFile,
    BadInput,
)
_REMEDY = (
    "restore it from a copy, or delete it: behaviour is then no longer compared with that of the"
    " base"
)


def _parsed(arrays: Any) -> BaseAnswers:
    prompts = [_prompt(each) for each in _from_bytes(arrays["prompts"])]
    tokens = _split(arrays["answer_ids"], arrays["answer_lengths"])
    texts, stops = _from_bytes(arrays["texts"]), arrays["stops"].tolist()
    log_probs_NK, rest_N = arrays["log_probs"], arrays["log_prob_of_rest"]
    return BaseAnswers(
        chat=ChatPrompts(
            prompts=prompts,
            tokens=_split(arrays["prompt_ids"], arrays["prompt_lengths"]),
            max_new_tokens=int(arrays["max_new_tokens"]),
        ),
        answers=[
            Answer(tokens=own, text=text, stops=ended)
            for own, text, ended in zip(tokens, texts, stops, strict=True)
        ],
        scores=AnswerScores(
            nll_N=arrays["nll"],
            ids_NK=arrays["likeliest_ids"],
            log_probs_NK1=np.concatenate([log_probs_NK, rest_N[:, None]], axis=1),
        ),
        tokenizer=str(arrays["tokenizer"]),
        template=str(arrays["template"]),
    )


def _prompt(row: Any) -> BehaviourPrompt:
    constraints = [constraint_of(each) for each in row["constraints"]]
    return BehaviourPrompt(**row | {"constraints": constraints})


def _as_bytes(value: Any) -> Any:
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def _from_bytes(array: Any) -> Any:
    return json.loads(array.tobytes().decode())


def _joined(rows: Sequence[Tokens]) -> Ints:
    return np.array([token for row in rows for token in row], np.int32)


def _lengths(rows: Sequence[Tokens]) -> Ints:
    return np.array([len(row) for row in rows], np.int32)


def _split(ids: Ints, lengths: Ints) -> list[Tokens]:
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [tuple(part.tolist()) for part in parts]
