"""Keeps what became of each conversation on disk: learned, held out, or dropped with the reason.

Each conversation is a line of one of three files, in the order of their numbers, so that a command
that was stopped goes on after the last one.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from bigmix.commands.prepare.progress import held_out_folder
from bigmix.commands.remedies.answer_filter import REASONS, normalised
from bigmix.commands.remedies.sample_files import complete_lines, keep_lines, line_of
from bigmix.errors import BigmixError
from bigmix.seeding import key_of
from bigmix.text.formats import Turn

RECENT = 512  # conversations that decide whether too few are kept
FEWEST_KEPT = 0.02  # of them
_REMEDIES: Mapping[str, str] = {
    "endless": "raise --max-tokens or lower --temperature",
    "repeated": "give more --prompts, a higher --temperature or fewer --tokens",
    "question_repeated": "give a higher --temperature, fewer --tokens, or --prompts seeds",
}
_REMEDY = "see what the model writes in {file}, and lower --temperature or --top-p"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A conversation that has ended: its turns, of which the last is the answer, and why it is not
    learned from, a key of REASONS; None where it is.

    `tokens` are those in the loss. `is_of_model`: the model wrote the question as well.
    """

    conversation: int
    prompt_id: str | None
    temperature: float
    messages: Sequence[Turn]
    tokens: int
    reason: str | None
    is_of_model: bool

    @property
    def question(self) -> str:
        """The turns before the answer in a normal form, without a system prompt: conversations with
        the same one are all learned or all held out.
        """
        turns = [turn for turn in self.messages if turn["role"] in ("user", "assistant")]
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        return "\n".join(normalised(str(turn["content"])) for turn in asked)

    @property
    def identity(self) -> int:
        """The same for two conversations of which one is enough: with the same turns, or with the
        same question where the model wrote it.
        """
        turns = [normalised(str(turn["content"])) for turn in self.messages]
        return key_of(self.question) if self.is_of_model else key_of(*turns)

    def line(self) -> Mapping[str, Any]:
        """The conversation as a line of a file."""
        named = {} if self.prompt_id is None else {"prompt_id": self.prompt_id}
        dropped = {} if self.reason is None else {"reason": self.reason}
        return {
            "messages": [dict(turn) for turn in self.messages],
            "conversation": self.conversation,
            **named,
            "temperature": self.temperature,
            "tokens": self.tokens,
            **dropped,
        }


def is_held_out(question: str, fraction: float) -> bool:
    """Whether conversations with this question are held out, a function of the question alone."""
    return key_of("held-out", question) < fraction * 2.0**64


class OutcomeFiles(AbstractContextManager["OutcomeFiles"]):
    """The conversations so far: those that are learned in OUTPUT.jsonl, those of the fraction
    `held_out` of the questions in OUTPUT-held-out.jsonl, the others in OUTPUT.dropped.jsonl.
    """

    def __init__(self, output: Path, *, held_out: float, is_of_model: bool) -> None:
        self.learned, self.held_out, self.dropped = files_of_outcomes(output)
        self._fraction = held_out
        self._open: dict[Path, IO[str]] = {}
        self._stack = ExitStack()
        self._identities: set[int] = set()
        self._recent: deque[str | None] = deque(maxlen=RECENT)
        self.num_tokens = 0
        self.num_learned = self.num_held_out = 0
        self.reasons: Counter[str] = Counter()
        for outcome in _read(self.files, is_of_model=is_of_model):
            self._count(outcome)

    @property
    def files(self) -> Sequence[Path]:
        """All files, whether they exist or not."""
        return self.learned, self.held_out, self.dropped

    @property
    def num_conversations(self) -> int:
        """The number of conversations, which is that of the next one."""
        return self.num_kept + self.reasons.total()

    @property
    def num_kept(self) -> int:
        """The number of conversations that are not dropped."""
        return self.num_learned + self.num_held_out

    def judged(self, outcome: Outcome) -> Outcome:
        """The outcome with the reason of a conversation that there is already, where it is one."""
        if outcome.reason is not None or outcome.identity not in self._identities:
            return outcome
        return replace(outcome, reason="question_repeated" if outcome.is_of_model else "repeated")

    def __enter__(self) -> "OutcomeFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, outcome: Outcome) -> None:
        """Write the next conversation; raises BigmixError where nearly all have been dropped for a
        long time.
        """
        path = self._path(outcome)
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("a", encoding="utf-8"))
        self._open[path].write(line_of(outcome.line()))
        self._open[path].flush()
        self._count(outcome)
        num_kept = self._recent.count(None)
        if len(self._recent) == RECENT and num_kept < FEWEST_KEPT * RECENT:
            raise self._nearly_all_dropped(num_kept)

    def _path(self, outcome: Outcome) -> Path:
        if outcome.reason is not None:
            return self.dropped
        return self.held_out if is_held_out(outcome.question, self._fraction) else self.learned

    def _count(self, outcome: Outcome) -> None:
        self._recent.append(outcome.reason)
        if outcome.reason is not None:
            self.reasons[outcome.reason] += 1
            return
        self._identities.add(outcome.identity)
        self.num_tokens += outcome.tokens
        if self._path(outcome) == self.held_out:
            self.num_held_out += 1
        else:
            self.num_learned += 1

    def _nearly_all_dropped(self, num_kept: int) -> BigmixError:
        found = Counter(reason for reason in self._recent if reason is not None).most_common()
        reasons = "; ".join(f"{count} {name} ({meaning(name)})" for name, count in found)
        remedy = _REMEDIES.get(found[0][0], _REMEDY.format(file=self.dropped))
        return BigmixError(
            f"{RECENT - num_kept} of the last {RECENT} conversations are dropped: {reasons};"
            f" {remedy}"
        )


def files_of_outcomes(output: Path) -> tuple[Path, Path, Path]:
    """The files of conversations that are learned, held out and dropped."""
    folders = output, held_out_folder(output)
    learned, held_out = (folder.with_name(f"{folder.name}.jsonl") for folder in folders)
    return learned, held_out, output.with_name(f"{output.name}.dropped.jsonl")


def meaning(reason: str) -> str:
    """What a reason says, in words."""
    if reason in REASONS:
        return REASONS[reason]
    if reason.startswith("question_"):
        return f"the question: {REASONS[reason.removeprefix('question_')]}"
    return "the chat template does not write the answer as it is"


def _read(files: Sequence[Path], *, is_of_model: bool) -> Iterator[Outcome]:
    """The conversations that were written before, up to the first that is missing; the lines after
    it, which a command that was killed may have left, are removed.
    """
    found = {path: complete_lines(path) for path in files}
    lines = sorted(
        (line for of_file in found.values() for line in of_file),
        key=lambda line: int(line["conversation"]),
    )
    numbers = [int(line["conversation"]) for line in lines]
    num_whole = next((at for at, n in enumerate(numbers) if n != at), len(numbers))
    for path, of_file in found.items():
        keep_lines(path, sum(int(line["conversation"]) < num_whole for line in of_file))
    for line in lines[:num_whole]:
        yield Outcome(
            conversation=line["conversation"],
            prompt_id=line.get("prompt_id"),
            temperature=line["temperature"],
            messages=line["messages"],
            tokens=line["tokens"],
            reason=line.get("reason"),
            is_of_model=is_of_model,
        )
