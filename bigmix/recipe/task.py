"""The settings of a task: a file of examples, how the model is prompted, and how its outputs are
scored.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bigmix.recipe.fields import (
    A_NUMBER,
    Count,
    CountOrZero,
    NonNegative,
    PathOrUrl,
    Positive,
    Settings,
)

OF_LABELS = ("accuracy", "macro_f1")
SCORES = (
    "exact_match",
    "numeric_match",
    "token_f1",
    *OF_LABELS,
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
)
PARTS = (
    "prompt",
    "messages",
    "context",
    "input",
    "system",
    "history",
    "tools",
    "response",
    "label",
    "references",
    "test",
    "entry_point",
)
_PASS_AT = re.compile(r"pass@([1-9][0-9]*)")


class Task(Settings):
    """A file of examples that evaluations prompt the model with, and how its outputs are scored;
    see docs/tasks.md.
    """

    path: PathOrUrl
    """File of examples (.jsonl, also .gz or .zst): a prompt or messages, and a response, label or
    references.
    """
    scores: Annotated[tuple[str, ...], Field(min_length=1)]
    """What is measured, each from 0 to 1: exact_match, numeric_match, token_f1, accuracy, macro_f1,
    bleu, chrf, rouge1, rouge2, rougeL, pass@K.
    """
    by: Literal["generation", "likelihood"] = "generation"
    """generation: the model writes its answer; likelihood: of all labels the one that the model
    finds likeliest is its answer.
    """
    format: Literal["auto", "chat", "text"] = "auto"
    """chat: prompts in the chat template of the sources, text: the prompt as it is. auto: chat
    where a source is a chat.
    """
    columns: dict[str, str] = Field(default={})
    """Which column plays which part where it is not named after it, such as {prompt: text}."""
    examples: Count | None = None
    """Largest number of examples, spread evenly over the file; default: all."""
    when: Literal["ends", "last", "every"] = "ends"
    """The evaluations it is part of. ends: before the first and after the last step; last: after
    the last; every: all.
    """
    batch_rows: Count = 16
    """Outputs that one rank writes at a time, or labels that it compares; it changes speed and
    memory only.
    """
    max_new_tokens: Count = 256
    """Tokens after which an output ends in any case."""
    temperature: NonNegative = 0.0
    """0: always the likeliest token; above: drawn, each example by a chance of its own, whatever
    the batch or the ranks.
    """
    top_p: Annotated[float, Field(gt=0, le=1), A_NUMBER] = 1.0
    """Of the likeliest tokens those that together have this probability are drawn from."""
    outputs: Count = 1
    """Outputs of each example. pass@K needs K or more; bleu, chrf and macro_f1 judge the first one,
    other scores their mean.
    """
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an output, besides the end of a turn or document; they are not part of it."""
    labels: tuple[str, ...] = ()
    """The labels that can be answered; default: those of the file."""
    length_normalise: Literal["none", "tokens", "bytes"] = "none"
    """What the log-likelihood of a label is divided by, so that long ones have a chance."""
    separator: str = " "
    """Between a prompt and a label, where prompts are text and scored by likelihood."""
    long_prompts: Literal["fail", "drop"] = "fail"
    """What happens where a prompt and its answer do not fit the model's positions. fail: the run is
    refused; drop: they are left out, and counted.
    """
    bleu_tokenizer: Literal["auto", "13a", "zh", "char", "intl", "none"] = "auto"
    """How sacrebleu cuts texts into words. auto: zh where most references are Chinese, else 13a."""
    execute: bool = False
    """Run what the model writes, for pass@K.

    No one has read that code: it has limits of time and memory, but no sandbox.
    """
    execute_timeout_s: Positive = 10.0
    """Seconds after which a program counts as failed."""
    execute_memory_mib: Count = 1024
    """Memory that a program may use, in MiB."""
    samples: CountOrZero = 20
    """Examples whose outputs are kept in `output`/samples, spread evenly."""

    @model_validator(mode="after")
    def _whole(self) -> "Task":
        faults = [*self._score_faults(), *self._likelihood_faults(), *self._other_faults()]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def passes_at(self) -> tuple[int, ...]:
        """The K of each pass@K."""
        return tuple(int(match[1]) for name in self.scores if (match := _PASS_AT.fullmatch(name)))

    @property
    def judges_labels(self) -> bool:
        """Whether answers are labels out of a list."""
        return self.by == "likelihood" or any(name in OF_LABELS for name in self.scores)

    def _score_faults(self) -> Iterator[str]:
        for name in self.scores:
            if name not in SCORES and not _PASS_AT.fullmatch(name):
                yield (
                    f"scores has {name!r}, which is no score; known are: {', '.join(SCORES)},"
                    " pass@K"
                )
        if len(set(self.scores)) < len(self.scores):
            yield f"scores is {', '.join(self.scores)}; name each once"
        if self.passes_at and not self.execute:
            yield (
                f"scores has pass@{self.passes_at[0]}, which runs code that the model writes, and"
                " execute is false; set execute: true where that is no danger (in a container"
                " without network), or leave the score out"
            )
        if self.passes_at and self.outputs < max(self.passes_at):
            yield (
                f"outputs is {self.outputs}, pass@{max(self.passes_at)} needs {max(self.passes_at)}"
                f" or more; set outputs: {max(self.passes_at)}"
            )

    def _likelihood_faults(self) -> Iterator[str]:
        strange = [name for name in self.scores if name not in OF_LABELS]
        if self.by == "likelihood" and strange:
            yield (
                f"scores has {', '.join(strange)}, and by: likelihood answers with labels; leave "
                f"{', '.join(OF_LABELS)}, or set by: generation"
            )

    def _other_faults(self) -> Iterator[str]:
        if self.outputs > 1 and not self.temperature:
            yield (
                f"outputs is {self.outputs} and temperature 0, so that all of them are the same;"
                " set temperature: 0.8, or outputs: 1"
            )
        if unknown := [part for part in self.columns if part not in PARTS]:
            yield f"columns names {', '.join(unknown)}; allowed are {', '.join(PARTS)}"
